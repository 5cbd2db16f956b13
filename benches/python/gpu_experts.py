"""Tokens times the experts that each has chosen, beside torch in bf16: CUDA graphs, weights that leave the cache.

    python benches/python/gpu_experts.py [--tokens 1,16,64,512,2048]

64 experts of 2048 x 1408, 6 of them for a token, drawn at random. torch's rivals are its grouped product, which takes
numbers of rows from the device as ours does, and a loop over the experts that have rows, which has to know them. Writes
benches/results/gpu_experts.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import lowbit_rs
from arguments import numbers, parse_for_gpu
from environment import save
from gpu_timing import copies_for, graph_seconds

_EXPERTS, _OUTPUTS, _INPUTS, _CHOSEN = 64, 2048, 1408, 6
_FORMATS: dict[str, dict[str, Any]] = {"nf4": {}, "nf4-dq": {"double_quant": True}}


def main() -> None:
    """Measure, print a table, save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=numbers, default=[1, 16, 64, 512, 2048])
    arguments = parse_for_gpu(parser)
    rows = [row for tokens in arguments.tokens for row in measure(tokens)]
    table = Table(*("tokens", "experts with rows", "way", "us", "torch's best / this"))
    for row in rows:
        best = min(other["graph_s"] for other in rows if other["tokens"] == row["tokens"] and "bf16" in other["way"])
        figures = f"{row['graph_s'] * 1e6:.1f}", f"{best / row['graph_s']:.2f}"
        table.add_row(str(row["tokens"]), str(row["experts"]), row["way"], *figures)
    Console(markup=False, highlight=False, width=100).print(table)
    more = {"shape": [_EXPERTS, _OUTPUTS, _INPUTS], "chosen": _CHOSEN, "device": torch.cuda.get_device_name()}
    print(f"wrote {save('gpu_experts', rows, **more)}")


@torch.no_grad()
def measure(tokens: int) -> list[dict[str, Any]]:
    """A row for each way."""
    torch.manual_seed(0)
    chosen = torch.stack([torch.randperm(_EXPERTS, device="cuda")[:_CHOSEN] for _ in range(tokens)])
    counts = torch.bincount(chosen.flatten(), minlength=_EXPERTS)
    x = torch.randn(tokens * _CHOSEN, _INPUTS, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(_EXPERTS, _OUTPUTS, _INPUTS, device="cuda", dtype=torch.bfloat16)
    ways: dict[str, list[Callable[[], object]]] = {}
    for name, options in _FORMATS.items():
        packed = lowbit_rs.quantize(weight, **options)
        copies = [packed, *(lowbit_rs.quantize(weight, **options) for _ in range(copies_for(packed.nbytes) - 1))]
        ways[name] = [packed_product(x, counts, copy) for copy in copies]
    stacks = [weight, *(weight.clone() for _ in range(copies_for(weight.nbytes) - 1))]
    ways["bf16 looped"] = [looped(x, counts.tolist(), stack) for stack in stacks]
    if hasattr(torch, "_grouped_mm"):
        ends = counts.cumsum(0).to(torch.int32)
        ways["bf16 grouped"] = [grouped(x, ends, stack) for stack in stacks]
    same = {"tokens": tokens, "experts": int((counts > 0).sum())}
    return [{**same, "way": name, "graph_s": graph_seconds(calls)} for name, calls in ways.items()]


def packed_product(x: Tensor, counts: Tensor, packed: lowbit_rs.PackedWeight) -> Callable[[], object]:
    """Ours."""
    multiply = torch.ops.lowbit_rs.linear_grouped.default
    return lambda: multiply(x, counts, packed.operands(), list(packed.shape), *packed.scheme, "none")


def grouped(x: Tensor, ends: Tensor, stack: Tensor) -> Callable[[], object]:
    """torch's grouped product."""
    return lambda: torch._grouped_mm(x, stack.transpose(1, 2), offs=ends)


def looped(x: Tensor, counts: list[int], stack: Tensor) -> Callable[[], object]:
    """A product for each expert that has rows."""
    parts = [(index, rows) for index, rows in enumerate(x.split(counts)) if len(rows)]
    out = x.new_empty(x.shape[0], stack.shape[1])
    targets = dict(enumerate(out.split(counts)))

    def call() -> None:
        for index, rows in parts:
            torch.mm(rows, stack[index].T, out=targets[index])

    return call


if __name__ == "__main__":
    main()
