"""CPU tensors to native calls: pointers, strides, thread count."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_rs import _native
from lowbit_rs._native import Spec, WeightView
from lowbit_rs.errors import invalid
from lowbit_rs.packed import dtype_name, field_dtypes, storage

_Floats = tuple[int, int, str]
_Buffer = tuple[int, int]


def view(spec: Spec, shape: Sequence[int], tensors: Sequence[Tensor]) -> WeightView:
    """Borrowed pointers to the tensors of a weight [N, K] or [experts, N, K]; keep them alive while it is in use.

    ``tensors`` come in the order of ``field_dtypes(spec)``. The native side checks that every buffer has the length
    that spec and shape ask for; here, that the elements are what it will take them for (InvalidArgument otherwise).
    """
    fields = field_dtypes(spec).items()
    buffers = {name: _buffer(name, tensor, dtype) for (name, dtype), tensor in zip(fields, tensors, strict=True)}
    return WeightView(spec, math.prod(shape[:-1]), shape[-1], buffers.pop("data"), **buffers)


def quantize(source: Tensor, codebook: Tensor | None, spec: Spec, nonfinite: str) -> list[Tensor]:
    """The tensors of ``source`` [N, K] or [experts, N, K] (any strides) under ``spec``, in the order of its fields.

    Raises InvalidArgument naming the first NaN or infinity unless ``nonfinite`` is "propagate".
    """
    sizes = storage(spec, source.shape, None if codebook is None else codebook.numel())
    parts = {name: torch.empty(size, dtype=dtype, device="cpu") for name, (size, dtype) in sizes.items()}
    if codebook is not None:
        parts["codebook"].copy_(codebook)
    tensors = list(parts.values())
    out = view(spec, source.shape, tensors)
    experts, strides = (1, *source.shape)[-3:], (0, *source.stride())[-3:]
    name = dtype_name(source.dtype, "tensor")
    _native.quantize(source.data_ptr(), name, experts, strides, nonfinite, out, torch.get_num_threads())
    return tensors


def dequantize(weight: WeightView, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The whole weight in ``dtype``."""
    out = torch.empty(shape, dtype=dtype, device="cpu")
    _native.dequantize(weight, _floats(out), torch.get_num_threads())
    return out


def embedding(weight: WeightView, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows ``indices`` (int32 or int64, any shape) of the weight: [*indices.shape, K] in ``dtype``.

    Raises InvalidArgument for a row that the weight does not have.
    """
    rows = indices.to(torch.int64).contiguous()
    out = torch.empty((*indices.shape, weight.cols), dtype=dtype, device="cpu")
    _native.dequantize_rows(weight, (rows.data_ptr(), rows.numel()), _floats(out), torch.get_num_threads())
    return out


def linear(weight: WeightView, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """``x @ W.T + bias`` for x [..., K] and bias [N] of any float dtype: [..., N] in the dtype of x.

    With ``activation="int8"``, x may be rounded to 8 bits before.
    """
    x, tokens, row_stride = _rows(x)
    out = x.new_empty((*x.shape[:-1], weight.rows))
    bias = None if bias is None else _rows(bias)[0]
    addend = None if bias is None else _floats(bias)
    _native.linear(weight, _floats(x), tokens, row_stride, activation, addend, _floats(out), torch.get_num_threads())
    return out


def linear_grad_input(weight: WeightView, grad: Tensor) -> Tensor:
    """``grad @ W`` for grad [..., N]: [..., K] in the dtype of grad."""
    grad, tokens, row_stride = _rows(grad)
    out = grad.new_empty((*grad.shape[:-1], weight.cols))
    _native.linear_grad_input(weight, _floats(grad), tokens, row_stride, _floats(out), torch.get_num_threads())
    return out


def _rows(x: Tensor) -> tuple[Tensor, int, int]:
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


def _floats(tensor: Tensor) -> _Floats:
    """A native float buffer: from the first element to the last one in memory."""
    count = tensor.numel()
    if not tensor.is_contiguous():
        count = (tensor.shape[0] - 1) * tensor.stride(0) + tensor.shape[1]
    return tensor.data_ptr(), count, dtype_name(tensor.dtype)


def _buffer(name: str, tensor: Tensor, dtype: torch.dtype) -> _Buffer:
    if tensor.dtype is not dtype or not tensor.is_contiguous() or not tensor.is_cpu:
        contiguity = "" if tensor.is_contiguous() else "non-contiguous "
        raise invalid(name, f"a {contiguity}{tensor.dtype} tensor on {tensor.device}", f"contiguous {dtype} on the CPU")
    address = tensor.data_ptr()
    if address % dtype.itemsize:
        # As torch.frombuffer makes them of a file's bytes at any offset.
        raise invalid(name, f"{dtype} at the odd address {address:#x}", "elements aligned to their size; clone it")
    return address, tensor.numel()
