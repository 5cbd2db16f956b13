"""What activations in 8 bits cost the language model of the demo: perplexity on the CPU, int8 weights by row.

    python benches/python/int8_quality.py [--windows 12]

Beside it bitsandbytes with the same thresholds, where it is installed, and activations rounded in front of some layers
only, to tell where the cost comes from. Writes benches/results/int8_quality.json. Needs the extra `demo`.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import lowbit_rs
from bitsandbytes_layers import MissingError, eight_bit, replace_layers
from environment import save
from lowbit_rs import _native
from lowbit_rs.demo import compare
from lowbit_rs.demo.evaluate import score
from lowbit_rs.demo.model import NAME, load_model, load_tokenizer, model_file

_Pack = Callable[[nn.Module], object]


def _lowbit(activation: str = "none", threshold: float | None = 6.0, only: tuple[str, ...] = ("",)) -> _Pack:
    """Packs all layers, and rounds activations in front of those whose names end so."""

    def pack(model: nn.Module) -> None:
        options = {"activation": activation, "threshold": threshold, "progress": False}
        lowbit_rs.quantize_model(model, "int8", "row", **options)  # type: ignore[arg-type]
        for name, layer in model.named_modules():
            if isinstance(layer, lowbit_rs.QuantLinear) and not name.endswith(only):
                layer.activation = "none"

    return pack


def _bitsandbytes(threshold: float) -> _Pack:
    return lambda model: replace_layers(model, lambda weight: eight_bit(weight, threshold))


_SETTINGS: dict[str, _Pack] = {
    "original, bf16": lambda _: None,
    "W8A16": _lowbit(),
    "W8A8, no threshold": _lowbit("int8", None),
    "W8A8, threshold 6": _lowbit("int8", 6.0),
    "W8A8, threshold 3": _lowbit("int8", 3.0),
    "auto, threshold 6": _lowbit("auto", 6.0),
    "bitsandbytes, no threshold": _bitsandbytes(0.0),
    "bitsandbytes, threshold 6": _bitsandbytes(6.0),
    "A8 of q, k, v alone, threshold 6": _lowbit("int8", 6.0, ("q_proj", "k_proj", "v_proj")),
    "A8 of o alone, threshold 6": _lowbit("int8", 6.0, ("o_proj",)),
    "A8 of gate and up alone, threshold 6": _lowbit("int8", 6.0, ("gate_proj", "up_proj")),
    "A8 of down alone, threshold 6": _lowbit("int8", 6.0, ("down_proj",)),
}


def main() -> None:
    """Measure each setting, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--windows", type=int, default=compare.FULL.windows, help="of text that are scored")
    budget = replace(compare.FULL, windows=parser.parse_args().windows)
    original = load_model(model_file()).to(dtype=torch.bfloat16)
    tokens = compare.read_tokens(load_tokenizer(model_file()), budget)
    rows: list[dict[str, Any]] = []
    for name, pack in _SETTINGS.items():
        model = copy.deepcopy(original)
        try:
            pack(model)
        except MissingError as error:
            print(f"{name} is left out: {error}")
            continue
        perplexity = score(model, tokens, compare.WINDOW).perplexity
        first = rows[0]["perplexity"] if rows else perplexity
        rows.append({"setting": name, "perplexity": perplexity, "over_original": perplexity / first - 1})
        print(f"{name}: {perplexity:.3f}, {rows[-1]['over_original']:+.2%}", flush=True)
    print(f"wrote {save('int8_quality', rows, model=NAME, tokens=tokens.numel(), isa=_native.isa())}")


if __name__ == "__main__":
    main()
