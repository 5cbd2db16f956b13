"""Functions on packed weights: quantize, linear, embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit_rs import _ops
from lowbit_rs._backends import Backend, backend_of
from lowbit_rs._native import use_torch
from lowbit_rs.errors import invalid
from lowbit_rs.packed import DTYPES, BlockSize, PackedWeight, Scheme, dtype_name, field_dtypes, make_spec, unpermuted

#: Values that codes stand for.
CodebookLike = Tensor | np.ndarray[Any, Any] | Sequence[float]

#: How activations may be rounded: ``activation`` of :func:`linear`, and the threshold, 0 for none.
Rounding = tuple[str, float]
EXACT: Rounding = ("none", 0.0)

#: Types whose values are those in their memory; other subclasses may mean anything by theirs.
_PLAIN_TYPES = (Tensor, torch.nn.Parameter, np.ndarray, np.memmap)

_KEY = torch._C.DispatchKey
_KEYS = torch._C.DispatchKeySet


def _raw(*keys: torch._C.DispatchKey) -> int:
    raw = 0
    for key in keys:
        raw |= _KEYS(key).raw_repr()
    return raw


#: Dispatch keys of an ordinary tensor of the CPU or of CUDA, and those that are always on for a thread. Any other key
#: stands for someone who has to see the operator: a tracer, a functorch transform, a tensor subclass, a mode, a lazy
#: negation, another device.
_PLAIN_TENSOR = _raw(
    _KEY.CPU,
    _KEY.CUDA,
    _KEY.ADInplaceOrView,
    _KEY.AutogradCPU,
    _KEY.AutogradCUDA,
    _KEY.AutocastCPU,
    _KEY.AutocastCUDA,
)
_PLAIN_THREAD = _raw(_KEY.BackendSelect, _KEY.ADInplaceOrView)

if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):  # from torch 2.10 on
    _GUARDS = torch._C._dynamo.guards
    use_torch(
        torch.Tensor.__dlpack_c_exchange_api__,
        [Tensor, torch.nn.Parameter],
        _PLAIN_THREAD,
        torch._C._dispatch_tls_local_include_set,
        torch._C._len_torch_function_stack,
        torch.is_grad_enabled,
        torch._C._is_any_autocast_enabled,
        torch.get_num_threads,
        [getattr(_GUARDS, f"_empty_strided_{device}", None) for device in ("cpu", "cuda")],
    )


def quantize(
    tensor: Tensor | np.ndarray[Any, Any],
    format: str = "nf4",
    block_size: BlockSize = 64,
    double_quant: bool = False,
    codebook: CodebookLike | None = None,
    nonfinite: str = "error",
    *,
    scale_dtype: torch.dtype | None = None,
    block_order: str = "row",
    signed_absmax: bool = False,
) -> PackedWeight:
    """Packs a matrix [N, K], or a stack of them [experts, N, K], in 4 or 8 bits.

    Each block of ``block_size`` consecutive weights of a row is stored as codes and a scale.

    - ``tensor``: float32, float16 or bfloat16 on the CPU or a CUDA device, of any strides; or a NumPy array, float32 or
      float16. The result lies on the same device.
    - ``format``: "nf4", "fp4", "int4", "int8", "uint4" and "uint8" (with a shift per block).
    - ``block_size``: a power of two from 16 to 4096, or "row" for one scale a row.
    - ``double_quant``: stores scales in 8 bits, with an fp32 scale for 256 of them (QLoRA, arXiv 2305.14314).
    - ``codebook``: 2 to 16 values that codes stand for, in any order; the format is then "custom".
    - ``nonfinite``: "error" refuses NaN and infinities, "propagate" turns the whole block of one into NaN.
    - ``scale_dtype``: storage of scales and shifts; float32 by default.
    - ``block_order``: "row" starts a new block with every row; "flat" lets blocks run on through the flattened matrix,
      as bitsandbytes does. They differ only where K is no multiple of the block size.
    - ``signed_absmax``: scales carry the sign of their block's largest weight (BOF4-S, arXiv 2505.06653); for custom
      codebooks.

    The result shares no memory with ``tensor`` and carries no gradient. Raises InvalidArgument, naming the argument,
    for any other value, for a wrong dtype or dimension, and for scales that overflow ``scale_dtype``.
    """
    source = _source(tensor)
    format = resolve_format(format, codebook)
    if nonfinite not in ("error", "propagate"):
        raise invalid("nonfinite", repr(nonfinite), '"error" or "propagate"')
    scale_name = "float32" if scale_dtype is None else dtype_name(scale_dtype, "scale_dtype")
    scheme = make_scheme(format, block_size, block_order, double_quant)
    spec = make_spec(scheme, scale_name, bool(signed_absmax))
    table = as_codebook(codebook) if spec.format == "custom" else None
    tensors = torch.ops.lowbit_rs.quantize.default(source, table, *scheme, scale_name, spec.signed_absmax, nonfinite)
    parts = dict(zip(field_dtypes(spec), tensors, strict=True))
    return PackedWeight.from_tensors(spec, source.shape, source.dtype, parts)


def linear(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    threshold: float | None = _ops.THRESHOLD,
) -> Tensor:
    """``torch.nn.functional.linear`` with a packed weight: ``x @ W.T + bias``.

    ``x`` is [..., K] in float32, float16 or bfloat16, ``packed`` [N, K] and ``bias`` [N] in any of these dtypes; the
    result is [..., N] in the dtype of x. Sums are fp32, with one rounding at the end; how exact their terms are, for
    which dtype, docs/cpu.md says. The weight is decoded on the fly. Differentiable in x and bias. Under autocast x is
    cast as F.linear casts it.

    ``activation="int8"`` allows x to be rounded to 8 bits, with a scale for a row beside int8 weights with a scale a
    row, as ``LLM.int8()`` does, and else for every 64 values; it is where that is faster. ``"auto"`` allows it beside
    the former weights alone, and takes it where it is much faster: with many tokens. Columns of x with a magnitude of
    ``threshold`` or more are left out of a whole row's rounding and multiplied as they are; 0 or None leaves out none
    but those with NaN and infinities. The relative error is about 0.9 % of the result for normal x, and gradients are
    those without it. docs/int8.md tells more. On CUDA, "int8" beside other weights is not supported.

    Raises InvalidArgument for shapes, dtypes and devices that do not go together, Unsupported for a device without
    kernels, and for an activation that the device does not round.
    """
    _ops.check_activation(activation)
    rounding = activation, _ops.check_threshold(threshold)
    weight, permutation = packed.operands(), packed.permutation
    return packed_linear(x, weight, packed.shape, packed.scheme, bias, permutation=permutation, rounding=rounding)


def embedding(input: Tensor, packed: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """Rows of a packed weight [N, K]: [*input.shape, K] in ``dtype``, by default that of the weight's source.

    ``input`` holds int64 or int32 indices, in any shape. Only the rows that are asked for are decoded. Raises
    InvalidArgument for an index outside [0, N).
    """
    dtype = packed.dtype if dtype is None else dtype
    return packed_embedding(input, packed.operands(), packed.shape, packed.scheme, dtype, packed.permutation)


def packed_linear(
    x: Tensor,
    weight: list[Tensor],
    shape: Sequence[int],
    scheme: Scheme,
    bias: Tensor | None,
    compute_dtype: torch.dtype | None = None,
    permutation: Tensor | None = None,
    rounding: Rounding = EXACT,
) -> Tensor:
    """:func:`linear` for a weight in parts: its operands in the order of fields, its shape and its scheme.

    With ``compute_dtype``, x is rounded to it, and the result comes back in the dtype that it has without. With
    ``permutation``, that of the weight's columns, the columns of x are put into the same order: a copy of x.
    ``rounding`` is activation and threshold, 0 for none.
    """
    x = _ordered(_autocast(x), shape[-1], permutation)
    if compute_dtype is not None and compute_dtype != x.dtype:
        return _linear(x.to(compute_dtype), weight, shape, scheme, bias, rounding).to(x.dtype)
    return _linear(x, weight, shape, scheme, bias, rounding)


def joined_linear(
    x: Tensor,
    backend: Backend[Any],
    view: Any,
    weight: list[Tensor],
    shape: Sequence[int],
    bias: Tensor | None,
    compute_dtype: torch.dtype | None,
    permutation: Tensor | None,
    rounding: Rounding,
) -> Tensor:
    """:func:`packed_linear` for a weight [N, K] in several pieces, where nobody watches.

    ``view`` is the backend's of the whole, ``weight`` the operands of any piece, which tell the device.
    """
    x, dtype = joined_input(x, shape[-1], compute_dtype, permutation)
    _ops.check_linear(x, bias, weight, shape)
    return backend.linear(view, x, bias, *rounding).to(dtype)


def joined_input(
    x: Tensor, width: int, compute_dtype: torch.dtype | None, permutation: Tensor | None
) -> tuple[Tensor, torch.dtype]:
    """x [..., K] as it is multiplied, where nobody watches, and the dtype of the product."""
    x = _ordered(_autocast(x), width, permutation)
    return x if compute_dtype is None else x.to(compute_dtype), x.dtype


def _ordered(x: Tensor, width: int, permutation: Tensor | None) -> Tensor:
    """The columns of x [..., K] in the order of a weight's; InvalidArgument where there is one, and not as many."""
    if permutation is None:
        return x
    if x.dim() == 0 or x.shape[-1] != width:
        raise invalid("x", f"shape {list(x.shape)}", f"[..., {width}]")
    return x.index_select(-1, permutation)


def _autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype that autocast asks for; it lets float64 be, as torch does."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type)) if x.dtype in DTYPES.values() else x


def _linear(
    x: Tensor, weight: list[Tensor], shape: Sequence[int], scheme: Scheme, bias: Tensor | None, rounding: Rounding
) -> Tensor:
    if torch.compiler.is_compiling() or not is_unwatched(x, bias):
        result: Tensor = torch.ops.lowbit_rs.linear.default(x, bias, weight, list(shape), *scheme, *rounding)
        return result
    _ops.check_linear(x, bias, weight, shape)
    backend, view = _ops.borrow(weight, shape, scheme)
    return backend.linear(view, x, bias, *rounding)


def packed_linear_grouped(
    x: Tensor,
    counts: Tensor,
    weight: list[Tensor],
    shape: Sequence[int],
    scheme: Scheme,
    compute_dtype: torch.dtype | None = None,
    activation: str = "none",
) -> Tensor:
    """Rows x [S, K], sorted by expert, times the matrices of a stack [experts, N, K]: [S, N] in the dtype of x.

    ``counts``, int64 [experts], says how many rows each expert gets; rows beyond their sum become zero. Parts of the
    weight, autocast, ``compute_dtype`` and ``activation`` are as in :func:`packed_linear`.
    """
    x = _autocast(x)
    multiply = torch.ops.lowbit_rs.linear_grouped.default
    result: Tensor
    if compute_dtype is not None and compute_dtype != x.dtype:
        result = multiply(x.to(compute_dtype), counts, weight, list(shape), *scheme, activation).to(x.dtype)
    else:
        result = multiply(x, counts, weight, list(shape), *scheme, activation)
    return result


def packed_embedding(
    input: Tensor,
    weight: list[Tensor],
    shape: Sequence[int],
    scheme: Scheme,
    dtype: torch.dtype,
    permutation: Tensor | None = None,
) -> Tensor:
    """:func:`embedding` for a weight in parts: its operands in the order of fields, its shape and its scheme."""
    if input.dtype not in (torch.int64, torch.int32):
        raise invalid("input", input.dtype, "torch.int64 or torch.int32")
    if len(shape) != 2:
        raise invalid("weight", f"shape {list(shape)}", "[N, K]: one matrix, not a stack of them")
    dtype_name(dtype)
    rows: Tensor = torch.ops.lowbit_rs.embedding.default(input, weight, list(shape), *scheme, dtype)
    return unpermuted(rows, permutation)


def is_unwatched(x: Tensor, bias: Tensor | None) -> bool:
    """Whether a call with these arguments may skip torch's dispatcher, which costs more than a small matrix does."""
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    return (
        not torch._C._dispatch_keys(x).raw_repr() & ~_PLAIN_TENSOR
        and not torch._C._dispatch_tls_local_include_set().raw_repr() & ~_PLAIN_THREAD
        and (bias is None or not torch._C._dispatch_keys(bias).raw_repr() & ~_PLAIN_TENSOR)
        and not torch._C._len_torch_function_stack()
    )


def _source(tensor: object) -> Tensor:
    """The tensor to be packed, detached; refuses by name what no kernel can read."""
    if not isinstance(tensor, Tensor | np.ndarray):
        raise invalid("tensor", type(tensor).__name__, "a torch.Tensor or a numpy.ndarray")
    if type(tensor) not in _PLAIN_TYPES:
        raise invalid("tensor", f"the subclass {type(tensor).__name__}", "a plain torch.Tensor or numpy.ndarray")
    source = _from_numpy(tensor) if isinstance(tensor, np.ndarray) else tensor.detach()
    if source.layout != torch.strided:
        raise invalid("tensor", f"a {source.layout} tensor", "a dense one: call .to_dense()")
    if source.is_meta:
        raise invalid("tensor", "a meta tensor, which has no values", "a tensor with values")
    backend_of(source.device)
    dtype_name(source.dtype, "tensor")
    if source.dim() not in (2, 3):
        raise invalid("tensor", f"shape {list(source.shape)}", "[N, K] or [experts, N, K]")
    return source.resolve_neg()


def _from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    """A tensor over the memory of ``array``, or over a copy where torch has no such strides or byte order."""
    native = array.dtype.newbyteorder("=")
    if native not in (np.float32, np.float16):
        raise invalid("tensor", f"a NumPy array of {array.dtype}", "float32 or float16 (bfloat16 as a torch tensor)")
    if not array.dtype.isnative or any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = np.ascontiguousarray(array, dtype=native)
    if not array.flags.writeable:
        array = np.asarray(_Writable(array))
    return torch.from_numpy(array)


class _Writable:
    """Presents a read-only array as a writable one, which torch asks for; nothing here writes to it."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.owner = array
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def resolve_format(format: str, codebook: object | None) -> str:
    """The format that is meant: a codebook makes it "custom"."""
    if codebook is None:
        return format
    if format not in ("nf4", "custom"):  # nf4 being the default, it may just not have been given
        raise invalid("format", f"{format!r} with a codebook", '"custom", or no codebook')
    return "custom"


def make_scheme(format: str, block_size: BlockSize, block_order: str, double_quant: bool) -> Scheme:
    """The scheme of these options. Raises InvalidArgument for a block size that cannot be one."""
    if block_size != "row" and (not isinstance(block_size, int) or isinstance(block_size, bool) or block_size < 1):
        raise invalid("block_size", repr(block_size), 'a power of two from 16 to 4096, or "row"')
    return format, 0 if block_size == "row" else block_size, block_order, bool(double_quant)


def as_codebook(values: CodebookLike | None) -> Tensor:
    """The values of a custom codebook as a float32 CPU tensor of its own. Raises InvalidArgument if there are none."""
    if values is None:
        raise invalid("codebook", None, 'the 2 to 16 values of format "custom"')
    try:
        table = torch.as_tensor(values, device="cpu").detach().to(torch.float32).contiguous().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise invalid("codebook", type(values).__name__, "2 to 16 numbers") from error
    if table.dim() != 1 or not 2 <= table.numel() <= 16:
        raise invalid("codebook", f"shape {list(table.shape)}", "2 to 16 values")
    return table
