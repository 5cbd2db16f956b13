"""CUDA tensors to native calls: pointers, strides, torch's current stream.

Kernels are queued on the stream that torch has current for the tensors' device, and nothing waits for them, but for
``quantize`` where it has to tell of a weight that cannot be packed. Memory is torch's. After a first call has loaded
its kernels, calls can be captured into a CUDA graph.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit_rs import _native
from lowbit_rs._backends._counters import counters
from lowbit_rs._backends._memory import (
    Buffer,
    NormOperands,
    buffer,
    column,
    experts_of,
    floats,
    joined_buffers,
    rows_of,
)
from lowbit_rs._native import CUDA_MAX_TOKENS, CUDA_SIDE_NUMBERS, CudaWeight, Spec, Unsupported
from lowbit_rs.packed import dtype_name, field_dtypes, storage

#: Bytes of the weight that are unpacked at once for a product with many tokens: the most memory that takes. Smaller
#: parts, which stay in the L2 cache, take longer: their launches and last blocks cost more than the cache saves.
_PART_BYTES = 128 << 20
#: Rows or columns of such a part are a multiple of this, so that the library finds whole tiles.
_PART_STEP = 256

#: Tokens up to which joined weights are multiplied faster than their parts: as long as reading the weight is what takes
#: time. Beyond, results that lie apart in memory cost more than launches: 3 % of a prompt of 2048 tokens (gpu_llm).
MAX_JOINED_TOKENS = CUDA_MAX_TOKENS

#: Whether a product may begin to read its weight while the kernel in front of it still runs (programmatic dependent
#: launch, compute capability 9.0 and newer). That is right as long as no kernel writes a weight just before its use.
MAY_OVERLAP = os.environ.get("LOWBIT_DEPENDENT_LAUNCH") == "1"

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


def joined_view(spec: Spec, shape: Sequence[int], parts: Sequence[Mapping[str, Tensor]]) -> CudaWeight | None:
    """The view of a weight [N, K] whose rows lie in ``parts``, one behind the other in memory; None if they do not."""
    first = parts[0]["data"]
    buffers = joined_buffers(spec, parts, first.device)
    if buffers is None:
        return None
    return CudaWeight(first.get_device(), spec, shape[0], shape[1], buffers.pop("data"), **buffers)


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
    status = torch.empty(2, dtype=torch.int64, device=device)
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


def linear(weight: CudaWeight, x: Tensor, bias: Tensor | None, activation: str, threshold: float) -> Tensor:
    """``x @ W.T + bias`` for x [..., K] and bias [N] of any float dtype: [..., N] in the dtype of x.

    With ``activation`` "int8" or "auto", x is rounded to 8 bits from ``rounded_from`` tokens on, but for columns with a
    magnitude of ``threshold`` or more, if that is not 0. Raises Unsupported for "int8" where no kernel takes that.
    """
    x, tokens, row_stride = rows_of(x)
    values = floats(x)
    first = None if activation == "none" else rounded_from(weight, activation, x.dtype)
    if first is not None and tokens >= first:
        return linear_int8(weight, x, round_rows(x, threshold), bias)
    if tokens > CUDA_MAX_TOKENS:
        sizes = _native.cuda_batch_sizes(weight, values, tokens, row_stride)
        if sizes is not None:
            return linear_batch(weight, x, bias, sizes)
    out = x.new_empty((*x.shape[:-1], weight.rows))
    if tokens > CUDA_MAX_TOKENS:
        linear_in_parts(weight, x.reshape(tokens, weight.cols), bias, out.view(tokens, weight.rows))
        return out
    bias, addend = column(bias)
    result = (out.data_ptr(), tokens * weight.rows, values[2])
    _native.cuda_linear(weight, values, tokens, row_stride, addend, result, _stream(weight.device), MAY_OVERLAP)
    return out


def linear_batch(weight: CudaWeight, x: Tensor, bias: Tensor | None, sizes: tuple[int, int]) -> Tensor:
    """``linear`` by the kernel for many tokens, with a workspace of the ``sizes`` of ``_native.cuda_batch_sizes``.

    Blocks of threads that share a part of the result leave their sums in it: at most two tiles of 128 rows for each
    multiprocessor, 35 MB with 256 tokens a tile.
    """
    x, tokens, row_stride = rows_of(x)
    out = x.new_empty((*x.shape[:-1], weight.rows))
    bias, addend = column(bias)
    workspace = batch_workspace(x, sizes)
    values = floats(x)
    result = (out.data_ptr(), tokens * weight.rows, values[2])
    parts = buffers_of(*workspace)
    _native.cuda_linear_batch(weight, values, tokens, row_stride, addend, result, *parts, _stream(weight.device))
    return out


def batch_workspace(x: Tensor, sizes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Memory for ``linear_batch``: float32 for sums, and int32 counters, which are 0."""
    return x.new_empty(sizes[0], dtype=torch.float32), counters(x.device, sizes[1])


def buffers_of(first: Tensor, second: Tensor) -> tuple[Buffer, Buffer]:
    """Two tensors as the native module takes them."""
    return (first.data_ptr(), first.numel()), (second.data_ptr(), second.numel())


def rounded_from(weight: CudaWeight, activation: str, dtype: torch.dtype) -> int | None:  # noqa: ARG001
    """From how many tokens on ``linear`` rounds x in ``dtype`` to 8 bits; None if never.

    Raises Unsupported for the ``activation`` "int8" where no kernel of this device takes such a weight.
    """
    try:
        return _native.cuda_rounded_from(weight, activation == "auto")
    except Unsupported:
        if activation == "int8":
            raise
        return None


@dataclass(frozen=True)
class Int8Rows:
    """Activations [tokens, K] in int8: what :func:`linear_int8` multiplies.

    - ``codes`` int8 [tokens, K, rounded up to 16] and ``scales`` float32 [tokens];
    - ``outliers`` int32: how many columns have outliers and which, as ``cuda/include/lowbit/int8_rows.cuh`` says; None
      without a threshold.
    """

    codes: Tensor
    scales: Tensor
    outliers: Tensor | None

    def buffers(self) -> tuple[Buffer, Buffer, Buffer | None]:
        """As the native module takes them."""
        outliers = None if self.outliers is None else (self.outliers.data_ptr(), self.outliers.numel())
        codes = (self.codes.data_ptr(), self.codes.numel())
        return codes, (self.scales.data_ptr(), self.scales.numel()), outliers


def round_rows(x: Tensor, threshold: float) -> Int8Rows:
    """Rows of x [..., K] in int8, but for numbers of a magnitude of ``threshold`` or more, if that is not 0.

    A row with NaN or an infinity is outliers in those places, or without a threshold gives a row of NaN.
    """
    x, tokens, row_stride = rows_of(x)
    shape = tokens, x.shape[-1]
    rows, device = _empty_rows(*shape, threshold, x.device), x.get_device()
    _native.cuda_round_rows(device, floats(x), shape, row_stride, threshold, rows.buffers(), _stream(device))
    return rows


def _empty_rows(tokens: int, cols: int, threshold: float, device: torch.device) -> Int8Rows:
    """Room for rows."""
    stride, words = _native.cuda_int8_sizes(cols)
    codes = torch.empty((tokens, stride), dtype=torch.int8, device=device)
    scales = torch.empty(tokens, dtype=torch.float32, device=device)
    return Int8Rows(codes, scales, torch.empty(words, dtype=torch.int32, device=device) if threshold else None)


@dataclass(frozen=True)
class SharedRows:
    """Activations x [..., K] that were rounded once for several products."""

    x: Tensor
    rows: Int8Rows

    def linear(self, weight: CudaWeight, bias: Tensor | None) -> Tensor:
        """``linear`` of x with one of the weights that take it."""
        return linear_int8(weight, self.x, self.rows, bias)


def shared_rows(x: Tensor, threshold: float, rows: Int8Rows | None) -> SharedRows:
    """x [..., K] rounded as ``linear`` does it; ``rows`` is that, if a norm has done it already."""
    return SharedRows(x, round_rows(x, threshold) if rows is None else rows)


def linear_int8(weight: CudaWeight, x: Tensor, rows: Int8Rows, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias`` with x [..., K] in int8 as ``rows`` has it, but for columns of outliers.

    With more of these than ``CUDA_SIDE_NUMBERS`` x is multiplied as it is, where a kernel does so: the device decides.
    """
    x, tokens, row_stride = rows_of(x)
    out = x.new_empty((*x.shape[:-1], weight.rows))
    side = workspace = None
    values = floats(x)
    if rows.outliers is not None:
        sizes = _native.cuda_batch_sizes(weight, values, tokens, row_stride, True)
        workspace = None if sizes is None else batch_workspace(x, sizes)
        side = torch.empty((tokens + weight.rows, CUDA_SIDE_NUMBERS), dtype=torch.int16, device=x.device)
    beside = None if side is None else (side.data_ptr(), side.numel())
    bias, addend = column(bias)
    result = (out.data_ptr(), tokens * weight.rows, values[2])
    stream = _stream(weight.device)
    parts = beside, addend, result, None if workspace is None else buffers_of(*workspace)
    _native.cuda_linear_int8(weight, values, tokens, row_stride, rows.buffers(), *parts, stream)
    return out


def linear_grouped(weight: CudaWeight, experts: int, x: Tensor, counts: Tensor) -> Tensor | None:
    """Rows x [S, K], sorted by expert, times the matrices of a stack: [S, N]; ``counts``, int64, stays on the device.

    Rows beyond the sum of counts become zero. None where there is no kernel for such a weight or such activations.
    """
    x, tokens, row_stride = rows_of(x)
    out = x.new_empty((tokens, weight.rows // experts))
    numbers = buffer("counts", counts, torch.int64, x.device)
    served = _native.cuda_linear_grouped(
        weight, experts, floats(x), tokens, row_stride, numbers, floats(out), _stream(weight.device)
    )
    return out if served else None


def linear_grad_input(weight: CudaWeight, grad: Tensor) -> Tensor:
    """``grad @ W`` for grad [..., N]: [..., K] in the dtype of grad, to which the weight is rounded, too.

    The columns of the weight are unpacked and multiplied in parts of bounded size. Each sum is in one product.
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


def queue(device: torch.device) -> tuple[int, bool]:
    """torch's current stream, and whether work on it is recorded into a CUDA graph instead of done."""
    return _stream(device.index), torch.cuda.is_current_stream_capturing()


def may_wait() -> bool:
    """Not while a CUDA graph is captured."""
    return not torch.cuda.is_current_stream_capturing()


def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, kind: Sequence[Any]
) -> tuple[Tensor, Tensor | None]:
    """The rows of x [..., K], or of x + residual, normalized as ``kind`` (a NormKind) says, and that sum."""
    operands = NormOperands(x, residual, weight, bias)
    device = x.get_device()
    _native.cuda_norm(device, tuple(kind), *operands.arguments, None, _stream(device))
    return operands.y, operands.total


def norm_rounded(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: Sequence[Any],
    threshold: float,
) -> tuple[Tensor, Tensor | None, Int8Rows]:
    """``norm``, and its result as ``round_rows`` rounds it, in one pass where a kernel has room for a row."""
    operands = NormOperands(x, residual, weight, bias)
    device = x.get_device()
    rows = _empty_rows(math.prod(x.shape[:-1]), x.shape[-1], threshold, x.device)
    _native.cuda_norm(device, tuple(kind), *operands.arguments, (threshold, rows.buffers()), _stream(device))
    return operands.y, operands.total, rows


def norm_backward(
    rows: Tensor,
    grad: Tensor,
    grad_total: Tensor | None,
    weight: Tensor | None,
    kind: Sequence[Any],
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """The gradients of ``norm`` to the rows [..., K] that were normalized, and in float32 to the columns.

    Those of columns are [1, K], of the weight, and for a centered norm [2, K], of weight and bias. ``needs`` says which
    of the two are wanted; the other is empty. ``grad_total`` is added to the first.
    """
    device, is_centered = rows.get_device(), kind[1]
    of_rows = rows.new_empty(rows.shape if needs[0] else 0)
    dense, tokens, stride = rows_of(rows)
    cols = rows.shape[-1]
    lines = _native.cuda_norm_sum_lines(device, tokens, cols) if needs[1] else 0
    sums = rows.new_empty((lines, 1 + is_centered, cols), dtype=torch.float32)
    grad, _, grad_stride = rows_of(grad)
    total = None if grad_total is None else rows_of(grad_total)
    weight, factors = column(weight)
    _native.cuda_norm_backward(
        device,
        tuple(kind),
        (floats(dense), stride),
        (floats(grad), grad_stride),
        None if total is None else (floats(total[0]), total[2]),
        tokens,
        cols,
        factors,
        floats(of_rows) if needs[0] else None,
        floats(sums) if needs[1] else None,
        _stream(device),
    )
    return of_rows, sums.sum(0) if needs[1] else sums.view(0)


def linear_in_parts(weight: CudaWeight, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """``out[:, part] = x @ W[part].T + bias[part]`` for parts of the rows of bounded size.

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
