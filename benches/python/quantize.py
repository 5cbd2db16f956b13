"""Packing and unpacking one large weight on the CPU: speed against the source's bytes, and memory beyond both ends.

    python benches/python/quantize.py [--shape 4096x14336] [--dtype bf16] [--threads 2]

The source and the packed weight are in memory before and after; the peak above them is read from a child process that
packs once. bitsandbytes packs the same weight where it is installed. Writes benches/results/quantize.json.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import lowbit_rs
from environment import save

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_SETTINGS: dict[str, dict[str, Any]] = {
    "nf4": {"format": "nf4"},
    "nf4 double-quantized": {"format": "nf4", "double_quant": True},
    "fp4": {"format": "fp4"},
    "int4": {"format": "int4"},
    "uint4": {"format": "uint4"},
    "int8": {"format": "int8"},
    "int8 row": {"format": "int8", "block_size": "row"},
    "nf4 of a transposed matrix": {"format": "nf4"},
}
_REPEATS = 7

#: Run in a child: the peak of resident memory while packing, above what was resident before plus the packed weight.
_PEAK = """
import sys, torch, lowbit_rs
rows, cols, dtype = int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])
def read(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
weight = torch.randn(rows, cols).to(dtype)
lowbit_rs.quantize(weight[:64])
open("/proc/self/clear_refs", "w").write("5")  # restarts the peak
before = read("VmRSS")
packed = lowbit_rs.quantize(weight)
print(read("VmHWM") - before - packed.nbytes)
"""


def main() -> None:
    """Measure, print a table, save."""
    arguments = _arguments()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    rows_, cols = arguments.shape
    weight = torch.randn(rows_, cols, generator=torch.Generator().manual_seed(0)).to(_DTYPES[arguments.dtype])
    rows = [_measure(name, weight, options) for name, options in _SETTINGS.items()]
    rows += _bitsandbytes(weight)
    peak = peak_memory(arguments.shape, weight.dtype)
    console = Console(markup=False, highlight=False)
    console.print(_table(rows, f"{rows_} x {cols} {arguments.dtype}: GB/s of source, packing and unpacking"))
    console.print(f"peak above source and packed weight: {peak / 1e6:.1f} MB")
    console.print(f"wrote {save('quantize', rows, peak_bytes=peak, threads=torch.get_num_threads())}")


def _measure(name: str, weight: torch.Tensor, options: dict[str, Any]) -> dict[str, Any]:
    source = weight.t().contiguous().t() if "transposed" in name else weight
    packed = lowbit_rs.quantize(source, **options)
    return {
        "setting": name,
        "quantize_bytes_per_second": weight.nbytes / _median(lambda: lowbit_rs.quantize(source, **options)),
        "dequantize_bytes_per_second": weight.nbytes / _median(packed.dequantize),
    }


def _bitsandbytes(weight: torch.Tensor) -> list[dict[str, Any]]:
    try:
        from bitsandbytes import functional
    except ImportError:
        return []
    packed, state = functional.quantize_4bit(weight, quant_type="nf4")
    packing = _median(lambda: functional.quantize_4bit(weight, quant_type="nf4"), repeats=2)
    unpacking = _median(lambda: functional.dequantize_4bit(packed, state), repeats=2)
    row = {
        "setting": "bitsandbytes nf4",
        "quantize_bytes_per_second": weight.nbytes / packing,
        "dequantize_bytes_per_second": weight.nbytes / unpacking,
    }
    return [row]


def peak_memory(shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Bytes that packing a weight of this shape needs beyond the weight and its packed form."""
    command = [sys.executable, "-c", _PEAK, *map(str, shape), str(dtype).removeprefix("torch.")]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _median(call: Callable[[], object], repeats: int = _REPEATS) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _table(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("setting")
    table.add_column("quantize", justify="right")
    table.add_column("dequantize", justify="right")
    for row in rows:
        speeds = (row["quantize_bytes_per_second"], row["dequantize_bytes_per_second"])
        table.add_row(row["setting"], *(f"{speed / 1e9:.2f}" for speed in speeds))
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", type=_shape, default=(4096, 14336), help="N x K; by default 4096x14336")
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16", help="of the source")
    parser.add_argument("--threads", type=int, help="by default as many as torch uses")
    return parser.parse_args()


def _shape(text: str) -> tuple[int, int]:
    rows, cols = text.split("x")
    return int(rows), int(cols)


if __name__ == "__main__":
    main()
