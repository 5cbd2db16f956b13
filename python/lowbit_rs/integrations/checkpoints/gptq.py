"""GPTQ in 4 and 8 bits, as AutoGPTQ and GPTQModel write it.

A linear layer ``Y`` of K inputs and N outputs is stored as

    Y.qweight   int32 [K bits / 32, N], integers along K, the lowest bits first
    Y.qzeros    int32 [groups, N bits / 32], zero points along N, the lowest bits first
    Y.scales    float16 or bfloat16 [groups, N]
    Y.g_idx     int32 [K], the group of each column; may be missing where columns are in order

and decodes to w = scale * (q - zero). ``checkpoint_format`` "gptq" (v1, and the one where none is named) stores words
of zero points that are short of 1 in each place, "gptq_v2" the words themselves. With desc_act columns were quantized
in the order of their activations: g_idx is not ascending, and the weight gets a permutation that sorts it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_rs.errors import invalid, unsupported
from lowbit_rs.files.safetensors_format import brief

from .affine import SCALE_DTYPES, integers, little_endian_bytes, pack_rows, spec_of, tensors_of
from .source import ForeignWeight, Quantization, TensorSource, foreign_weight

#: A one in each place of a word.
_ONES = {4: 0x11111111, 8: 0x01010101}

_FORMATS = ("gptq", "gptq_v2")


def read(source: TensorSource, quantization: Quantization) -> Iterator[ForeignWeight]:
    """The quantized weights of a GPTQ checkpoint."""
    format = quantization.get("checkpoint_format", "format", default="gptq")
    if quantization.get("is_marlin_format"):
        format = "marlin"
    if format not in _FORMATS:
        raise unsupported(f"checkpoint_format {brief(format)}", f"served are {' and '.join(_FORMATS)}")
    for name in source.infos:
        if name.endswith(".qweight"):
            yield _read_layer(source, quantization, name.removesuffix(".qweight"), first=format == "gptq")


@dataclass(frozen=True)
class _Grouping:
    """Which columns share a scale: ``group_size`` neighbours, after ``permutation`` (int32 [K]) where there is one."""

    group_size: int
    permutation: Tensor | None = None


def _read_layer(source: TensorSource, quantization: Quantization, module: str, *, first: bool) -> ForeignWeight:
    weight_name, zeros_name, scales_name = (f"{module}.{part}" for part in ("qweight", "qzeros", "scales"))
    words, rows = source.expect(weight_name, (torch.int32,), None, None).shape
    groups = source.expect(scales_name, SCALE_DTYPES, None, rows).shape[0]
    g_idx = source.read(f"{module}.g_idx") if f"{module}.g_idx" in source.infos else None
    bits = _bits(quantization, module, words, g_idx)
    cols = words * 32 // bits
    source.expect(zeros_name, (torch.int32,), groups, -(-rows * bits // 32))
    grouping = _grouping(quantization, module, cols, groups, g_idx)
    zeros = _zeros(source.read(zeros_name), bits, rows, first=first)
    scale_dtype = source.read(scales_name).dtype
    spec = spec_of(bits, zeros, grouping.group_size, cols, scale_dtype)
    permutation = grouping.permutation

    def load() -> dict[str, Tensor]:
        codes = little_endian_bytes(source.read(weight_name)).transpose(0, 1).reshape(rows, -1)
        data = pack_rows(codes, bits, cols, permutation)
        tensors = tensors_of(spec, data, source.read(scales_name).T, zeros, grouping.group_size, cols)
        return tensors if permutation is None else tensors | {"permutation": permutation}

    parts: tuple[str, ...] = (weight_name, zeros_name, scales_name)
    parts = parts if g_idx is None else (*parts, f"{module}.g_idx")
    name = f"{module}.weight"
    permuted = permutation is not None
    return foreign_weight(name, spec, (rows, cols), scale_dtype, parts, load, permuted=permuted)


def _bits(quantization: Quantization, module: str, words: int, g_idx: Tensor | None) -> int:
    """Bits of an integer, by g_idx: with GPTQModel's ``dynamic``, layers may have others than the config says."""
    bits = quantization.integer("bits") if g_idx is None or not g_idx.numel() else 32 * words // g_idx.numel()
    if bits not in _ONES:
        raise unsupported(f"{brief(module)}: {bits} bits", "served are 4 and 8")
    return bits


def _grouping(quantization: Quantization, module: str, cols: int, groups: int, g_idx: Tensor | None) -> _Grouping:
    where = f"{module}.g_idx"
    # exllama's loaders leave zeros where columns are in order.
    if g_idx is None or not g_idx.numel() or (groups > 1 and not g_idx.any()):
        group_size = quantization.integer("group_size")
        group_size = cols if group_size == -1 else group_size
        if group_size < 1 or -(-cols // group_size) != groups:
            raise invalid(brief(module), f"{groups} groups", f"those of {group_size} of {cols} columns")
        return _Grouping(group_size)
    if g_idx.shape != (cols,) or g_idx.dtype != torch.int32:
        raise invalid(brief(where), f"{g_idx.dtype} {list(g_idx.shape)}", f"torch.int32 [{cols}]")
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise invalid(brief(where), f"groups {int(g_idx.min())} to {int(g_idx.max())}", f"0 to {groups - 1}")
    sizes = torch.bincount(g_idx, minlength=groups)
    group_size = int(sizes[0])
    if bool((sizes[:-1] != group_size).any()) or not 0 < int(sizes[-1]) <= group_size:
        raise unsupported(f"{brief(where)}: groups of {brief(sizes.tolist())} columns", "groups are of one size")
    if bool((g_idx[1:] >= g_idx[:-1]).all()):
        return _Grouping(group_size)
    return _Grouping(group_size, torch.argsort(g_idx, stable=True).to(torch.int32))


def _zeros(words: Tensor, bits: int, rows: int, *, first: bool) -> Tensor:
    """Zero points, uint8 [N, groups]."""
    # On the whole word, with its carries: GPTQModel subtracts them so when it writes the first format.
    words = words + _ONES[bits] if first else words
    return integers(little_endian_bytes(words).flatten(1), bits)[:, :rows].T.contiguous()
