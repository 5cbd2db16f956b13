"""Tensors as the native module takes them: addresses, lengths, distances of rows. Used by every backend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lowbit_rs._native import Spec
from lowbit_rs.errors import invalid
from lowbit_rs.packed import SHARED_FIELDS, dtype_name, field_dtypes

Floats = tuple[int, int, str]
Buffer = tuple[int, int]


def rows_of(x: Tensor) -> tuple[Tensor, int, int]:
    """``x`` as rows: the tensor, their number, and the elements from one to the next.

    Rows that are dense in themselves are taken where they lie, at any distance; everything else is copied.
    """
    width = x.shape[-1]
    tokens = math.prod(x.shape[:-1])
    if x.data_ptr() % x.element_size():
        x = x.clone()
    if x.is_contiguous():
        return x, tokens, width
    if x.dim() == 2 and x.stride(1) == 1 and x.stride(0) >= width:
        return x, tokens, x.stride(0)
    return x.contiguous(), tokens, width


def floats(tensor: Tensor) -> Floats:
    """A native float buffer: from the first element to the last one in memory."""
    count = tensor.numel()
    if not tensor.is_contiguous():
        count = (tensor.shape[0] - 1) * tensor.stride(0) + tensor.shape[1]
    return tensor.data_ptr(), count, dtype_name(tensor.dtype)


def column(tensor: Tensor | None) -> tuple[Tensor | None, Floats | None]:
    """A vector that may be missing, as a bias, and its native buffer; the tensor has to live as long as that."""
    if tensor is None:
        return None, None
    kept = rows_of(tensor)[0]
    return kept, floats(kept)


def buffer(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Buffer:
    """A native buffer of elements of ``dtype`` on ``device``; InvalidArgument, naming the field, for anything else."""
    if tensor.dtype is not dtype or tensor.device != device or not tensor.is_contiguous():
        contiguity = "" if tensor.is_contiguous() else "non-contiguous "
        where = "the CPU" if device.type == "cpu" else str(device)
        raise invalid(name, f"a {contiguity}{tensor.dtype} tensor on {tensor.device}", f"contiguous {dtype} on {where}")
    address = tensor.data_ptr()
    if address % dtype.itemsize:
        # As torch.frombuffer makes them of a file's bytes at any offset.
        raise invalid(name, f"{dtype} at the odd address {address:#x}", "elements aligned to their size; clone it")
    if not address and tensor.numel():
        raise invalid(name, "a tensor whose memory was freed", f"{tensor.numel()} elements")
    return address, tensor.numel()


def joined_buffers(spec: Spec, parts: Sequence[Mapping[str, Tensor]], device: torch.device) -> dict[str, Buffer] | None:
    """Native buffers of one weight that is made of ``parts``, each the tensors of a weight under ``spec`` by field.

    None where the parts do not lie one behind the other. What a weight has one of is the first part's.
    """
    joined = {}
    for name, dtype in field_dtypes(spec).items():
        buffers = [buffer(name, part[name], dtype, device) for part in parts]
        address, total = buffers[0]
        if name not in SHARED_FIELDS:
            for start, count in buffers[1:]:
                if start != address + total * dtype.itemsize:
                    return None
                total += count
        joined[name] = address, total
    return joined


def experts_of(tensor: Tensor) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Shape and strides of [N, K] or [experts, N, K] as [experts, N, K]."""
    *_, experts, rows, cols = (1, *tensor.shape)
    *_, of_experts, of_rows, of_cols = (0, *tensor.stride())
    return (experts, rows, cols), (of_experts, of_rows, of_cols)


#: Rows and the elements from one to the next.
Rows = tuple[Floats, int]
#: x, its rows and their width; residual and its sum with x; weight and bias; the result.
NormArguments = tuple[Rows, int, int, Rows | None, Floats | None, Floats | None, Floats | None, Floats]


class NormOperands:
    """The tensors of a normalization: those that come in, as native calls take them, and those that go out.

    Keep it alive during the call: it holds the copies that odd strides ask for.
    """

    def __init__(self, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
        self.y = x.new_empty(x.shape)
        self.total = None if residual is None else x.new_empty(x.shape)
        rows, tokens, stride = rows_of(x)
        self._kept: list[Tensor | None] = [rows]
        more = None if residual is None else rows_of(residual)
        addend = None
        if more is not None:
            self._kept.append(more[0])
            addend = (floats(more[0]), more[2])
        total = None if self.total is None else floats(self.total)
        columns = (self._column(weight), self._column(bias))
        self.arguments: NormArguments = (
            (floats(rows), stride),
            tokens,
            x.shape[-1],
            addend,
            total,
            *columns,
            floats(self.y),
        )

    def _column(self, tensor: Tensor | None) -> Floats | None:
        kept, values = column(tensor)
        self._kept.append(kept)
        return values
