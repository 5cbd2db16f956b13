"""CUDA tensors to native calls: pointers, strides, torch's current stream.

Kernels are queued on the stream that torch has current for the tensors' device, and nothing waits for them, but for
``quantize`` where it has to tell of a weight that cannot be packed. Memory is torch's. After a first call has loaded
its kernels, calls can be captured into a CUDA graph.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit_rs import _native
from lowbit_rs._backends._memory import NormOperands, buffer, experts_of, floats, rows_of
from lowbit_rs._native import CUDA_MAX_TOKENS, CudaWeight, Spec
from lowbit_rs.errors import unsupported
from lowbit_rs.packed import dtype_name, field_dtypes, storage

#: Bytes of the weight that are unpacked at once for a product with many tokens: they are read again while still in the
#: L2 cache, which holds 40 MB and more on the GPUs that serve large models.
_PART_BYTES = 32 << 20
#: Rows or columns of such a part are a multiple of this, so that the library finds whole tiles.
_PART_STEP = 256

#: Whether a product may begin to read its weight while the kernel in front of it still runs (programmatic dependent
#: launch, compute capability 9.0 and newer). That is right as long as no kernel writes a weight just before its use.
_MAY_OVERLAP = os.environ.get("LOWBIT_DEPENDENT_LAUNCH") == "1"

#: Scales that are summed by one block, and most blocks that do so: as in rust/core/src/cuda/plan.rs.
_SUM_THREADS = 256


def _stream(device: int) -> int:
    """The handle of torch's current stream on a device: what torch.cuda.current_stream gives, without its objects."""
    handle: int = torch._C._cuda_getCurrentRawStream(device)
    return handle


#: Views that were made, by all that they were made of: address, length, dtype and device are everything about a
#: contiguous tensor that a view depends on.
_views: dict[tuple[Any, ...], CudaWeight] = {}
_MAX_VIEWS = 1 << 14


def view(spec: Spec, shape: Sequence[int], tensors: Sequence[Tensor]) -> CudaWeight:
    """Borrowed pointers to the tensors of a weight [N, K] or [experts, N, K], all on one device.

    ``tensors`` come in the order of ``field_dtypes(spec)``; keep them alive while the view is in use. Raises
    InvalidArgument, naming the field, for a dtype, length or device that spec, shape or the codes do not have.
    """
    key = (spec, *shape, *[(t.data_ptr(), t.numel(), t.dtype, t.get_device(), t.is_contiguous()) for t in tensors])
    made = _views.get(key)
    if made is None:
        device = tensors[0].device
        fields = field_dtypes(spec).items()
        buffers = {name: buffer(name, part, dtype, device) for (name, dtype), part in zip(fields, tensors, strict=True)}
        codes = buffers.pop("data")
        made = CudaWeight(tensors[0].get_device(), spec, math.prod(shape[:-1]), shape[-1], codes, **buffers)
        if len(_views) >= _MAX_VIEWS:
            _views.clear()
        _views[key] = made
    return made


def quantize(source: Tensor, codebook: Tensor | None, spec: Spec, nonfinite: str) -> list[Tensor]:
    """The tensors of ``source`` [N, K] or [experts, N, K] (any strides) under ``spec``, in the order of its fields.

    Raises InvalidArgument naming the first NaN or infinity unless ``nonfinite`` is "propagate".
    """
    device = source.device
    sizes = storage(spec, source.shape, None if codebook is None else codebook.numel())
    parts = {name: torch.empty(size, dtype=dtype, device=device) for name, (size, dtype) in sizes.items()}
    table = None
    if codebook is not None:
        parts["codebook"].copy_(codebook)
        codebook = codebook.cpu()
        table = buffer("codebook", codebook, torch.float32, codebook.device)
    tensors = list(parts.values())
    out = view(spec, source.shape, tensors)
    status = torch.full((2,), -1, dtype=torch.int64, device=device)
    scales = sums = None
    if spec.double_quant:
        blocks = parts["scale"].numel()
        scales = torch.empty(blocks, dtype=torch.float32, device=device)
        parts_of_sum = min(-(-blocks // _SUM_THREADS), _SUM_THREADS)
        sums = torch.empty(2 * parts_of_sum, dtype=torch.float64, device=device)
    shape, strides = experts_of(source)
    _native.cuda_quantize(
        source.data_ptr(),
        dtype_name(source.dtype, "tensor"),
        shape,
        strides,
        table,
        nonfinite,
        out,
        (status.data_ptr(), 2),
        None if scales is None else (scales.data_ptr(), scales.numel()),
        None if sums is None else (sums.data_ptr(), sums.numel()),
        _stream(out.device),
    )
    return tensors


def dequantize(weight: CudaWeight, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The whole weight in ``dtype``."""
    out = torch.empty(shape, dtype=dtype, device=torch.device("cuda", weight.device))
    window = (0, 0, weight.rows, weight.cols)
    _native.cuda_dequantize(weight, window, floats(out), _stream(weight.device))
    return out


def embedding(weight: CudaWeight, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows ``indices`` (int32 or int64, any shape) of the weight: [*indices.shape, K] in ``dtype``.

    As with torch, an index outside the weight fails an assertion on the device, which the next synchronization reports.
    """
    rows = indices.to(torch.int64).contiguous()
    out = torch.empty((*indices.shape, weight.cols), dtype=dtype, device=indices.device)
    _native.cuda_dequantize_rows(weight, (rows.data_ptr(), rows.numel()), floats(out), _stream(weight.device))
    return out


def linear(weight: CudaWeight, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """``x @ W.T + bias`` for x [..., K] and bias [N] of any float dtype: [..., N] in the dtype of x.

    Raises Unsupported for an ``activation`` other than "none": x is taken as it is.
    """
    if activation != "none":
        raise unsupported(f'activation="{activation}" on CUDA', 'no kernel here rounds activations; take "none"')
    x, tokens, row_stride = rows_of(x)
    out = x.new_empty((*x.shape[:-1], weight.rows))
    if tokens > CUDA_MAX_TOKENS:
        _linear_in_parts(weight, x.reshape(tokens, weight.cols), bias, out.view(tokens, weight.rows))
        return out
    addend = None
    if bias is not None:
        bias = rows_of(bias)[0]
        addend = floats(bias)
    values = floats(x)
    result = (out.data_ptr(), tokens * weight.rows, values[2])
    _native.cuda_linear(weight, values, tokens, row_stride, addend, result, _stream(weight.device), _MAY_OVERLAP)
    return out


def linear_grad_input(weight: CudaWeight, grad: Tensor) -> Tensor:
    """``grad @ W`` for grad [..., N]: [..., K] in the dtype of grad, to which the weight is rounded, too.

    The columns of the weight are unpacked and multiplied in parts that fit in the L2 cache. Each sum is in one product.
    """
    grad, tokens, _ = rows_of(grad)
    rows, cols = weight.rows, weight.cols
    out = grad.new_empty((*grad.shape[:-1], cols))
    grad, sums = grad.reshape(tokens, rows), out.view(tokens, cols)
    step = _part_length(rows, grad)
    memory = grad.new_empty(min(step, cols) * rows)
    for first in range(0, cols, step):
        width = min(step, cols - first)
        part = memory[: rows * width].view(rows, width)
        _native.cuda_dequantize(weight, (0, first, rows, width), floats(part), _stream(weight.device))
        torch.mm(grad, part, out=sums[:, first : first + width])
    return out


def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, kind: Sequence[Any]
) -> tuple[Tensor, Tensor | None]:
    """The rows of x [..., K], or of x + residual, normalized as ``kind`` (a NormKind) says, and that sum."""
    operands = NormOperands(x, residual, weight, bias)
    device = x.get_device()
    _native.cuda_norm(device, tuple(kind), *operands.arguments, _stream(device))
    return operands.y, operands.total


def _linear_in_parts(weight: CudaWeight, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """``out[:, part] = x @ W[part].T + bias[part]`` for parts of the rows that fit in the L2 cache.

    The weight is rounded to the dtype of x on the way, which tensor cores take; there is never more of it than a part.
    """
    rows, cols = weight.rows, weight.cols
    step = _part_length(cols, x)
    memory = x.new_empty((min(step, rows), cols))
    bias = None if bias is None else bias.to(x.dtype)
    for first in range(0, rows, step):
        part = memory[: min(step, rows - first)]
        last = first + part.shape[0]
        window = (first, 0, part.shape[0], cols)
        _native.cuda_dequantize(weight, window, floats(part), _stream(weight.device))
        if bias is None:
            torch.mm(x, part.T, out=out[:, first:last])
        else:
            torch.addmm(bias[first:last], x, part.T, out=out[:, first:last])


def _part_length(width: int, x: Tensor) -> int:
    """How many rows (or columns) of a weight with ``width`` columns (or rows) are unpacked at once."""
    fit = _PART_BYTES // max(width * x.element_size(), 1)
    return max(fit // _PART_STEP, 1) * _PART_STEP
