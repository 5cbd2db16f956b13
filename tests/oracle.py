"""The definition of packed weights, spelled out in torch and float64: what the fast code is held to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowbit_rs import PackedWeight, codebooks
from lowbit_rs._native import Spec


@dataclass(frozen=True)
class Codebook:
    """The values of codes, their limit (where a block's absolute maximum is mapped) and their covering radius."""

    values: Tensor
    limit: float
    radius: float


def codebook_of(spec: Spec, custom: Tensor | None) -> Codebook:
    """The table of a format in float64; `radius` is the largest |u - nearest value| for |u| <= limit, over the limit.

    uint4 sees u in [0, limit] alone.
    """
    if spec.bits == 8:
        return Codebook(torch.arange(-127, 128, dtype=torch.float64), 127.0, 0.5 / 127)
    if spec.format == "uint4":
        return Codebook(torch.arange(16, dtype=torch.float64), 15.0, 0.5 / 15)
    tables = {"nf4": codebooks.nf4, "fp4": codebooks.fp4, "int4": codebooks.int4}
    table = np.asarray(tables[spec.format]() if custom is None else custom, dtype=np.float64)
    low, high = float(table.min()), float(table.max())
    if low >= -1 and high <= 1:
        limit = 1.0
    else:
        limit = min(-low, high) if low < 0 < high else max(-low, high)
    gaps = np.diff(np.sort(table)) / 2
    radius = max(float(gaps.max()), limit - high, limit + low) / limit
    # bitsandbytes' FP4 thresholds are decimal literals, up to 4e-7 from the midpoints of the table.
    return Codebook(torch.from_numpy(table), limit, radius + (4e-7 if spec.format == "fp4" else 0))


def codes(packed: PackedWeight) -> Tensor:
    """The code of every weight, int64 in the shape of the weight; 8-bit codes with their sign."""
    *leading, cols = packed.shape
    if packed.spec.bits == 8:
        return packed.data.to(torch.int64).reshape(packed.shape)
    nibbles = torch.stack([packed.data >> 4, packed.data & 15], -1).flatten(-2).to(torch.int64)
    if packed.data.dim() == 1:
        return nibbles[: packed.shape.numel()].reshape(packed.shape)
    return nibbles.reshape(*leading, -1)[..., :cols]


def scales(packed: PackedWeight) -> Tensor:
    """The fp32 scale of every block, double quantization undone with two fp32 roundings."""
    if packed.scale_2 is None or packed.scale_offset is None:
        return packed.scale.float()
    table = torch.from_numpy(np.asarray(codebooks.dynamic_map()))
    flat = packed.scale.flatten().long()
    restored = table[flat] * packed.scale_2.repeat_interleave(256)[: flat.numel()] + packed.scale_offset
    return restored.reshape(packed.scale.shape)


def per_weight(packed: PackedWeight, per_block: Tensor) -> Tensor:
    """A number per block, repeated for each of its weights."""
    rows, cols = math.prod(packed.shape[:-1]), packed.shape[-1]
    size = packed.spec.block_size
    width = max(cols, 1) if size == "row" else int(size)
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    index = (row * cols + col) // width if packed.scale.dim() == 1 else row * -(-cols // width) + col // width
    return per_block.flatten()[index].reshape(packed.shape)


def dequantize(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """``scale * codebook[code] + shift`` with one rounding to fp32, and one to ``dtype``.

    In float64 the product of two fp32 numbers is exact.
    """
    indices = codes(packed)
    if packed.spec.bits == 8:
        values = indices.double()
    else:
        values = codebook_of(packed.spec, packed.codebook).values[indices]
    weights = values * per_weight(packed, scales(packed)).double()
    if packed.shift is not None:
        weights = sum_to_odd(weights, per_weight(packed, packed.shift.float()).double())
    return weights.float().to(dtype)


def sum_to_odd(a: Tensor, b: Tensor) -> Tensor:
    """``a + b`` in float64, an inexact sum being rounded to the neighbour with an odd last bit.

    Rounding that to fp32 gives what rounding the exact sum would (Boldo and Melquiond, When double rounding is odd).
    """
    total = a + b
    rest = (a - (total - (total - a))) + (b - (total - a))
    toward = torch.where(rest > 0, torch.inf, -torch.inf).to(torch.float64)
    is_even = (total.view(torch.int64) & 1) == 0
    return torch.where((rest != 0) & is_even, torch.nextafter(total, toward), total)


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to ``dtype`` in its normal range."""
    return torch.finfo(dtype).eps / 2


def half_step(dtype: torch.dtype) -> float:
    """The largest absolute error of rounding to ``dtype`` below its normal range."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2


#: Relative error of a weight in tiles of 16-bit numbers (docs/cpu.md): rounded to bfloat16 beside activations in it,
#: split in two parts beside float16.
_TILE_ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-13}


def weight_rounding(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The largest error of a weight [N, K] that is multiplied with activations or gradients in ``dtype``.

    That of tiles, or half a step of a codebook in 14 bits of its largest value.
    """
    tiles = packed.dequantize(torch.float32).double().abs() * _TILE_ROUNDING[dtype]
    if dtype == torch.float32 or packed.spec.bits == 8:
        return tiles
    largest = codebook_of(packed.spec, packed.codebook).values.abs().max()
    half_steps = per_weight(packed, scales(packed).double().abs()) * largest * (0.5 / 8191)
    return torch.maximum(tiles, half_steps)


def factor_rounding(packed: PackedWeight, x: Tensor) -> Tensor:
    """By how much rounding the factors of products may change ``x @ W.T``, for x [tokens, K]: [tokens, N].

    Beside that of weights, activations in 16 bits may be rounded to 14 bits of the largest of 16 neighbours.
    """
    total: Tensor = x.double().abs() @ weight_rounding(packed, x.dtype).T
    if x.dtype == torch.float32:
        return total
    padded = torch.nn.functional.pad(x.double().abs(), (0, -x.shape[1] % 16))
    largest = padded.unflatten(1, (-1, 16)).amax(2).repeat_interleave(16, 1)[:, : x.shape[1]]
    magnitude = packed.dequantize(torch.float32).double().abs()
    if packed.shift is not None:
        magnitude += per_weight(packed, packed.shift.double().abs())
    rounded: Tensor = (largest * 0.5 / 8192) @ magnitude.T
    return total + rounded


@dataclass(frozen=True)
class Int8Product:
    """``LLM.int8()`` by its definition (arXiv 2208.07339): the product in float64, and what it was made of."""

    y: Tensor
    codes: Tensor
    scales: Tensor
    columns: Tensor
    #: What fp32 sums of the same terms, in any order, may be off by.
    error: Tensor


def linear_int8(packed: PackedWeight, x: Tensor, threshold: float) -> Int8Product:
    """x [tokens, K] in int8 with a scale a row times a weight in int8 by row: [tokens, N].

    A number is an outlier unless its magnitude is below the threshold, 0 being none. Columns with an outlier in any row
    are multiplied as they are; a row's scale is the largest of its other magnitudes over 127.
    """
    values = x.float()
    is_outlier = ~(values.abs() < (threshold or math.inf))
    absmax = values.abs().masked_fill(is_outlier, 0).amax(1, keepdim=True)
    # `127 / absmax` would be the reciprocal times 127, rounded twice.
    scales, inverse = absmax / 127, torch.full_like(absmax, 127) / absmax
    rounded = torch.where(inverse.isfinite(), values.masked_fill(is_outlier, 0) * inverse, 0).round()
    scales = torch.where(inverse.isfinite(), scales, 0)
    columns = is_outlier.any(0).nonzero().flatten()
    rounded[:, columns] = 0
    factors = rounded.double() * scales.double()
    factors[:, columns] = values[:, columns].double()
    weights = codes(packed).double() * packed.scale.double()
    magnitude = factors.abs() @ weights.abs().T
    return Int8Product(factors @ weights.T, rounded, scales, columns, (x.shape[1] + 16) * 2.0**-24 * magnitude)
