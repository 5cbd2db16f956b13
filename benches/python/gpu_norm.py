"""RMSNorm and LayerNorm on a GPU, against torch in eager mode and torch.compile, and a copy of the same rows.

    python benches/python/gpu_norm.py [--dtype bf16] [--widths 4096 8192] [--rows 1 16 256 4096]

Calls run in CUDA graphs over several inputs, and every result is kept, so that neither is in the cache from the call
before. The norm is Llama's (the product after the cast), with and without the addition of a residual before it, and
LayerNorm. "int8" is the result and its rows in int8; "gradient" is a norm and its gradient to x, "all gradients" those
to weight and bias as well. Writes benches/results/gpu_norm.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from arguments import parse_for_gpu
from environment import save
from gpu_timing import copy_bandwidth, graph_seconds
from lowbit_rs._backends import cuda
from lowbit_rs.nn import LayerNorm, RMSNorm

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: Bytes between two uses of an input, and most inputs.
_ROTATED, _MOST_INPUTS = 320 << 20, 160
_EPS = 1e-5

_Function = Callable[..., Any]
_Inputs = Sequence[tuple[Tensor, ...]]


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _EPS)).to(x.dtype)


def _rms_residual(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _rms(total, weight), total


def _layer(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, (x.shape[-1],), weight, weight, _EPS)


def _rms_int8(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = _rms(x, weight)
    scale = y.abs().amax(-1, keepdim=True).float() / 127
    return y, torch.round(y / scale).to(torch.int8), scale


@torch.inference_mode()
def main() -> None:
    """Measure, print a table, save."""
    arguments = _arguments()
    bandwidth, rows = copy_bandwidth(), []
    for width in arguments.widths:
        for count in arguments.rows:
            torch._dynamo.reset()
            rows += _measure(width, count, _DTYPES[arguments.dtype])
    console = Console(markup=False, highlight=False)
    console.print(f"{torch.cuda.get_device_name()}: {bandwidth / 1e12:.2f} TB/s copied (read and written)")
    console.print(_table(rows, arguments.dtype))
    more = {"device": torch.cuda.get_device_name(), "copy_bandwidth_bytes_per_second": bandwidth}
    console.print(f"wrote {save('gpu_norm', rows, dtype=arguments.dtype, **more)}")


def _measure(width: int, count: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    bytes_each = count * width * dtype.itemsize
    inputs = max(2, min(_MOST_INPUTS, -(-_ROTATED // (2 * bytes_each))))
    xs = [torch.randn(count, width, device="cuda", dtype=dtype) for _ in range(inputs)]
    residuals = xs[1:] + xs[:1]
    weight = torch.randn(width, device="cuda", dtype=dtype)
    rms = RMSNorm(width, _EPS, device="cuda", dtype=dtype, cast_before_weight=True)
    layer = LayerNorm(width, _EPS, device="cuda", dtype=dtype)
    for norm in (rms, layer):
        for parameter in norm.parameters():
            parameter.copy_(weight)
    alone: _Inputs = [(x,) for x in xs]
    pairs: _Inputs = list(zip(xs, residuals, strict=True))
    columns = (weight,)
    cases: dict[str, tuple[_Inputs, float, _Function, _Function]] = {
        "rms": (alone, 2, rms, _rms),
        "rms + residual": (pairs, 4, rms, _rms_residual),
        "layer": (alone, 2, layer, _layer),
        "rms, int8": (alone, 2.5, lambda x: cuda.norm_rounded(x, None, weight, None, rms.kind, 0.0), _rms_int8),
    }
    copied = _seconds(torch.clone, alone, ())
    forward = [
        {
            "norm": name,
            "width": width,
            "rows": count,
            "bytes": passes * bytes_each,
            "lowbit_s": _seconds(mine, tensors, ()),
            "compile_s": _seconds(torch.compile(theirs, dynamic=False), tensors, columns),
            "eager_s": _seconds(theirs, tensors, columns),
            "copy_s": copied * passes / 2,
        }
        for name, (tensors, passes, mine, theirs) in cases.items()
    ]
    return forward + _measure_gradients(xs, weight, rms, layer, copied)


@torch.inference_mode(False)
def _measure_gradients(
    xs: Sequence[Tensor], weight: Tensor, rms: RMSNorm, layer: LayerNorm, copied: float
) -> list[dict[str, Any]]:
    rows = []
    grad = torch.randn_like(xs[0]).clone()
    inputs = [x.clone().requires_grad_() for x in xs]
    for frozen in (True, False):
        columns = (weight.clone().requires_grad_(not frozen),)
        for norm in (rms, layer):
            for name, parameter in list(norm.named_parameters()):
                setattr(norm, name, torch.nn.Parameter(parameter.detach().clone(), requires_grad=not frozen))
        for name, mine, theirs in (("rms", rms, _rms), ("layer", layer, _layer)):
            compiled = torch.compile(theirs, dynamic=False)
            times = {
                "lowbit_s": _gradient_seconds(mine, inputs, tuple(mine.parameters()), (), grad),
                "compile_s": _gradient_seconds(compiled, inputs, columns, columns, grad),
                "eager_s": _gradient_seconds(theirs, inputs, columns, columns, grad),
            }
            label = f"{name}, {'gradient' if frozen else 'all gradients'}"
            shape = {"norm": label, "width": grad.shape[1], "rows": grad.shape[0], "bytes": 5 * grad.nbytes}
            rows.append({**shape, **times, "copy_s": copied * 2.5})
    return rows


def _gradient_seconds(
    function: _Function, inputs: Sequence[Tensor], wanted: tuple[Tensor, ...], columns: tuple[Tensor, ...], grad: Tensor
) -> float:
    kept: list[Any] = []

    def call(x: Tensor) -> None:
        sources = [x, *(column for column in wanted if column.requires_grad)]
        kept.append(torch.autograd.grad(function(x, *columns), sources, grad))

    return graph_seconds([partial(call, x) for x in inputs])


def _seconds(function: _Function, inputs: _Inputs, columns: tuple[Tensor, ...]) -> float:
    kept: list[Any] = []

    def call(tensors: tuple[Tensor, ...]) -> None:
        kept.append(function(*tensors, *columns))

    return graph_seconds([partial(call, tensors) for tensors in inputs])


def _table(rows: list[dict[str, Any]], dtype: str) -> Table:
    title = f"{dtype}: microseconds, the share of a copy's speed over the same bytes, and how many times as fast"
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("norm", "width", "rows", "lowbit", "of copy", "compile", "", "eager", ""):
        table.add_column(column, justify="left" if column == "norm" else "right")
    for row in rows:
        mine = row["lowbit_s"]
        line = [row["norm"], str(row["width"]), str(row["rows"]), f"{mine * 1e6:.2f}", f"{row['copy_s'] / mine:.0%}"]
        for rival in ("compile_s", "eager_s"):
            line += [f"{row[rival] * 1e6:.2f}", f"{row[rival] / mine:.2f}x"]
        table.add_row(*line)
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16")
    parser.add_argument("--widths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256, 4096])
    return parse_for_gpu(parser)


if __name__ == "__main__":
    main()
