"""Quantizing a 1 GB safetensors file: peak memory and speed. Writes benches/results/quantize_file.json.

    python benches/python/quantize_file.py [--repeats N]

The file holds two layers of the shape of Llama 3 8B in bfloat16, an embedding and an output head, both of 8192 tokens:
the largest tensor is 14336 x 4096, 117 MB. Each run is a process of its own. It reports the resident memory when torch
is imported, before lowbit_rs is, and the highest that the process ever had, both as Linux counts them (VmRSS and
VmHWM of /proc/self/status). The time is that of the whole conversion, until the new file is on disk; the source has
just been written, so it is read from the page cache.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from environment import save
from lowbit_rs.files.safetensors_format import TensorInfo
from lowbit_rs.files.safetensors_stream import SafetensorsWriter

HIDDEN, INTERMEDIATE, KEY_VALUE, TOKENS, LAYERS = 4096, 14336, 1024, 8192, 2
LIMIT_BYTES = 300_000_000
CASES: tuple[dict[str, Any], ...] = (
    {"format": "nf4", "block_size": 64, "double_quant": False},
    {"format": "nf4", "block_size": 64, "double_quant": True},
    {"format": "uint4", "block_size": 32, "double_quant": False},
    {"format": "int8", "block_size": "row", "double_quant": False},
)


def tensors() -> list[TensorInfo]:
    """The tensors of the file."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (TOKENS, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (TOKENS, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qo"}
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (KEY_VALUE, HIDDEN) for name in "kv"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{prefix}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE)}
        shapes |= {f"{prefix}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    return [TensorInfo(name, "BF16", shape) for name, shape in shapes.items()]


def write_source(path: Path) -> None:
    """Writes the file, with normal weights of a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    with SafetensorsWriter(path, tensors(), {"format": "pt"}) as writer:
        for tensor in tensors():
            data = torch.empty(tensor.shape, dtype=torch.bfloat16)
            writer.write(tensor.name, data.normal_(std=0.02, generator=generator))


CHILD = """
import json, sys, time
import torch

def memory(field):
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))

baseline = memory("VmRSS")
from lowbit_rs.files import quantize_file
source, destination, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
start = time.perf_counter()
summary = quantize_file(source, destination, **options)
seconds = time.perf_counter() - start
result = {"seconds": seconds, "baseline_bytes": baseline, "peak_bytes": memory("VmHWM")}
result["bytes_after"] = summary.bytes_after
print(json.dumps(result))
"""


def run(source: Path, destination: Path, case: dict[str, Any]) -> dict[str, Any]:
    """One conversion in a process of its own."""
    command = [sys.executable, "-c", CHILD, str(source), str(destination), json.dumps(case)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    destination.unlink()
    result: dict[str, Any] = json.loads(output)
    return result


def measure(source: Path, case: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Median time and highest memory of several conversions."""
    runs = [run(source, source.with_name("quantized.safetensors"), case) for _ in range(repeats)]
    seconds = statistics.median(result["seconds"] for result in runs)
    quantized = sum(math.prod(t.shape) for t in tensors() if "_proj" in t.name) * torch.bfloat16.itemsize
    return {
        **case,
        "seconds": seconds,
        "source_gb_per_second": source.stat().st_size / seconds / 1e9,
        "baseline_bytes": runs[0]["baseline_bytes"],
        "peak_over_baseline_bytes": max(result["peak_bytes"] - result["baseline_bytes"] for result in runs),
        "limit_bytes": LIMIT_BYTES,
        "bytes_before": sum(tensor.nbytes for tensor in tensors()),
        "bytes_of_quantized_tensors_before": quantized,
        "bytes_after": runs[0]["bytes_after"],
    }


def write_and_sync_speed(directory: Path, nbytes: int = 1 << 28) -> float:
    """Bytes a second at which the disk takes a plain file: a bound for every conversion."""
    data, path = bytes(1 << 24), directory / "plain"
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(nbytes // len(data)):
            file.write(data)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return nbytes / seconds


def main() -> None:
    """Measures all cases, prints them and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory(prefix="quantize-file-") as directory:
        source = Path(directory) / "source.safetensors"
        write_source(source)
        disk = write_and_sync_speed(Path(directory))
        rows = [measure(source, case, repeats) for case in CASES]
    for row in rows:
        print(
            f"{row['format']:6} block {row['block_size']!s:4} double_quant={row['double_quant']!s:5} "
            f"{row['seconds']:6.2f} s  {row['source_gb_per_second']:5.2f} GB/s  "
            f"peak {row['peak_over_baseline_bytes'] / 1e6:6.1f} MB over the interpreter with torch"
        )
    print(
        save(
            "quantize_file", rows, repeats=repeats, disk_write_gb_per_second=disk / 1e9, threads=torch.get_num_threads()
        )
    )
    if any(row["peak_over_baseline_bytes"] > LIMIT_BYTES for row in rows):
        sys.exit(f"peak memory above {LIMIT_BYTES} bytes")


if __name__ == "__main__":
    main()
