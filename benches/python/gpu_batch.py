"""Linear layers with many tokens on a GPU: torch bf16, bitsandbytes and lowbit_rs, forward and backward, in one run.

    python benches/python/gpu_batch.py [--shapes 4096x4096] [--tokens 32,64] [--formats nf4] [--sweep 14336x4096]

Calls run in CUDA graphs, each with another weight, and the weights together exceed the L2 cache several times; medians.
"chosen" is what lowbit_rs does by itself; "packed" and "unpacked" are its two ways: the kernel that reads the packed
weight, and unpacking parts of it for torch's product. The sweep goes through 1 to 1024 tokens in steps of 8 and tells
by how much the time rises at most from one to the next. Writes benches/results/gpu_batch.json.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from arguments import numbers, parse_for_gpu, shapes
from bitsandbytes_layers import MissingError, four_bit
from environment import save
from gpu_timing import copies_for, graph_seconds
from lowbit_rs import PackedWeight, _native, quantize
from lowbit_rs._backends import cuda
from lowbit_rs._backends._memory import floats

_SHAPES = "4096x4096,14336x4096,4096x14336,8192x28672,6144x4096,5120x13824"
_TOKENS = "17,32,64,96,128,192,256,384,512,1024,2048,4096,8192"
_SWEEP = "14336x4096"
#: Tokens with which a product takes so long that fewer replays suffice.
_LONG = 1024

_FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "nf4-dq": {"double_quant": True},
    "nf4-32": {"block_size": 32},
    "uint4": {"format": "uint4"},
    "int8": {"format": "int8", "block_size": "row"},
}

#: What a call does, given x.
Call = Callable[[Tensor], object]


def views(packed: Sequence[PackedWeight]) -> list[Any]:
    """As the backend takes them."""
    return [cuda.view(weight.spec, weight.shape, list(weight.tensors().values())) for weight in packed]


def packed_call(view: Any) -> Call:
    """The kernel that reads the packed weight, also where unpacking is faster; raises where there is none."""

    def call(x: Tensor) -> Tensor:
        sizes = _native.cuda_batch_sizes(view, floats(x), x.shape[0], x.shape[1], True)
        if sizes is None:
            raise MissingError("no kernel takes this")
        return cuda.linear_batch(view, x, None, sizes)

    return call


def unpacked_call(view: Any) -> Call:
    """Parts of the weight unpacked, and torch's product."""

    def call(x: Tensor) -> Tensor:
        out = x.new_empty((x.shape[0], view.rows))
        cuda.linear_in_parts(view, x, None, out)
        return out

    return call


def seconds(calls: Sequence[Call], x: Tensor) -> float | None:
    """The time of a call; None where it cannot run."""
    try:
        calls[0](x)
    except MissingError:
        return None
    return graph_seconds([lambda call=call: call(x) for call in calls], 5 if x.shape[0] >= _LONG else 15)  # type: ignore[misc]


def dense_calls(weights: Sequence[Tensor], is_backward: bool) -> list[Call]:
    """torch's product with each weight, or with its transpose."""
    if is_backward:
        return [lambda x, w=weight: x @ w for weight in weights]  # type: ignore[misc]
    return [lambda x, w=weight: nn.functional.linear(x, w) for weight in weights]  # type: ignore[misc]


def bitsandbytes_calls(weight: Tensor, count: int, is_backward: bool) -> list[Call]:
    """bitsandbytes' NF4 layer, or the gradient to its input as its autograd function has it; none without it."""
    try:
        layers = [four_bit(weight, "nf4", device="cuda") for _ in range(count)]
    except MissingError:
        return []
    if not is_backward:
        return list(layers)
    import bitsandbytes.functional as functional

    def gradient(layer: Any) -> Call:
        return lambda grad: (
            grad @ functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(grad.dtype)
        )

    return [gradient(layer) for layer in layers]


@torch.inference_mode()
def measure(shape: tuple[int, int], tokens: Sequence[int], formats: Sequence[str]) -> list[dict[str, Any]]:
    """A row for every number of tokens and way, forward and backward."""
    torch.manual_seed(0)
    weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16) / math.sqrt(shape[1])
    count = min(copies_for(weight.numel() // 2), 24)
    rivals: list[tuple[str, str, list[Call]]] = []
    kept: list[list[PackedWeight]] = []
    dense = [weight, *[weight.clone() for _ in range(copies_for(weight.nbytes) - 1)]]
    for direction in ("forward", "backward"):
        is_backward = direction == "backward"
        rivals.append((direction, "torch bf16", dense_calls(dense, is_backward)))
        rivals.append((direction, "bitsandbytes nf4", bitsandbytes_calls(weight, count, is_backward)))
    for name in formats:
        packed = [quantize(weight, **_FORMATS[name]) for _ in range(count)]
        kept.append(packed)  # views borrow
        ways = views(packed)
        rivals.append(("forward", name, [lambda x, w=way: cuda.linear(w, x, None, "none", 0.0) for way in ways]))  # type: ignore[misc]
        rivals.append(("backward", name, [lambda x, w=way: cuda.linear_grad_input(w, x) for way in ways]))  # type: ignore[misc]
        if name == "nf4":
            rivals.append(("forward", "nf4 packed", [packed_call(way) for way in ways]))
            rivals.append(("forward", "nf4 unpacked", [unpacked_call(way) for way in ways]))
    rows = []
    for direction, rival, calls in rivals:
        for many in tokens:
            x = torch.randn(many, shape[direction == "forward"], device="cuda", dtype=torch.bfloat16)
            took = seconds(calls, x) if calls else None
            if took is not None:
                row = {"direction": direction, "rival": rival, "shape": list(shape), "tokens": many, "graph_s": took}
                rows.append(row)
    return rows


@torch.inference_mode()
def sweep(shape: tuple[int, int]) -> list[dict[str, Any]]:
    """NF4 at 1, 8, 16, ... 1024 tokens: what users get."""
    weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16) / math.sqrt(shape[1])
    count = min(copies_for(weight.numel() // 2), 24)
    packed = [quantize(weight) for _ in range(count)]
    ways = views(packed)
    rows = []
    for many in (1, *range(8, 1025, 8)):
        x = torch.randn(many, shape[1], device="cuda", dtype=torch.bfloat16)
        took = graph_seconds([lambda w=way, x=x: cuda.linear(w, x, None, "none", 0.0) for way in ways], 7)  # type: ignore[misc]
        rows.append({"direction": "sweep", "rival": "nf4", "shape": list(shape), "tokens": many, "graph_s": took})
    return rows


def table(rows: Sequence[dict[str, Any]], shape: tuple[int, int], direction: str) -> Table:
    """Microseconds, and times as fast as torch's bf16."""
    tokens = sorted({row["tokens"] for row in rows})
    cells = {(row["rival"], row["tokens"]): row["graph_s"] for row in rows if row["direction"] == direction}
    made = Table(title=f"{shape[0]} x {shape[1]} {direction}: microseconds, of bf16", title_justify="left")
    made.add_column("rival")
    for many in tokens:
        made.add_column(f"{many}", justify="right")
    for rival in dict.fromkeys(name for name, _ in cells):
        line = [rival]
        for many in tokens:
            took, base = cells.get((rival, many)), cells.get(("torch bf16", many))
            line.append("" if took is None or base is None else f"{took * 1e6:.1f} {base / took:.2f}")
        made.add_row(*line)
    return made


def tell_of_choices(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Where the way that is chosen takes longer than the other."""
    forward = [row for row in rows if row["direction"] == "forward"]
    times = {(row["rival"], (*row["shape"], row["tokens"])): row["graph_s"] for row in forward}
    worst = []
    for (rival, key), took in times.items():
        others = [times[way, key] for way in ("nf4 packed", "nf4 unpacked") if (way, key) in times]
        if rival == "nf4" and others:
            worst.append((took / min(others), key))
    for ratio, (n, k, many) in sorted(worst, reverse=True)[:5]:
        console.print(f"chosen / best {ratio:.3f} at {n}x{k}, {many} tokens")


def tell_of_cliffs(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """The largest rises from one number of tokens to the next."""
    taken = [(row["tokens"], row["graph_s"]) for row in rows]
    rises = [(b / a, m, n) for (m, a), (n, b) in itertools.pairwise(taken)]
    for rise, m, n in sorted(rises, reverse=True)[:5]:
        console.print(f"x {rise:.2f} from {m} to {n} tokens")


def main() -> None:
    """Measure, print, save."""
    arguments = _arguments()
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 190)
    console.print(torch.cuda.get_device_name())
    rows: list[dict[str, Any]] = []
    for shape in arguments.shapes:
        measured = measure(shape, arguments.tokens, arguments.formats)
        rows += measured
        for direction in ("forward", "backward"):
            console.print(table(measured, shape, direction))
        gc.collect()
        torch.cuda.empty_cache()
    tell_of_choices(rows, console)
    for shape in arguments.sweep:
        swept = sweep(shape)
        rows += swept
        tell_of_cliffs(swept, console)
    console.print(f"wrote {save('gpu_batch', rows, device=torch.cuda.get_device_name())}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", type=shapes, default=shapes(_SHAPES), help=f"N x K; by default {_SHAPES}")
    parser.add_argument("--tokens", type=numbers, default=numbers(_TOKENS), help=f"M; by default {_TOKENS}")
    parser.add_argument("--formats", type=_names, default=list(_FORMATS), help=f"by default {','.join(_FORMATS)}")
    parser.add_argument("--sweep", type=shapes, default=shapes(_SWEEP), help=f"N x K; by default {_SWEEP}")
    return parse_for_gpu(parser)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if _FORMATS[name] is not None]


if __name__ == "__main__":
    main()
