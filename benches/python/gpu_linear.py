"""Linear layers on a GPU side by side: torch bf16, bitsandbytes, torch's int4 kernel, lowbit_rs; one process, one run.

    python benches/python/gpu_linear.py [--shapes 4096x4096] [--tokens 1,16] [--rivals "torch bf16,nf4"] [--no-eager]

Calls run in CUDA graphs, each with another weight, and the weights together exceed the L2 cache several times;
medians. `roof` is the share of the time in which the machine's memory, as measured in the same run, could read the
bytes that the format stores. Eager calls are timed by the host's clock. Writes benches/results/gpu_linear.json.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from arguments import numbers, parse_for_gpu, shapes
from bitsandbytes_layers import MissingError, four_bit, stored_parts
from environment import save
from gpu_timing import copies_for, eager_seconds, fixed_seconds, graph_seconds, read_bandwidth
from lowbit_rs import QuantLinear, codebooks, quantize

BASELINE = "torch bf16"
_SHAPES = "4096x4096,14336x4096,4096x14336,8192x28672,1024x4096,6144x4096"
_TOKENS = "1,2,4,8,16,64,512"

#: What a call does, given x; and the bytes that it reads of the weight.
Call = Callable[[Tensor], object]


@dataclass(frozen=True)
class Rival:
    """``make`` takes a weight [N, K] in bf16 and gives a layer and the bytes that it stores; or raises MissingError."""

    name: str
    make: Callable[[Tensor], tuple[Call, int]]
    dtype: torch.dtype = torch.bfloat16


def dense(weight: Tensor) -> tuple[Call, int]:
    """torch's own product, without a module around it."""
    weight = weight.clone()
    return (lambda x: nn.functional.linear(x, weight)), weight.nbytes


def bitsandbytes(double_quant: bool) -> Callable[[Tensor], tuple[Call, int]]:
    """Linear4bit, NF4, block size 64."""

    def make(weight: Tensor) -> tuple[Call, int]:
        layer = four_bit(weight, "nf4", double_quant, device="cuda")
        return layer, sum(part.nbytes for part in stored_parts(layer))

    return make


def tinygemm(weight: Tensor) -> tuple[Call, int]:
    """torch.ops.aten._weight_int4pack_mm: int4 with a scale and a zero for 64 weights. The codes are random."""
    rows, cols = weight.shape
    codes = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(cols // 64, rows, 2, dtype=torch.bfloat16, device="cuda")
    return (lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, 64, scales)), codes.nbytes + scales.nbytes


def lowbit(**options: Any) -> Callable[[Tensor], tuple[Call, int]]:
    """QuantLinear with the given options of lowbit_rs.quantize."""

    def make(weight: Tensor) -> tuple[Call, int]:
        packed = quantize(weight, **options)
        return QuantLinear.from_packed(packed).eval(), packed.nbytes

    return make


RIVALS = (
    Rival("torch bf16", dense),
    Rival("bitsandbytes nf4", bitsandbytes(double_quant=False)),
    Rival("bitsandbytes nf4-dq", bitsandbytes(double_quant=True)),
    Rival("tinygemm int4-64", tinygemm),
    Rival("nf4", lowbit()),
    Rival("nf4-dq", lowbit(double_quant=True)),
    Rival("nf4, fp16 scales", lowbit(scale_dtype=torch.float16)),
    Rival("nf4-32", lowbit(block_size=32)),
    Rival("nf4-128", lowbit(block_size=128)),
    Rival("fp4", lowbit(format="fp4")),
    Rival("uint4", lowbit(format="uint4")),
    Rival("custom", lowbit(codebook=codebooks.block_optimal(64))),
    Rival("int8", lowbit(format="int8")),
    Rival("nf4, fp16 x", lowbit(), torch.float16),
    Rival("nf4, fp32 x", lowbit(), torch.float32),
)


@dataclass(frozen=True)
class Roof:
    """The least time of a product: a kernel that does nothing, and the bytes of the weight."""

    fixed_s: float
    bytes_per_second: float

    def seconds(self, count: int) -> float:
        """For ``count`` bytes."""
        return self.fixed_s + count / self.bytes_per_second


def main() -> None:
    """Measure, print a table for each shape, save."""
    arguments = _arguments()
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 170)
    roof = Roof(fixed_seconds(), read_bandwidth())
    device = torch.cuda.get_device_name()
    console.print(f"{device}: {roof.bytes_per_second / 1e12:.2f} TB/s read, {roof.fixed_s * 1e6:.1f} us a kernel")
    rows: list[dict[str, Any]] = []
    for shape in arguments.shapes:
        measured = measure_shape(shape, arguments, roof, console)
        rows += measured
        console.print(_table(measured, f"{shape[0]} x {shape[1]}: microseconds, and share of the roof", "graph_s"))
        if arguments.eager:
            console.print(_table(measured, f"{shape[0]} x {shape[1]}: microseconds of an eager call", "eager_s"))
    path = save(
        "gpu_linear",
        rows,
        device=device,
        read_bandwidth_bytes_per_second=roof.bytes_per_second,
        fixed_seconds=roof.fixed_s,
    )
    console.print(f"wrote {path}")


@torch.inference_mode()
def measure_shape(
    shape: tuple[int, int], arguments: argparse.Namespace, roof: Roof, console: Console
) -> list[dict[str, Any]]:
    """A row for each rival and number of tokens, for a weight [N, K]."""
    torch.manual_seed(0)
    weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16) / math.sqrt(shape[1])
    rows = []
    for rival in arguments.rivals:
        try:
            first, stored = rival.make(weight)
        except MissingError as error:
            console.print(f"{rival.name} is left out: {error}")
            continue
        calls = [first, *[rival.make(weight)[0] for _ in range(copies_for(stored) - 1)]]
        for tokens in arguments.tokens:
            x = torch.randn(tokens, shape[1], device="cuda", dtype=rival.dtype)
            rows.append(_measure(rival, weight, stored, calls, x, roof, arguments.eager))
        del calls, first
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def _measure(
    rival: Rival, weight: Tensor, stored: int, calls: list[Call], x: Tensor, roof: Roof, with_eager: bool
) -> dict[str, Any]:
    y = calls[0](x)
    exact = x.double() @ weight.double().T
    assert isinstance(y, Tensor)
    seconds = graph_seconds([lambda call=call: call(x) for call in calls])  # type: ignore[misc]
    return {
        "rival": rival.name,
        "shape": list(weight.shape),
        "tokens": x.shape[0],
        "dtype": str(x.dtype).removeprefix("torch."),
        "weight_bytes": stored,
        "graph_s": seconds,
        "roof": roof.seconds(stored) / seconds,
        "eager_s": eager_seconds(lambda: calls[0](x), 300) if with_eager and x.shape[0] <= 16 else None,
        "error": None if "tinygemm" in rival.name else float((y.double() - exact).norm() / exact.norm()),
    }


def _table(rows: list[dict[str, Any]], title: str, key: str) -> Table:
    """A line for each rival, a column or two for each number of tokens."""
    tokens = sorted({row["tokens"] for row in rows})
    cells = {(row["rival"], row["tokens"]): row for row in rows}
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("rival")
    table.add_column("MB", justify="right")
    table.add_column("error", justify="right")
    for count in tokens:
        table.add_column(f"M = {count}", justify="right")
        if key == "graph_s":
            table.add_column("", justify="right")
    for row in {row["rival"]: row for row in rows}.values():
        line = [row["rival"], f"{row['weight_bytes'] / 1e6:.1f}"]
        line.append("" if row["error"] is None else f"{row['error']:.4f}")
        for count in tokens:
            cell = cells[row["rival"], count]
            line.append("" if cell[key] is None else f"{cell[key] * 1e6:.1f}")
            if key == "graph_s":
                line.append(f"{cell['roof']:.0%}" if count <= 16 else "")
        table.add_row(*line)
    return table


def _arguments() -> argparse.Namespace:
    names = ", ".join(rival.name for rival in RIVALS)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", type=shapes, default=shapes(_SHAPES), help=f"N x K; by default {_SHAPES}")
    parser.add_argument("--tokens", type=numbers, default=numbers(_TOKENS), help=f"M; by default {_TOKENS}")
    parser.add_argument("--rivals", type=_rivals, default=list(RIVALS), help=f"by semicolons; by default all: {names}")
    parser.add_argument("--no-eager", dest="eager", action="store_false", help="CUDA graphs alone")
    return parse_for_gpu(parser)


def _rivals(text: str) -> list[Rival]:
    known = {rival.name: rival for rival in RIVALS}
    return [known[name.strip()] for name in text.split(";")]


if __name__ == "__main__":
    main()
