"""Functions of ``bitsandbytes.functional`` for inference, and its two products.

Names, arguments and defaults are those of bitsandbytes. Tensors may be of any shape and are quantized as if flattened;
``out`` is filled where it is given. Wrong arguments raise InvalidArgument, a ValueError.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import lowbit_rs
from lowbit_rs import PackedWeight, codebooks
from lowbit_rs.compat.bitsandbytes._absent import getattr_of
from lowbit_rs.compat.bitsandbytes.state import (
    QUANT_TYPES,
    QuantState,
    as_packed,
    check,
    of_packed,
    operands,
    scales,
    table,
)
from lowbit_rs.errors import invalid, unsupported
from lowbit_rs.functional import packed_linear
from lowbit_rs.packed import dtype_name, make_spec

_TRAINING = "it serves the training of 8-bit weights, and lowbit_rs keeps weights frozen"
_CUBLAS = "deprecated in bitsandbytes, which calls cuBLAS for it; use int8_linear_matmul"
_MAPS = "no format of inference uses it; lowbit_rs.codebooks has tables, and lowbit_rs.quantize takes any as codebook="

__getattr__ = getattr_of(
    "bnb.functional",
    {
        "int8_double_quant": _TRAINING,
        "optimizer_update_32bit": _TRAINING,
        "optimizer_update_8bit_blockwise": _TRAINING,
        "igemm": _CUBLAS,
        "batched_igemm": _CUBLAS,
        "create_linear_map": _MAPS,
        "create_fp8_map": _MAPS,
        "get_paged": "paged memory is for optimizer states",
    },
)

#: bitsandbytes' constants: 1 / 127 and 1 / 127^2.
_INVERSE = 7.874015718698502e-3
_INVERSE_SQUARED = 6.200124e-05

#: Columns whose products of two int8 sum to no more than 2^24, up to which float32 counts.
_EXACT_COLUMNS = 1024

#: Weights that quantize_blockwise holds in float64 at once.
_CHUNK = 1 << 20


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> Tensor:
    """The 256 values of the signed 8-bit dynamic map, float32; other arguments are not supported."""
    if (signed, max_exponent_bits, total_bits) != (True, 7, 8):
        what = f"create_dynamic_map({signed}, {max_exponent_bits}, {total_bits})"
        raise unsupported(what, "scales of weights use the signed map of 8 bits alone, others are for optimizers")
    return table("dynamic", torch.device("cpu")).clone()


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> Tensor:
    """NF4 as float32 [256]: its 16 values in order, the zero repeated. Without SciPy, and for the defaults alone."""
    if (offset, use_extra_value) != (0.9677083, True):
        what = f"create_normal_map({offset}, {use_extra_value})"
        raise unsupported(what, "NF4 is one table; lowbit_rs.codebooks.normal_float and quantile make others")
    values = torch.from_numpy(codebooks.nf4())
    return torch.cat([values[:7], torch.zeros(241), values[8:]])


def get_4bit_type(typename: str, device: torch.device | str | None = None, blocksize: int = 64) -> Tensor:  # noqa: ARG001
    """The 16 values of "nf4" or "fp4" by their codes, float32; on "cuda" by default, where there is one."""
    if typename not in QUANT_TYPES:
        reason = "quantize_4bit takes nf4 and fp4; lowbit_rs.codebooks has other tables, block_optimal among them"
        raise unsupported(f"typename {typename!r}", reason)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return table(typename, torch.device(device)).clone()


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """Packs a float tensor in NF4 or FP4: codes [ceil(n / 2), 1] in ``quant_storage``, and their state.

    A NaN or an infinity raises InvalidArgument, and a block of zeros decodes to zeros.
    """
    blocksize = 64 if blocksize is None else blocksize
    check(QuantState(A, blocksize=blocksize, quant_type=quant_type, dtype=A.dtype))
    packed = lowbit_rs.quantize(A.detach().reshape(1, -1), quant_type, blocksize, compress_statistics)
    state = of_packed(packed, A.shape)
    if absmax is not None:
        state.absmax = absmax.copy_(state.absmax)
    codes = packed.data.reshape(-1)
    padding = -codes.numel() % quant_storage.itemsize
    codes = torch.nn.functional.pad(codes, (0, padding)).view(quant_storage)[:, None]
    return codes if out is None else out.copy_(codes), state


def quantize_fp4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """``quantize_4bit`` in FP4."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def quantize_nf4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """``quantize_4bit`` in NF4."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def dequantize_4bit(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    """The tensor of packed codes, bit for bit as bitsandbytes decodes it.

    Without a state, ``absmax`` and ``out`` say what it would. Codes [1, n] give the transposed tensor.
    """
    if quant_state is None:
        if absmax is None or out is None:
            raise invalid("quant_state", None, "a QuantState, or absmax and out")
        blocksize = 64 if blocksize is None else blocksize
        quant_state = QuantState(absmax, out.shape, blocksize=blocksize, quant_type=quant_type, dtype=out.dtype)
    assert quant_state.shape is not None
    decoded = as_packed(A, quant_state).dequantize().reshape(quant_state.shape)
    result = decoded if out is None else out.copy_(decoded)
    return result.t() if A.shape[0] == 1 else result


def dequantize_fp4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """``dequantize_4bit`` from FP4."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def dequantize_nf4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """``dequantize_4bit`` from NF4."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[Tensor, QuantState]:
    """8-bit codes of the ascending table ``code`` (256 values, the dynamic map by default), uint8 in the shape of A.

    Each value over its block's absolute maximum goes to the nearest of the table, a tie to the even code.
    """
    if blocksize <= 0:
        raise invalid("blocksize", blocksize, "a positive integer")
    dtype_name(A.dtype, "A")
    code = (table("dynamic", A.device) if code is None else code.to(A.device)).clone()
    codes, maxima = _quantize_blockwise(A.detach().reshape(-1), code, blocksize)
    state = QuantState(maxima, code=code, blocksize=blocksize, dtype=A.dtype)
    if nested:
        state.offset = maxima.mean()
        state.absmax, state.state2 = quantize_blockwise(maxima - state.offset, blocksize=blocksize)
        state.nested = True
    if absmax is not None:
        state.absmax = absmax.copy_(state.absmax)
    codes = codes.reshape(A.shape)
    return codes if out is None else out.copy_(codes), state


def _quantize_blockwise(flat: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Codes and maxima of the blocks of a 1-D tensor."""
    midpoints = (code[:-1].double() + code[1:].double()) / 2  # exact, so that ties are seen
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    maxima = []
    step = max(1, _CHUNK // blocksize) * blocksize
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step].float()
        blocks = torch.nn.functional.pad(part, (0, -part.numel() % blocksize)).reshape(-1, blocksize)
        peak = blocks.abs().amax(1)
        maxima.append(peak)
        scaled = (blocks * torch.where(peak > 0, 1 / peak, 0)[:, None]).double().reshape(-1)[: part.numel()]
        below = torch.bucketize(scaled, midpoints)
        is_tie = midpoints[below.clamp(max=midpoints.numel() - 1)] == scaled
        codes[start : start + step] = torch.where(is_tie & (below % 2 == 1), below + 1, below).to(torch.uint8)
    return codes, torch.cat(maxima) if maxima else flat.new_empty(0, dtype=torch.float32)


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,  # noqa: ARG001  # ignored there, too: the state knows
) -> Tensor:
    """The values of 8-bit codes, in the state's dtype: a float32 product, rounded once."""
    if A.dtype != torch.uint8:
        raise invalid("A", A.dtype, "torch.uint8")
    if quant_state is None:
        if absmax is None:
            raise invalid("quant_state", None, "a QuantState, or absmax")
        code = table("dynamic", A.device) if code is None else code
        quant_state = QuantState(absmax, code=code, blocksize=blocksize, dtype=torch.float32)
    assert quant_state.code is not None
    assert quant_state.blocksize is not None
    values = quant_state.code.to(A.device)[A.reshape(-1).int()]
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % quant_state.blocksize))
    decoded = blocks.reshape(-1, quant_state.blocksize) * scales(quant_state).float()[:, None]
    result = decoded.reshape(-1)[: values.numel()].reshape(A.shape).to(quant_state.dtype)
    return result if out is None else out.copy_(result)


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,  # noqa: ARG001  # these two are ignored there, too
    transposed_B: bool = False,  # noqa: ARG001
    state: QuantState | None = None,
) -> Tensor:
    """``A @ W.T`` with W [N, K] in packed codes B; A may have any number of rows."""
    if state is None:
        raise invalid("state", None, "the QuantState of quantize_4bit")
    return matmul_4bit(A, B, state, out)


def matmul_4bit(
    A: Tensor,
    B: Tensor,
    quant_state: QuantState,
    out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``A @ W.T + bias`` with W [N, K] in packed codes B: [..., N] in the dtype of A, differentiable in A and bias.

    A weight that was quantized as [K, N] is multiplied as such, with bitsandbytes' DeprecationWarning.
    """
    if quant_state is None:
        raise invalid("quant_state", None, "the QuantState of quantize_4bit")
    shape = quant_state.shape
    if shape is None or len(shape) != 2:
        raise invalid("quant_state.shape", None if shape is None else list(shape), "[N, K]")
    tensors, scheme = operands(B, quant_state, shape)
    weight = list(tensors.values())
    if A.shape[-1] == shape[0] != shape[1]:
        warnings.warn(
            f"matmul_4bit: quant_state.shape is {list(shape)}, that of a weight [K, N]; quantize it as [N, K]",
            DeprecationWarning,
            stacklevel=2,
        )
        # A @ W: what the gradient of a linear layer computes.
        result: Tensor = torch.ops.lowbit_rs.linear_grad_input.default(A, weight, list(shape), *scheme)
        result = result if bias is None else result + bias.to(result.dtype)
    else:
        result = packed_linear(A, weight, shape, scheme, bias)
    return result if out is None else out.copy_(result)


def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows of A [M, K] in 8 bits: codes int8 [M, K], absolute maxima float32 [M], and columns with outliers.

    With a threshold, values of at least that magnitude are left out of maxima, and their columns are zero in the codes.
    """
    columns = None
    values = A.detach().float()
    if threshold > 0.0:
        outliers = values.abs() >= threshold
        columns = outliers.reshape(-1, values.shape[-1]).any(0).nonzero().reshape(-1)
        values = values.masked_fill(outliers, 0)
    maxima = values.abs().amax(-1)
    scale = torch.where(maxima > 0, 127.0 / maxima, 0)
    codes = torch.round(values * scale[..., None]).to(torch.int8)
    if columns is not None:
        codes[..., columns] = 0
    return codes, maxima, columns


def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """Rows of int8 codes [M, K] with their absolute maxima [M] as float32."""
    return A * stats.reshape(-1, 1) * _INVERSE


def int8_linear_matmul(A: Tensor, B: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.int32) -> Tensor:
    """``A @ B.T`` of int8 matrices [..., K] and [N, K], as exact int32 [..., N]."""
    for name, tensor in (("A", A), ("B", B)):
        if tensor.dtype != torch.int8:
            raise invalid(name, tensor.dtype, "torch.int8")
    if dtype != torch.int32:
        raise invalid("dtype", dtype, "torch.int32")
    result = torch.zeros((*A.shape[:-1], B.shape[0]), dtype=torch.int32, device=A.device)
    for start in range(0, A.shape[-1], _EXACT_COLUMNS):
        part = slice(start, start + _EXACT_COLUMNS)
        result += torch.matmul(A[..., part].float(), B[:, part].float().t()).to(torch.int32)
    return result if out is None else out.copy_(result)


def int8_mm_dequant(
    A: Tensor, row_stats: Tensor, col_stats: Tensor, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """A product of int8 matrices [..., N], int32, times the maxima of its rows and columns over 127^2, float16."""
    for name, tensor, dtype in (
        ("A", A, torch.int32),
        ("row_stats", row_stats, torch.float32),
        ("col_stats", col_stats, torch.float32),
    ):
        if tensor.dtype != dtype:
            raise invalid(name, tensor.dtype, str(dtype))
    flat = A.reshape(-1, A.shape[-1])
    result = flat * (row_stats.reshape(-1, 1) * col_stats.reshape(1, -1)) * _INVERSE_SQUARED
    result = (result if bias is None else result + bias).to(torch.float16).reshape(A.shape)
    return result if out is None else out.copy_(result)


@dataclass
class MatmulLtState:
    """The 8-bit weight of a product: codes ``CB`` int8 [N, K] and absolute maxima ``SCB`` float32 [N].

    ``threshold`` is the magnitude from which on activations are outliers, or 0 for none.
    """

    CB: Tensor | None = None
    SCB: Tensor | None = None
    idx: Tensor | None = None
    threshold: float = 0.0
    is_training: bool = True
    has_fp16_weights: bool = True
    use_pool: bool = False


def packed_rows(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> PackedWeight:
    """Row-wise int8 codes [N, K] with absolute maxima [N] as a packed weight; the codes are shared."""
    spec = make_spec(("int8", 0, "row", False))
    tensors = {"data": codes.detach(), "scale": (absmax.detach() / 127)[:, None]}
    return PackedWeight.from_tensors(spec, codes.shape, dtype, tensors)


def matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """``A @ W.T + bias`` with W [N, K] in 8 bits by row, [..., N] in the dtype of A.

    W is that of the state, or else B, quantized into the state. A is quantized by row where that is faster, as with
    many rows, but for columns that reach the threshold of the state, if that is not 0.
    """
    state = MatmulLtState() if state is None else state
    if threshold > 0.0:
        state.threshold = threshold
    if state.CB is None or state.SCB is None:
        state.CB, state.SCB, _ = int8_vectorwise_quant(B)
    packed = packed_rows(state.CB, state.SCB, _float_dtype(A))
    result = lowbit_rs.linear(A, packed, bias, activation="auto", threshold=state.threshold)
    return result if out is None else out.copy_(result)


def _float_dtype(A: Tensor) -> Any:
    dtype_name(A.dtype, "A")
    return A.dtype


__all__ = [
    "MatmulLtState",
    "QuantState",
    "create_dynamic_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "gemv_4bit",
    "get_4bit_type",
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "matmul",
    "matmul_4bit",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
]
