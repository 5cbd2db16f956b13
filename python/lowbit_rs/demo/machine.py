"""What a measurement ran on: every table and JSON file with a speed in it says so."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from lowbit_rs import _native

_CACHE = Path("/sys/devices/system/cpu/cpu0/cache")


def machine() -> dict[str, str | int | None]:
    """Processor, its cores open to this process, caches, memory, instruction set, torch and its threads.

    Sizes are in bytes; None stands for what the system does not tell.
    """
    return {
        "processor": processor(),
        "cores": available_cores(),
        "last_level_cache": last_level_cache(),
        "memory": _memory(),
        "isa": _native.isa(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    """The processor's model name; its architecture where the system has no name for it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def available_cores() -> int:
    """Logical cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def last_level_cache() -> int | None:
    """Bytes of the largest cache of the first core."""
    sizes = [path.read_text(encoding="ascii").strip() for path in _CACHE.glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=None)


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # no sysconf, or not these names
        return None
