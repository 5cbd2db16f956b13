"""Linear layers that are measured side by side: lowbit_rs and what it would replace.

A rival is a function that makes a ready layer of a weight. To add one, write the function and enter it in RIVALS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lowbit_rs
from bitsandbytes_layers import eight_bit, four_bit, path_taken, stored_parts
from lowbit_rs import codebooks


@dataclass(frozen=True)
class Rival:
    """A kind of layer. ``make`` takes a weight [N, K] in the dtype of the activations; it raises MissingError."""

    name: str
    make: Callable[[Tensor], nn.Module]
    #: Which implementation a layer takes, asked after it has been called.
    path: Callable[[Any], str] = lambda _layer: ""
    #: Bytes that a layer stores of its weight.
    weight_bytes: Callable[[Any], int] = lambda layer: sum(tensor.nbytes for tensor in layer.parameters())
    #: The dtype that activations are given in, where it is not the caller's choice.
    dtype: torch.dtype | None = None


def dense(weight: Tensor) -> nn.Module:
    """torch's own layer."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer.eval()


def lowbit(**options: Any) -> Callable[[Tensor], nn.Module]:
    """Makes QuantLinear with the given options of lowbit_rs.quantize."""

    def make(weight: Tensor) -> nn.Module:
        return lowbit_rs.QuantLinear.from_packed(lowbit_rs.quantize(weight, **options)).eval()

    return make


def stored_by_bitsandbytes(layer: Any) -> int:
    """Bytes of a weight of bitsandbytes, whose scales are no parameters."""
    return sum(part.nbytes for part in stored_parts(layer))


_BOF4_S_16 = {"block_size": 16, "double_quant": True, "signed_absmax": True}

RIVALS = (
    Rival("torch fp32", dense, dtype=torch.float32),
    Rival("torch bf16", dense, dtype=torch.bfloat16),
    Rival("bitsandbytes nf4", lambda weight: four_bit(weight, "nf4"), path_taken, stored_by_bitsandbytes),
    Rival("bitsandbytes int8", lambda weight: eight_bit(weight, threshold=0.0), path_taken, stored_by_bitsandbytes),
    Rival("nf4", lowbit(format="nf4")),
    Rival("nf4-dq", lowbit(format="nf4", double_quant=True)),
    Rival("bof4s-16-dq", lowbit(codebook=codebooks.block_optimal(16, signed=True), **_BOF4_S_16)),
    Rival("uint4-32", lowbit(format="uint4", block_size=32, scale_dtype=torch.float16)),
    Rival("int8", lowbit(format="int8")),
    Rival("int8-row", lowbit(format="int8", block_size="row")),
)
