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
from bitsandbytes_layers import MissingError, eight_bit, four_bit, path_taken, stored_parts
from llama_layers import LlamaLinear
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
    #: Whether it gives the result of a linear layer, so that its error is one.
    is_linear: bool = True
    #: The dtype that activations are given in, where it is not the caller's choice.
    dtype: torch.dtype | None = None


def dense(weight: Tensor) -> nn.Module:
    """torch's own layer."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer.eval()


def lowbit(activation: str = "none", **options: Any) -> Callable[[Tensor], nn.Module]:
    """Makes QuantLinear with the given options of lowbit_rs.quantize."""

    def make(weight: Tensor) -> nn.Module:
        packed = lowbit_rs.quantize(weight, **options)
        return lowbit_rs.QuantLinear.from_packed(packed, activation=activation).eval()

    return make


class Int8Pack(nn.Module):
    """torch's weight-only int8 product, a bfloat16 scale a row."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        scale = weight.float().abs().amax(1) / 127
        codes = (weight.float() / scale[:, None]).round().to(torch.int8)
        self.weight, self.scale = nn.Parameter(codes, False), nn.Parameter(scale.bfloat16(), False)

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, K] in bfloat16."""
        y: Tensor = torch.ops.aten._weight_int8pack_mm(x, self.weight, self.scale)
        return y


class Int4Pack(nn.Module):
    """torch's 4-bit product, asymmetric in groups of 64."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        if weight.shape[0] % 16 or weight.shape[1] % 64:
            raise MissingError("torch's int4pack takes rows in sixteens and columns in groups of 64")
        groups = weight.float().unflatten(1, (-1, 64))
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        scale = (high - low) / 15
        codes = ((groups - low) / scale).round().clamp(0, 15).to(torch.int32).flatten(1)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        # w = scale * (code - 8) + zero
        both = torch.stack([scale[..., 0], (low + 8 * scale)[..., 0]], 2).transpose(0, 1).contiguous().bfloat16()
        self.weight, self.scales = nn.Parameter(packed, False), nn.Parameter(both, False)

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, K] in bfloat16."""
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.weight, 64, self.scales)
        return y


class IntMm(nn.Module):
    """torch's product of int8 with int8 alone: activations are quantized beforehand, the result is int32."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.scale = (weight.float().abs().amax() / 127).item()
        self.weight = nn.Parameter((weight.float() / self.scale).round().to(torch.int8), False)
        self.x: dict[int, tuple[Tensor, float]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """The int32 product for x [tokens, K], whose codes are kept from the first call."""
        if x.shape[0] not in self.x:
            step = (x.float().abs().amax() / 127).item()
            self.x[x.shape[0]] = (x.float() / step).round().to(torch.int8), step
        y: Tensor = torch._int_mm(self.x[x.shape[0]][0], self.weight.T)
        return y


def stored_by_bitsandbytes(layer: Any) -> int:
    """Bytes of a weight of bitsandbytes, whose scales are no parameters."""
    return sum(part.nbytes for part in stored_parts(layer))


def unfused(weight: Tensor) -> nn.Module:
    """bitsandbytes' NF4 as it runs without AVX-512 BF16: the weight is dequantized for every product."""
    return four_bit(weight, "nf4").train()


def stored_by_llama(layer: Any) -> int:
    """Bytes of a weight of llama.cpp."""
    return int(layer.codes.nbytes)


_BOF4_S_16: dict[str, Any] = {"block_size": 16, "double_quant": True, "signed_absmax": True}

RIVALS = (
    Rival("torch fp32", dense, dtype=torch.float32),
    Rival("torch bf16", dense, dtype=torch.bfloat16),
    Rival("bitsandbytes nf4", lambda weight: four_bit(weight, "nf4"), path_taken, stored_by_bitsandbytes),
    Rival("bitsandbytes nf4 unfused", unfused, path_taken, stored_by_bitsandbytes),
    Rival("bitsandbytes int8", lambda weight: eight_bit(weight, threshold=0.0), path_taken, stored_by_bitsandbytes),
    Rival("torch int8pack", Int8Pack, dtype=torch.bfloat16),
    Rival("torch int4pack", Int4Pack, dtype=torch.bfloat16),
    Rival(
        "llama.cpp Q4_0", lambda weight: LlamaLinear(weight, "q4_0"), weight_bytes=stored_by_llama, dtype=torch.float32
    ),
    Rival(
        "llama.cpp IQ4_NL",
        lambda weight: LlamaLinear(weight, "iq4_nl"),
        weight_bytes=stored_by_llama,
        dtype=torch.float32,
    ),
    Rival(
        "llama.cpp Q8_0", lambda weight: LlamaLinear(weight, "q8_0"), weight_bytes=stored_by_llama, dtype=torch.float32
    ),
    Rival("torch _int_mm", IntMm, dtype=torch.bfloat16, is_linear=False),
    Rival("nf4", lowbit(format="nf4")),
    Rival("nf4-dq", lowbit(format="nf4", double_quant=True)),
    Rival("bof4s-16-dq", lowbit(codebook=codebooks.block_optimal(16, signed=True), **_BOF4_S_16)),
    Rival("uint4", lowbit(format="uint4")),
    Rival("uint4-32", lowbit(format="uint4", block_size=32, scale_dtype=torch.float16)),
    Rival("int8", lowbit(format="int8")),
    Rival("int8-row", lowbit(format="int8", block_size="row")),
    Rival("nf4, activation int8", lowbit("int8", format="nf4")),
    Rival("int8-row, activation int8", lowbit("int8", format="int8", block_size="row")),
)
