"""The operators of this package in torch's registry: schemas, implementations, shapes for tracing (fakes), gradients.

A packed weight enters an operator as the list of its tensors, its shape ([N, K] or [experts, N, K]) and its scheme:
what the tensors do not show (lowbit_rs.packed.Scheme). ``lowbit_rs.functional`` calls these operators, or the same
kernels directly where nobody watches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowbit_rs._backends import Backend, backend_of
from lowbit_rs.errors import invalid
from lowbit_rs.packed import Scheme, dtype_name, field_dtypes, make_spec, matrix_of, storage

_Function = TypeVar("_Function", bound=Callable[..., Any])

_library = torch.library.Library("lowbit_rs", "DEF")
_SCHEME = "str format, int block_size, str block_order, bool double_quant"
_WEIGHT = f"Tensor[] weight, SymInt[] shape, {_SCHEME}"

for _schema in (
    f"quantize(Tensor source, Tensor? codebook, {_SCHEME}, str scale_dtype, bool signed_absmax, str nonfinite) "
    "-> Tensor[]",
    f"dequantize({_WEIGHT}, ScalarType dtype) -> Tensor",
    f"embedding(Tensor input, {_WEIGHT}, ScalarType dtype) -> Tensor",
    # No argument has a default: autograd of torch before 2.15 loses those that are equal to it.
    f"linear(Tensor x, Tensor? bias, {_WEIGHT}, str activation, float threshold) -> Tensor",
    f"linear_grad_input(Tensor grad, {_WEIGHT}) -> Tensor",
    f"linear_grouped(Tensor x, Tensor counts, {_WEIGHT}, str activation) -> Tensor",
    f"linear_grouped_grad_input(Tensor grad, Tensor counts, {_WEIGHT}) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _implement(name: str) -> Callable[[_Function], _Function]:
    """Registers a function for every device, so that one without kernels gets our error and not the dispatcher's."""

    def register(function: _Function) -> _Function:
        _library.impl(name, function, "CompositeExplicitAutograd")
        return function

    return register


def _fake(name: str) -> Callable[[_Function], _Function]:
    def register(function: _Function) -> _Function:
        torch.library.register_fake(f"lowbit_rs::{name}", function, lib=_library)
        return function

    return register


def borrow(weight: Sequence[Tensor], shape: Sequence[int], scheme: Scheme) -> tuple[Backend[Any], Any]:
    """The backend of a weight and a view of its tensors, which the caller keeps alive."""
    stored = _scale_position(scheme)
    spec = make_spec(scheme) if stored is None else make_spec(scheme, dtype_name(weight[stored].dtype, "scale"))
    backend = backend_of(weight[0].device)
    return backend, backend.view(spec, shape, weight)


@lru_cache(maxsize=1024)
def _scale_position(scheme: Scheme) -> int | None:
    """Which tensor of a weight shows how scales are stored: the scale, or after double quantization the shift."""
    fields = list(field_dtypes(make_spec(scheme)))
    name = "shift" if scheme[3] else "scale"
    return fields.index(name) if name in fields else None


ACTIVATIONS = ("none", "int8", "auto")

#: The smallest magnitude of an activation that is not rounded to int8, as in bitsandbytes' configs.
THRESHOLD = 6.0


def check_activation(activation: str) -> None:
    """Raises InvalidArgument unless ``activation`` is a way to round activations."""
    if activation not in ACTIVATIONS:
        raise invalid("activation", repr(activation), " or ".join(f'"{name}"' for name in ACTIVATIONS))


def check_threshold(threshold: float | None) -> float:
    """The threshold as operators take it, 0 for None. Raises InvalidArgument for what is none."""
    if threshold is None:
        return 0.0
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < math.inf:
        raise invalid("threshold", repr(threshold), "a positive number, or 0 or None for no outliers")
    return float(threshold)


def check_linear(x: Tensor, bias: Tensor | None, weight: Sequence[Tensor], shape: Sequence[int]) -> None:
    """Raises InvalidArgument unless x [..., K], bias [N] and a weight [N, K] go together."""
    if len(shape) != 2:
        raise invalid("weight", f"shape {list(shape)}", "[N, K]: one matrix, not a stack of them")
    _check_rows("x", x, shape[1], weight)
    if bias is None:
        return
    dtype_name(bias.dtype, "bias")
    if bias.dim() != 1 or bias.shape[0] != shape[0]:
        raise invalid("bias", f"shape {list(bias.shape)}", f"[{shape[0]}]")
    _check_device("bias", bias, weight)


def _check_rows(argument: str, x: Tensor, width: int, weight: Sequence[Tensor]) -> None:
    dtype_name(x.dtype, argument)
    if x.dim() == 0 or x.shape[-1] != width:
        raise invalid(argument, f"shape {list(x.shape)}", f"[..., {width}]")
    _check_device(argument, x, weight)


def _check_device(argument: str, tensor: Tensor, weight: Sequence[Tensor]) -> None:
    if tensor.device != weight[0].device:
        raise invalid(argument, f"a tensor on {tensor.device}", f"one on {weight[0].device}, where the weight lies")


@_implement("quantize")
def _quantize(
    source: Tensor,
    codebook: Tensor | None,
    format: str,
    block_size: int,
    block_order: str,
    double_quant: bool,
    scale_dtype: str,
    signed_absmax: bool,
    nonfinite: str,
) -> list[Tensor]:
    spec = make_spec((format, block_size, block_order, double_quant), scale_dtype, signed_absmax)
    return backend_of(source.device).quantize(source, codebook, spec, nonfinite)


@_fake("quantize")
def _quantize_fake(
    source: Tensor,
    codebook: Tensor | None,
    format: str,
    block_size: int,
    block_order: str,
    double_quant: bool,
    scale_dtype: str,
    signed_absmax: bool,
    nonfinite: str,
) -> list[Tensor]:
    spec = make_spec((format, block_size, block_order, double_quant), scale_dtype, signed_absmax)
    sizes = storage(spec, source.shape, None if codebook is None else codebook.numel())
    return [source.new_empty(size, dtype=dtype) for size, dtype in sizes.values()]


@_implement("dequantize")
def _dequantize(
    weight: list[Tensor],
    shape: list[int],
    format: str,
    block_size: int,
    block_order: str,
    double_quant: bool,
    dtype: torch.dtype,
) -> Tensor:
    backend, view = borrow(weight, shape, (format, block_size, block_order, double_quant))
    return backend.dequantize(view, shape, dtype)


@_fake("dequantize")
def _dequantize_fake(
    weight: list[Tensor],
    shape: list[int],
    format: str,
    block_size: int,
    block_order: str,
    double_quant: bool,
    dtype: torch.dtype,
) -> Tensor:
    return weight[0].new_empty(shape, dtype=dtype)


@_implement("embedding")
def _embedding(
    input: Tensor,
    weight: list[Tensor],
    shape: list[int],
    format: str,
    block_size: int,
    block_order: str,
    double_quant: bool,
    dtype: torch.dtype,
) -> Tensor:
    _check_device("input", input, weight)
    backend, view = borrow(weight, shape, (format, block_size, block_order, double_quant))
    return backend.embedding(view, input, dtype)


@_fake("embedding")
def _embedding_fake(
    input: Tensor,
    weight: list[Tensor],
    shape: list[int],
    format: str,
    block_size: int,
    block_order: str,
    double_quant: bool,
    dtype: torch.dtype,
) -> Tensor:
    return input.new_empty((*input.shape, shape[-1]), dtype=dtype)


@_implement("linear")
def _linear(
    x: Tensor,
    bias: Tensor | None,
    weight: list[Tensor],
    shape: list[int],
    format: str,
    block_size: int,
    block_order: str,
    double_quant: bool,
    activation: str,
    threshold: float,
) -> Tensor:
    check_linear(x, bias, weight, shape)
    backend, view = borrow(weight, shape, (format, block_size, block_order, double_quant))
    return backend.linear(view, x, bias, activation, threshold)


@_fake("linear")
def _linear_fake(
    x: Tensor,
    bias: Tensor | None,
    weight: list[Tensor],
    shape: list[int],
    format: str,
    block_size: int,
    block_order: str,
    double_quant: bool,
    activation: str,
    threshold: float,
) -> Tensor:
    check_linear(x, bias, weight, shape)
    return x.new_empty((*x.shape[:-1], shape[0]))


@_implement("linear_grad_input")
def _linear_grad_input(
    grad: Tensor,
    weight: list[Tensor],
    shape: list[int],
    format: str,
    block_size: int,
    block_order: str,
    double_quant: bool,
) -> Tensor:
    _check_rows("grad", grad, shape[0], weight)
    backend, view = borrow(weight, shape, (format, block_size, block_order, double_quant))
    return backend.linear_grad_input(view, grad)


@_fake("linear_grad_input")
def _linear_grad_input_fake(
    grad: Tensor,
    weight: list[Tensor],
    shape: list[int],
    format: str,
    block_size: int,
    block_order: str,
    double_quant: bool,
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], shape[1]))


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _x, bias, weight, *ctx.rest, _activation, _threshold = inputs
    ctx.save_for_backward(*weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward_linear(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """``y = x W^T + b``: the gradient to x is ``grad W``, to b the sum of grad over tokens; W is frozen."""
    needs_x, needs_bias, *_ = ctx.needs_input_grad
    weight = list(ctx.saved_tensors)  # once: under checkpointing, reading them runs the forward again
    grad_x = grad_bias = None
    if needs_x:
        grad_x = torch.ops.lowbit_rs.linear_grad_input.default(grad, weight, *ctx.rest)
    if needs_bias:
        rows = grad.reshape(math.prod(grad.shape[:-1]), grad.shape[-1])
        grad_bias = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, grad_bias, [None] * len(weight), *[None] * len(ctx.rest), None, None


def _save_linear_grad_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _grad, weight, *ctx.rest = inputs
    ctx.save_for_backward(*weight)


def _backward_linear_grad_input(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """``dx = dy W`` is linear in dy: its gradient is ``linear`` without a bias."""
    weight = list(ctx.saved_tensors)
    grad_grad = torch.ops.lowbit_rs.linear.default(grad, None, weight, *ctx.rest, "none", 0.0)
    return grad_grad, [None] * len(weight), *[None] * len(ctx.rest)


torch.library.register_autograd("lowbit_rs::linear", _backward_linear, setup_context=_save_linear, lib=_library)
torch.library.register_autograd(
    "lowbit_rs::linear_grad_input", _backward_linear_grad_input, setup_context=_save_linear_grad_input, lib=_library
)


def _grouped(
    multiply: Callable[[Backend[Any], Any, Tensor], Tensor],
    rows: Tensor,
    width: int,
    counts: Tensor,
    weight: list[Tensor],
    shape: list[int],
    scheme: Scheme,
) -> Tensor:
    """``rows`` [S, ...], sorted by matrix, times the matrices of a stack: [S, width].

    ``counts`` [experts] says how many rows each matrix gets; the rows beyond become zero.
    """
    out = rows.new_zeros((rows.shape[0], width))
    start = 0
    for index, count in enumerate(counts.tolist()):
        if count:
            own = slice(start, start + count)
            tensors, own_scheme = matrix_of(weight, scheme, index)
            backend, view = borrow(tensors, shape[1:], own_scheme)
            out[own] = multiply(backend, view, rows[own])
            start += count
    return out


def _check_grouped(
    argument: str, x: Tensor, width: int, counts: Tensor, weight: list[Tensor], shape: list[int]
) -> None:
    if len(shape) != 3:
        raise invalid("weight", f"shape {list(shape)}", "a stack [experts, N, K]")
    if x.dim() != 2:
        raise invalid(argument, f"shape {list(x.shape)}", f"[rows, {width}]")
    _check_rows(argument, x, width, weight)
    if counts.dtype != torch.int64 or tuple(counts.shape) != (shape[0],):
        raise invalid("counts", f"{counts.dtype} {list(counts.shape)}", f"torch.int64 [{shape[0]}]")


@_implement("linear_grouped")
def _linear_grouped(
    x: Tensor,
    counts: Tensor,
    weight: list[Tensor],
    shape: list[int],
    format: str,
    block_size: int,
    block_order: str,
    double_quant: bool,
    activation: str,
) -> Tensor:
    _check_grouped("x", x, shape[-1], counts, weight, shape)
    scheme = (format, block_size, block_order, double_quant)
    backend, view = borrow(weight, shape, scheme)
    if activation == "none" or backend.rounded_from(view, activation, x.dtype) is None:
        product = backend.linear_grouped(view, shape[0], x, counts)
        if product is not None:
            return product
    return _grouped(
        lambda backend, view, rows: backend.linear(view, rows, None, activation, 0.0),
        x,
        shape[1],
        counts,
        weight,
        shape,
        scheme,
    )


@_fake("linear_grouped")
def _linear_grouped_fake(
    x: Tensor,
    counts: Tensor,
    weight: list[Tensor],
    shape: list[int],
    format: str,
    block_size: int,
    block_order: str,
    double_quant: bool,
    activation: str,
) -> Tensor:
    return x.new_empty((x.shape[0], shape[1]))


@_implement("linear_grouped_grad_input")
def _linear_grouped_grad_input(
    grad: Tensor,
    counts: Tensor,
    weight: list[Tensor],
    shape: list[int],
    format: str,
    block_size: int,
    block_order: str,
    double_quant: bool,
) -> Tensor:
    _check_grouped("grad", grad, shape[1], counts, weight, shape)
    scheme = (format, block_size, block_order, double_quant)
    return _grouped(
        lambda backend, view, rows: backend.linear_grad_input(view, rows), grad, shape[2], counts, weight, shape, scheme
    )


@_fake("linear_grouped_grad_input")
def _linear_grouped_grad_input_fake(
    grad: Tensor,
    counts: Tensor,
    weight: list[Tensor],
    shape: list[int],
    format: str,
    block_size: int,
    block_order: str,
    double_quant: bool,
) -> Tensor:
    return grad.new_empty((grad.shape[0], shape[2]))


def _save_linear_grouped(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _x, counts, weight, *ctx.rest, _activation = inputs
    ctx.save_for_backward(counts, *weight)


def _backward_linear_grouped(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """As that of ``linear``, matrix by matrix."""
    counts, *weight = ctx.saved_tensors
    grad_x = torch.ops.lowbit_rs.linear_grouped_grad_input.default(grad, counts, weight, *ctx.rest)
    return grad_x, None, [None] * len(weight), *[None] * len(ctx.rest), None


def _save_linear_grouped_grad_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _grad, counts, weight, *ctx.rest = inputs
    ctx.save_for_backward(counts, *weight)


def _backward_linear_grouped_grad_input(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """As that of ``linear_grad_input``, matrix by matrix."""
    counts, *weight = ctx.saved_tensors
    grad_grad = torch.ops.lowbit_rs.linear_grouped.default(grad, counts, weight, *ctx.rest, "none")
    return grad_grad, None, [None] * len(weight), *[None] * len(ctx.rest)


torch.library.register_autograd(
    "lowbit_rs::linear_grouped", _backward_linear_grouped, setup_context=_save_linear_grouped, lib=_library
)
torch.library.register_autograd(
    "lowbit_rs::linear_grouped_grad_input",
    _backward_linear_grouped_grad_input,
    setup_context=_save_linear_grouped_grad_input,
    lib=_library,
)
