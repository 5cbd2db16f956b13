"""Packing and unpacking one large weight on a GPU, against the bandwidth of a copy measured in the same run.

    python benches/python/gpu_packing.py [--shape 14336x8192] [--dtype bf16]

Bytes are those read and written: the source and the packed weight. Calls run in CUDA graphs over several weights, so
packing is timed with nonfinite="propagate", which has nothing to tell the host. Writes
benches/results/gpu_packing.json.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import lowbit_rs
from arguments import parse_for_gpu
from bitsandbytes_layers import MissingError, bitsandbytes
from environment import save
from gpu_timing import copies_for, copy_bandwidth, eager_seconds, graph_seconds

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_SETTINGS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "nf4-dq": {"double_quant": True},
    "fp4": {"format": "fp4"},
    "int4-128": {"format": "int4", "block_size": 128},
    "uint4": {"format": "uint4"},
    "int8": {"format": "int8"},
    "int8 row": {"format": "int8", "block_size": "row"},
}


@torch.inference_mode()
def main() -> None:
    """Measure, print a table, save."""
    arguments = _arguments()
    bandwidth, dtype = copy_bandwidth(), _DTYPES[arguments.dtype]
    source = torch.randn(arguments.shape, device="cuda", dtype=dtype)
    weights = [source, *[source.clone() for _ in range(copies_for(source.nbytes) - 1)]]
    rows = [_measure(name, options, weights) for name, options in _SETTINGS.items()]
    rows += _bitsandbytes(weights)
    for row in rows:
        for direction in ("quantize", "dequantize"):
            seconds = row[f"{direction}_s"]
            row[f"{direction}_of_copy"] = None if seconds is None else row["bytes"] / seconds / bandwidth
    console = Console(markup=False, highlight=False)
    console.print(f"{torch.cuda.get_device_name()}: {bandwidth / 1e12:.2f} TB/s copied (read and written)")
    shape = "x".join(str(length) for length in arguments.shape)
    console.print(_table(rows, f"{shape} {arguments.dtype}: microseconds, and share of a copy's bandwidth"))
    more = {"device": torch.cuda.get_device_name(), "copy_bandwidth_bytes_per_second": bandwidth}
    console.print(f"wrote {save('gpu_packing', rows, shape=list(arguments.shape), dtype=arguments.dtype, **more)}")


def _measure(name: str, options: dict[str, Any], weights: list[torch.Tensor]) -> dict[str, Any]:
    packed = [lowbit_rs.quantize(weight, **options) for weight in weights]
    packs = [lambda weight=weight: lowbit_rs.quantize(weight, nonfinite="propagate", **options) for weight in weights]
    # Where a scale may overflow, packing waits for the kernel, which a graph cannot.
    can_be_captured = options.get("format") != "uint4"
    return {
        "setting": name,
        "bytes": weights[0].nbytes + packed[0].nbytes,
        "quantize_s": graph_seconds(packs) if can_be_captured else None,
        "dequantize_s": graph_seconds([part.dequantize for part in packed]),
    }


def _bitsandbytes(weights: list[torch.Tensor]) -> list[dict[str, Any]]:
    try:
        functional = bitsandbytes().functional
    except MissingError as error:
        print(f"bitsandbytes is left out: {error}")
        return []
    packed = [functional.quantize_4bit(weight, quant_type="nf4") for weight in weights]
    unpacks = [lambda part=part: functional.dequantize_4bit(*part) for part in packed]
    return [
        {
            "setting": "bitsandbytes nf4",
            "bytes": weights[0].nbytes + packed[0][0].nbytes + packed[0][1].absmax.nbytes,
            # It copies its table from the host, which a graph cannot; beside so long a kernel, calling costs nothing.
            "quantize_s": eager_seconds(lambda: functional.quantize_4bit(weights[0], quant_type="nf4"), 50),
            "dequantize_s": graph_seconds(unpacks),
        }
    ]


def _table(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("setting", "quantize", "", "dequantize", ""):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for row in rows:
        line = [row["setting"]]
        for direction in ("quantize", "dequantize"):
            seconds, share = row[f"{direction}_s"], row[f"{direction}_of_copy"]
            line += ["", ""] if seconds is None else [f"{seconds * 1e6:.1f}", f"{share:.0%}"]
        table.add_row(*line)
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", type=_shape, default=(14336, 8192), help="N x K; by default 14336x8192")
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16", help="of the weight")
    return parse_for_gpu(parser)


def _shape(text: str) -> tuple[int, int]:
    rows, cols = text.split("x")
    return int(rows), int(cols)


if __name__ == "__main__":
    main()
