"""What activations in 8 bits cost the language model of the demo: perplexity on the CPU, int8 weights by row.

    python benches/python/int8_quality.py [--windows 12]

Writes benches/results/int8_quality.json. Needs the extra `demo`.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from typing import Any

import torch

import lowbit_rs
from environment import save
from lowbit_rs import _native
from lowbit_rs.demo import compare
from lowbit_rs.demo.evaluate import score
from lowbit_rs.demo.model import NAME, load_model, load_tokenizer, model_file

#: Name, activation, threshold; None packs nothing.
_SETTINGS: tuple[tuple[str, str | None, float | None], ...] = (
    ("original, bf16", None, None),
    ("W8A16", "none", None),
    ("W8A8, no threshold", "int8", None),
    ("W8A8, threshold 6", "int8", 6.0),
    ("auto, threshold 6", "auto", 6.0),
)


def main() -> None:
    """Measure each setting, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--windows", type=int, default=compare.FULL.windows, help="of text that are scored")
    budget = replace(compare.FULL, windows=parser.parse_args().windows)
    original = load_model(model_file()).to(dtype=torch.bfloat16)
    tokens = compare.read_tokens(load_tokenizer(model_file()), budget)
    rows: list[dict[str, Any]] = []
    for name, activation, threshold in _SETTINGS:
        model = copy.deepcopy(original)
        if activation is not None:
            options = {"activation": activation, "threshold": threshold, "progress": False}
            lowbit_rs.quantize_model(model, "int8", "row", **options)  # type: ignore[arg-type]
        perplexity = score(model, tokens, compare.WINDOW).perplexity
        first = rows[0]["perplexity"] if rows else perplexity
        rows.append({"setting": name, "perplexity": perplexity, "over_original": perplexity / first - 1})
        print(f"{name}: {perplexity:.3f}, {rows[-1]['over_original']:+.2%}", flush=True)
    print(f"wrote {save('int8_quality', rows, model=NAME, tokens=tokens.numel(), isa=_native.isa())}")


if __name__ == "__main__":
    main()
