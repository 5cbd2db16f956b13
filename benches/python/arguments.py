"""Arguments that benchmarks have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def shapes(text: str) -> list[tuple[int, int]]:
    """Pairs N x K, as "4096x4096,14336x4096"; none for an empty text."""
    pairs = (part.split("x") for part in text.split(",") if part)
    return [(int(n), int(k)) for n, k in pairs]


def numbers(text: str) -> list[int]:
    """Whole numbers, as "1,16,64"."""
    return [int(part) for part in text.split(",")]


def parse_for_gpu(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; ends the script, and says so, where there is no GPU."""
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(0, f"{Path(parser.prog).stem}: torch finds no GPU\n")
    return arguments
