"""CPU tensors to native calls: pointers, strides, thread count."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit_rs import _native
from lowbit_rs._backends._memory import NormOperands, buffer, column, experts_of, floats, joined_buffers, rows_of
from lowbit_rs._native import Spec, WeightView
from lowbit_rs.packed import dtype_name, field_dtypes, storage

_CPU = torch.device("cpu")

#: Joined weights are multiplied faster than their parts with any number of tokens.
MAX_JOINED_TOKENS = 1 << 62


def view(spec: Spec, shape: Sequence[int], tensors: Sequence[Tensor]) -> WeightView:
    """Borrowed pointers to the tensors of a weight [N, K] or [experts, N, K]; keep them alive while it is in use.

    ``tensors`` come in the order of ``field_dtypes(spec)``. The native side checks that every buffer has the length
    that spec and shape ask for; here, that the elements are what it will take them for (InvalidArgument otherwise).
    """
    fields = field_dtypes(spec).items()
    buffers = {name: buffer(name, tensor, dtype, _CPU) for (name, dtype), tensor in zip(fields, tensors, strict=True)}
    return WeightView(spec, math.prod(shape[:-1]), shape[-1], buffers.pop("data"), **buffers)


def joined_view(spec: Spec, shape: Sequence[int], parts: Sequence[Mapping[str, Tensor]]) -> WeightView | None:
    """The view of a weight [N, K] whose rows lie in ``parts``, one behind the other in memory; None if they do not."""
    buffers = joined_buffers(spec, parts, _CPU)
    return None if buffers is None else WeightView(spec, shape[0], shape[1], buffers.pop("data"), **buffers)


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
    shape, strides = experts_of(source)
    name = dtype_name(source.dtype, "tensor")
    _native.quantize(source.data_ptr(), name, shape, strides, nonfinite, out, torch.get_num_threads())
    return tensors


def dequantize(weight: WeightView, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The whole weight in ``dtype``."""
    out = torch.empty(shape, dtype=dtype, device="cpu")
    _native.dequantize(weight, floats(out), torch.get_num_threads())
    return out


def embedding(weight: WeightView, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows ``indices`` (int32 or int64, any shape) of the weight: [*indices.shape, K] in ``dtype``.

    Raises InvalidArgument for a row that the weight does not have.
    """
    rows = indices.to(torch.int64).contiguous()
    out = torch.empty((*indices.shape, weight.cols), dtype=dtype, device="cpu")
    _native.dequantize_rows(weight, (rows.data_ptr(), rows.numel()), floats(out), torch.get_num_threads())
    return out


def linear(weight: WeightView, x: Tensor, bias: Tensor | None, activation: str, threshold: float) -> Tensor:
    """``x @ W.T + bias`` for x [..., K] and bias [N] of any float dtype: [..., N] in the dtype of x.

    With ``activation`` "int8" or "auto", x may be rounded to 8 bits before, but for columns with a magnitude of
    ``threshold`` or more, if that is not 0.
    """
    x, tokens, row_stride = rows_of(x)
    out = x.new_empty((*x.shape[:-1], weight.rows))
    bias, addend = column(bias)
    rounding = activation, threshold
    _native.linear(weight, floats(x), tokens, row_stride, *rounding, addend, floats(out), torch.get_num_threads())
    return out


def rounded_from(weight: WeightView, activation: str, dtype: torch.dtype) -> int | None:
    """From how many tokens on ``linear`` rounds x in ``dtype`` to 8 bits; None if never."""
    return _native.rounded_from(weight, activation, dtype_name(dtype))


def shared_rows(x: Tensor, threshold: float, rows: Any) -> None:
    """Products round activations themselves; those of one input are joined with any number of tokens."""


def norm_rounded(*arguments: Any) -> None:
    """Norms leave rounding to the products."""


def linear_grouped(weight: WeightView, experts: int, x: Tensor, counts: Tensor) -> None:
    """No kernel takes a stack as a whole: matrices are multiplied one by one."""


def linear_grad_input(weight: WeightView, grad: Tensor) -> Tensor:
    """``grad @ W`` for grad [..., N]: [..., K] in the dtype of grad."""
    grad, tokens, row_stride = rows_of(grad)
    out = grad.new_empty((*grad.shape[:-1], weight.cols))
    _native.linear_grad_input(weight, floats(grad), tokens, row_stride, floats(out), torch.get_num_threads())
    return out


def queue(device: torch.device) -> None:
    """Work is done when a call returns: there are no queues to tell apart."""


def may_wait() -> bool:
    """Always."""
    return True


def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, kind: Sequence[Any]
) -> tuple[Tensor, Tensor | None]:
    """The rows of x [..., K], or of x + residual, normalized as ``kind`` (a NormKind) says, and that sum."""
    operands = NormOperands(x, residual, weight, bias)
    _native.norm(tuple(kind), *operands.arguments, torch.get_num_threads())
    return operands.y, operands.total
