"""Integers with a scale and a zero point a group, ``w = scale * (q - zero)``, as packed weights of the same values.

GPTQ, AWQ and compressed-tensors store such weights and differ in how they pack the integers. Scales are float16 or
bfloat16, and the libraries decode ``q - zero`` exactly, multiply and round once to that dtype. To be equal to the bit,
float32 must hold the product, of at most 11 + 9 bits, and so every part of it, exactly:

- With one zero point in the middle of the range (symmetric), codes are those of ``int4`` or ``int8`` and the scale is
  kept in its dtype: ``w = scale * (q - 8)``.
- With others, ``uint4`` has the scale and the shift ``-scale * zero`` in float32, in which both are exact, and so is
  their sum; ``uint8``, whose codes are stored less 128, has the shift ``scale * (128 - zero)``. A float16 shift would
  be rounded.

Where the scales of a file are float32 and zero points are not in the middle, the library's ``scale * (q - zero)`` and
our ``scale * q + shift`` are rounded in float32, and may differ by a step of float32 at ``scale * zero``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit_rs._native import Spec
from lowbit_rs.errors import unsupported
from lowbit_rs.packed import DTYPES, dtype_name, make_spec

#: dtypes of scales that are served.
SCALE_DTYPES = tuple(DTYPES.values())

_LARGEST_BLOCK, _SMALLEST_BLOCK = 4096, 16


def block_size_of(group_size: int, cols: int) -> int:
    """The block size that serves groups of ``group_size`` columns; 0 stands for a row.

    It is the largest power of two that divides a group, at most 4096: blocks of a group then share its scale. Raises
    Unsupported where that is less than 16.
    """
    if group_size >= cols:
        return 0
    block_size = min(group_size & -group_size, _LARGEST_BLOCK)
    if block_size < _SMALLEST_BLOCK:
        reason = "groups are a multiple of 16 columns, or a row"
        raise unsupported(f"group_size {group_size}", reason)
    return block_size


def per_block(groups: Tensor, group_size: int, cols: int) -> Tensor:
    """[N, groups] as [N, blocks]: the value of its group for each block of ``block_size_of``."""
    block_size = block_size_of(group_size, cols) or max(cols, 1)
    if block_size == group_size or groups.shape[1] == 1:
        return groups.contiguous()
    index = torch.arange(0, cols, block_size) // group_size
    return groups.index_select(1, index)


def spec_of(bits: int, zeros: Tensor | None, group_size: int, cols: int, scale_dtype: torch.dtype) -> Spec:
    """How such a weight is packed, from its zero points (any shape; ``None`` for symmetric ones)."""
    middle = 1 << (bits - 1)
    symmetric = zeros is None or bool((zeros == middle).all())
    block_size = block_size_of(group_size, cols)
    if symmetric:
        return make_spec((f"int{bits}", block_size, "row", False), dtype_name(scale_dtype, "scales"))
    return make_spec((f"uint{bits}", block_size, "row", False))


def tensors_of(
    spec: Spec, data: Tensor, scale: Tensor, zeros: Tensor | None, group_size: int, cols: int
) -> dict[str, Tensor]:
    """The tensors of a PackedWeight. ``data`` are packed codes; ``scale`` and ``zeros`` are [N, groups]."""
    if not spec.has_shift:
        return {"data": data, "scale": per_block(scale, group_size, cols)}
    assert zeros is not None
    scale = scale.float()
    code_of_zero = zeros.float() - 128 if spec.bits == 8 else zeros
    shift = -scale * code_of_zero
    return {
        "data": data,
        "scale": per_block(scale, group_size, cols),
        "shift": per_block(shift, group_size, cols),
    }


def little_endian_bytes(words: Tensor) -> Tensor:
    """int32 [R, C] as uint8 [R, C, 4], the lowest bits first."""
    rows, cols = words.shape
    return words.contiguous().view(torch.uint8).view(rows, cols, 4)


def integers(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., B] of one or two integers, the lower bits first, as uint8 [..., 8 B / bits]."""
    if bits == 8:
        return codes
    return torch.stack([codes & 15, codes >> 4], -1).flatten(-2)


def pack_rows(codes: Tensor, bits: int, cols: int, permutation: Tensor | None = None) -> Tensor:
    """uint8 [N, B] whose bytes have the integers of a row, the lower bits first, as packed codes of ``cols`` columns.

    With ``permutation``, column j of the codes is column ``permutation[j]`` of the bytes.
    """
    if permutation is not None:
        return pack_integers(integers(codes, bits).index_select(1, permutation), bits)
    if bits == 8:
        return pack_integers(codes[:, :cols], bits)
    swapped = (codes >> 4) | (codes << 4)  # our high nibble comes first
    packed = swapped[:, : -(-cols // 2)].contiguous()
    if cols % 2:  # as ours: the code of zero
        packed[:, -1] = packed[:, -1] & 0xF0 | 8
    return packed


def pack_integers(values: Tensor, bits: int) -> Tensor:
    """Integers, uint8 [N, K] with K even in 4 bits, as packed codes."""
    if bits == 8:
        return (values ^ 0x80).view(torch.int8).contiguous()
    return values[:, ::2] << 4 | values[:, 1::2]
