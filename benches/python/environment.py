"""What a benchmark ran on and with, and where its results go: used by every script here, and printed by this one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from lowbit_rs.demo.machine import machine

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benches" / "results"

#: Whose versions are recorded where they are installed: what is measured, what it is compared with, what both run on.
_DISTRIBUTIONS = (
    "lowbit-rs",
    "accelerate",
    "bitsandbytes",
    "numpy",
    "peft",
    "safetensors",
    "torch",
    "transformers",
)


def environment() -> dict[str, Any]:
    """Machine, versions (None where not installed), commit of the working tree and time of the measurement."""
    return {
        "machine": machine(),
        "versions": {name: _version(name) for name in _DISTRIBUTIONS},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def save(name: str, rows: Sequence[Mapping[str, Any]], **more: Any) -> Path:
    """Write ``rows``, with the environment and ``more`` beside them, to benches/results/<name>.json.

    The file is written beside its place and renamed, so that it is never half written. Returns its path.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"environment": environment(), **more, "rows": list(rows)}
    beside = path.with_suffix(".json.partial")
    try:
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or a source archive without history
        return None
    return run.stdout.strip()


if __name__ == "__main__":
    print(json.dumps(environment(), indent=2))
