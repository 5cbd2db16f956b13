"""The table of `lowbit demo` for bitsandbytes: the same model, text, windows and timing loops, on the CPU.

    python benches/python/bitsandbytes_demo.py [--formats nf4,int8] [--windows 12] [--quick] [--threads 2]

Writes benches/results/bitsandbytes_demo.json. Needs the extras `demo` and `bench`.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import asdict, replace

import torch
from rich.console import Console
from torch import Tensor, nn

from bitsandbytes_layers import bitsandbytes, eight_bit, four_bit, path_taken, stored_parts
from environment import save
from lowbit_rs.demo import compare, report
from lowbit_rs.demo.model import NAME, load_model, load_tokenizer, model_file
from lowbit_rs.demo.report import Row
from lowbit_rs.demo.settings import ORIGINALS

BF16 = torch.bfloat16

FORMATS: dict[str, Callable[[Tensor], nn.Module]] = {
    "nf4": lambda weight: four_bit(weight, "nf4", compute_dtype=BF16),
    "nf4-dq": lambda weight: four_bit(weight, "nf4", double_quant=True, compute_dtype=BF16),
    "fp4": lambda weight: four_bit(weight, "fp4", compute_dtype=BF16),
    "int8": lambda weight: eight_bit(weight, threshold=6.0),
    "int8-threshold-0": lambda weight: eight_bit(weight, threshold=0.0),
}


def main() -> None:
    """Measure the original and each format, print the table, save it."""
    arguments = _arguments()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    budget = compare.QUICK if arguments.quick else compare.FULL
    if arguments.windows is not None:
        budget = replace(budget, windows=arguments.windows)
    original = load_model(model_file())
    meter = compare.Meter(compare.read_tokens(load_tokenizer(model_file()), budget), budget)
    for setting in ORIGINALS:
        compare.measure_setting(meter, original, setting)
    if arguments.from_bf16:
        original = original.to(dtype=BF16)
    paths = {}
    for name in arguments.formats.split(","):
        row, path = _measure(meter, original, name)
        paths[row.name] = path
        print(f"{row.label}: perplexity {row.perplexity:.3f}, {path}", flush=True)
    Console(markup=False, width=100).print(
        report.table(meter.rows, f"{NAME}, bitsandbytes {bitsandbytes().__version__}")
    )
    rows = [{**asdict(row), "path": paths.get(row.name)} for row in meter.rows]
    context = {"tokens": meter.tokens.numel(), "window": compare.WINDOW, "quantized_from_bf16": arguments.from_bf16}
    print("wrote", save("bitsandbytes_demo", rows, **context))


def _measure(meter: compare.Meter, original: nn.Module, name: str) -> tuple[Row, str]:
    """The row of a format, and the implementation that bitsandbytes took."""
    start = time.perf_counter()
    layers = {place: FORMATS[name](linear.weight.detach()) for place, linear in _linear_layers(original)}
    seconds = time.perf_counter() - start
    model = copy.deepcopy(original).to(dtype=BF16)
    for place, layer in layers.items():
        model.set_submodule(place, layer)
    stored = [stored_parts(layer) for layer in layers.values()]
    weights = sum(linear.weight.numel() for _, linear in _linear_layers(original))
    # Scales are no parameters here, and so not in what is measured as the size of the model.
    scales = sum(part.nbytes for parts in stored for part in parts[1:])
    row = meter.measure(
        model,
        name=f"bitsandbytes-{name}",
        label=f"bitsandbytes {name}",
        bits_per_weight=8 * sum(part.nbytes for parts in stored for part in parts) / weights,
        quantize_seconds=seconds,
    )
    meter.rows[-1] = replace(row, megabytes=row.megabytes + scales / 1e6)
    return meter.rows[-1], path_taken(next(iter(layers.values())))


def _linear_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """What lowbit_rs quantizes by default: all but the output layer. This model has no biases."""
    return [(name, it) for name, it in model.named_modules() if isinstance(it, nn.Linear) and name != "lm_head"]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--formats", default=",".join(FORMATS), help=f"of {', '.join(FORMATS)}")
    parser.add_argument("--windows", type=int, help=f"of the text's 12; by default {compare.FULL.windows}")
    parser.add_argument("--from-bf16", action="store_true", help="quantize bf16 weights; else fp32, as the demo does")
    parser.add_argument("--quick", action="store_true", help="less text, fewer repeats")
    parser.add_argument("--threads", type=int, help="by default as many as torch uses")
    return parser.parse_args()


if __name__ == "__main__":
    main()
