"""Linear layers with int8 weights on a GPU side by side: torch bf16, bitsandbytes, torch._int_mm, lowbit_rs.

    python benches/python/gpu_int8.py [--shapes 4096x4096] [--tokens 1,2048] [--eager]

Calls run in CUDA graphs, each with another weight, and the weights together exceed the L2 cache several times; medians.
Activations are normal, without outliers or with some in 0.5 % of the columns. "product" is what follows the rounding of
activations, which several layers can share. torch._int_mm is a product alone: integers in, int32 out. A layer that
cannot be captured, as that of bitsandbytes with a threshold, is timed by eager calls in a row, and says so. Writes
benches/results/gpu_int8.json.
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
from bitsandbytes_layers import MissingError, bitsandbytes
from environment import save
from gpu_timing import copies_for, eager_seconds, graph_seconds
from lowbit_rs import QuantLinear, quantize
from lowbit_rs._backends import cuda
from lowbit_rs._ops import borrow

_SHAPES = "4096x4096,14336x4096,4096x14336,8192x28672"
_TOKENS = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096"
_OUTLIERS = 0.005

Call = Callable[[Tensor], object]


@dataclass(frozen=True)
class Rival:
    """``make`` takes a weight [N, K] in bf16 and gives a call and the bytes that it stores; or raises MissingError."""

    name: str
    make: Callable[[Tensor], tuple[Call, int]]
    has_outliers: bool = False
    dtype: torch.dtype = torch.bfloat16
    least_tokens: int = 1
    #: Whether a CUDA graph can hold it: what waits for the GPU cannot be captured.
    is_captured: bool = True


def dense(weight: Tensor) -> tuple[Call, int]:
    """torch's own product, without a module around it."""
    weight = weight.clone()
    return (lambda x: nn.functional.linear(x, weight)), weight.nbytes


def int_mm(weight: Tensor) -> tuple[Call, int]:
    """torch._int_mm of integers that were rounded before: cuBLAS, an int32 matrix as result."""
    codes = quantize(weight, "int8", "row").data
    rounded: dict[int, Tensor] = {}

    def call(x: Tensor) -> Tensor:
        if x.data_ptr() not in rounded:
            rounded[x.data_ptr()] = (x.float() * (127 / x.abs().amax())).round().to(torch.int8)
        return torch._int_mm(rounded[x.data_ptr()], codes.T)

    return call, codes.nbytes


def theirs(threshold: float) -> Callable[[Tensor], tuple[Call, int]]:
    """bitsandbytes' Linear8bitLt, which takes fp16."""

    def make(weight: Tensor) -> tuple[Call, int]:
        rows, cols = weight.shape
        kind = bitsandbytes().nn.Linear8bitLt
        layer = kind(cols, rows, bias=False, has_fp16_weights=False, threshold=threshold)
        layer.load_state_dict({"weight": weight.half().cpu()})
        return layer.to("cuda").eval(), weight.numel()

    return make


def ours(activation: str, threshold: float | None) -> Callable[[Tensor], tuple[Call, int]]:
    """QuantLinear, int8 by row."""

    def make(weight: Tensor) -> tuple[Call, int]:
        packed = quantize(weight, "int8", "row")
        layer = QuantLinear.from_packed(packed, activation=activation, threshold=threshold)
        return layer.eval(), packed.nbytes

    return make


def product(weight: Tensor) -> tuple[Call, int]:
    """The product of lowbit_rs alone, with activations that were rounded before."""
    packed = quantize(weight, "int8", "row")
    _, view = borrow(packed.operands(), packed.shape, packed.scheme)
    rounded: dict[int, cuda.Int8Rows] = {}

    def call(x: Tensor) -> Tensor:
        if x.data_ptr() not in rounded:
            rounded[x.data_ptr()] = cuda.round_rows(x, 0.0)
        return cuda.linear_int8(view, x, rounded[x.data_ptr()], None)

    call.packed = packed  # type: ignore[attr-defined]  # keeps what the view borrows
    return call, packed.nbytes


RIVALS = (
    Rival("torch bf16", dense),
    Rival("torch._int_mm", int_mm, least_tokens=32),
    Rival("bitsandbytes, threshold 0", theirs(0.0), dtype=torch.float16),
    Rival("bitsandbytes, threshold 6", theirs(6.0), has_outliers=True, dtype=torch.float16, is_captured=False),
    Rival("W8A16", ours("none", None)),
    Rival("W8A8", ours("int8", None), least_tokens=17),
    Rival("W8A8, product", product, least_tokens=17),
    Rival("W8A8, threshold 6", ours("int8", 6.0), least_tokens=17),
    Rival("W8A8, threshold 6, outliers", ours("int8", 6.0), has_outliers=True, least_tokens=17),
    Rival("auto, threshold 6, outliers", ours("auto", 6.0), has_outliers=True),
)


def main() -> None:
    """Measure, print a table for each shape, save."""
    arguments = _arguments()
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 200)
    device = torch.cuda.get_device_name()
    rows: list[dict[str, Any]] = []
    for shape in arguments.shapes:
        measured = measure_shape(shape, arguments, console)
        rows += measured
        console.print(_table(measured, f"{shape[0]} x {shape[1]} on {device}: microseconds"))
    console.print(f"wrote {save('gpu_int8', rows, device=device)}")


@torch.inference_mode()
def measure_shape(shape: tuple[int, int], arguments: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """A row for each rival and number of tokens, for a weight [N, K]."""
    torch.manual_seed(0)
    weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16) / math.sqrt(shape[1])
    rows = []
    for rival in RIVALS:
        try:
            first, stored = rival.make(weight)
        except MissingError as error:
            console.print(f"{rival.name} is left out: {error}")
            continue
        calls = [first, *[rival.make(weight)[0] for _ in range(copies_for(stored) - 1)]]
        for tokens in (count for count in arguments.tokens if count >= rival.least_tokens):
            x = activations(tokens, shape[1], rival)
            seconds, how = _time(rival, calls[: len(calls) if tokens <= 512 else 6], x)
            eager = eager_seconds(lambda calls=calls, x=x: calls[0](x), 200) if arguments.eager else None  # type: ignore[misc]
            row = {"rival": rival.name, "shape": list(shape), "tokens": tokens, "seconds": seconds, "timed": how}
            rows.append({**row, "eager_s": eager, "outlier_columns": _OUTLIERS if rival.has_outliers else 0.0})
        del calls, first
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def activations(tokens: int, cols: int, rival: Rival) -> Tensor:
    """Normal numbers below the threshold, and for some rivals outliers in a few columns."""
    x = torch.randn(tokens, cols, device="cuda").clamp(-5, 5)
    if rival.has_outliers:
        columns = torch.randperm(cols, device="cuda")[: max(1, round(cols * _OUTLIERS))]
        x[::3, columns] = 40 * torch.randn(len(x[::3]), len(columns), device="cuda").sign()
    return x.to(rival.dtype)


def _time(rival: Rival, calls: list[Call], x: Tensor) -> tuple[float, str]:
    """The time of a call in a graph, or where it cannot be captured that of eager calls in a row."""
    for call in calls:
        call(x)
    torch.cuda.synchronize()
    if rival.is_captured:
        return graph_seconds([lambda call=call: call(x) for call in calls], 12), "graph"  # type: ignore[misc]
    return eager_seconds(lambda: calls[0](x), 60), "eager"


def _table(rows: list[dict[str, Any]], title: str) -> Table:
    tokens = sorted({row["tokens"] for row in rows})
    cells = {(row["rival"], row["tokens"]): row for row in rows}
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("rival")
    for count in tokens:
        table.add_column(f"M = {count}", justify="right")
    for rival in dict.fromkeys(row["rival"] for row in rows):
        found = [cells.get((rival, count)) for count in tokens]
        marks = ["" if row is None else "*" if row["timed"] == "eager" else "" for row in found]
        texts = ["" if row is None else f"{row['seconds'] * 1e6:.1f}" for row in found]
        table.add_row(rival, *[text + mark for text, mark in zip(texts, marks, strict=True)])
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", type=shapes, default=shapes(_SHAPES), help=f"N x K; by default {_SHAPES}")
    parser.add_argument("--tokens", type=numbers, default=numbers(_TOKENS), help=f"M; by default {_TOKENS}")
    parser.add_argument("--eager", action="store_true", help="also times eager calls")
    return parse_for_gpu(parser)


if __name__ == "__main__":
    main()
