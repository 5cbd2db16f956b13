"""The operators of RMSNorm and LayerNorm in torch's registry: schemas, implementations, fakes, gradients.

What is computed of every row of ``t = x``, or of ``t = x + residual`` rounded to its dtype, is

    y = (t - mean) / sqrt(mean((t - mean)^2) + eps) * weight + bias

in fp32 with one rounding at the end; RMSNorm has a mean of 0. A :class:`NormKind` says which it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbit_rs._backends import backend_of, cuda
from lowbit_rs.errors import invalid
from lowbit_rs.packed import dtype_name


class NormKind(NamedTuple):
    """Which normalization: what operators and kernels take beside the tensors."""

    #: What is added to the mean square.
    eps: float
    #: Whether the mean is subtracted (LayerNorm).
    centered: bool = False
    #: Whether the factor is ``1 + weight`` (Gemma).
    unit_offset: bool = False
    #: Whether the normalized number is rounded to the dtype before it is multiplied by the weight (Llama).
    cast_before_weight: bool = False


_library = torch.library.Library("lowbit_rs", "FRAGMENT")
_KIND = "float eps, bool centered, bool unit_offset, bool cast_before_weight"
_OPERANDS = f"Tensor? weight, Tensor? bias, {_KIND}"

for _schema in (
    f"norm(Tensor x, {_OPERANDS}) -> Tensor",
    f"norm_residual(Tensor x, Tensor residual, {_OPERANDS}) -> (Tensor, Tensor)",
    f"norm_backward(Tensor rows, Tensor grad, Tensor? grad_total, Tensor? weight, {_KIND}, bool needs_rows, "
    "bool needs_columns) -> (Tensor, Tensor)",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def check_norm(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
    """Raises InvalidArgument unless x [..., K], residual like x, weight [K] and bias [K] go together."""
    dtype_name(x.dtype, "x")
    if x.dim() == 0:
        raise invalid("x", "shape []", "[..., K]")
    if residual is not None and (residual.dtype != x.dtype or residual.shape != x.shape):
        got = f"{residual.dtype} {list(residual.shape)}"
        raise invalid("residual", got, f"{x.dtype} {list(x.shape)}, as x is")
    for name, column in (("weight", weight), ("bias", bias)):
        if column is None:
            continue
        dtype_name(column.dtype, name)
        if column.dim() != 1 or column.shape[0] != x.shape[-1]:
            raise invalid(name, f"shape {list(column.shape)}", f"[{x.shape[-1]}]")
    for name, tensor in (("residual", residual), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise invalid(name, f"a tensor on {tensor.device}", f"one on {x.device}, where x lies")


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *kind: Any) -> Tensor:
    check_norm(x, None, weight, bias)
    return backend_of(x.device).norm(x, None, weight, bias, kind)[0]


def _norm_fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, *_kind: Any) -> Tensor:
    check_norm(x, None, weight, bias)
    return x.new_empty(x.shape)


def _norm_residual(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, *kind: Any
) -> tuple[Tensor, Tensor]:
    check_norm(x, residual, weight, bias)
    y, total = backend_of(x.device).norm(x, residual, weight, bias, kind)
    assert total is not None
    return y, total


def _norm_residual_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, *_kind: Any
) -> tuple[Tensor, Tensor]:
    check_norm(x, residual, weight, bias)
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *kind = inputs
    _save(ctx, x, weight, bias, kind)


def _save_norm_residual(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _x, _residual, weight, bias, *kind = inputs
    _save(ctx, output[1], weight, bias, kind)


def _save(ctx: Any, rows: Tensor, weight: Tensor | None, bias: Tensor | None, kind: list[Any]) -> None:
    ctx.save_for_backward(rows, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.kind = NormKind(*kind)


def _backward_norm(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gradients = _gradients(ctx, grad, None, ctx.needs_input_grad[:3])
    return *gradients, *[None] * len(ctx.kind)


def _backward_norm_residual(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Any, ...]:
    needs_x, needs_residual, *needs_columns = ctx.needs_input_grad[:4]
    needs = (needs_x or needs_residual, *needs_columns)
    of_rows, of_weight, of_bias = _gradients(ctx, grad, grad_total, needs)
    of_x, of_residual = of_rows if needs_x else None, of_rows if needs_residual else None
    return of_x, of_residual, of_weight, of_bias, *[None] * len(ctx.kind)


def _gradients(ctx: Any, grad: Tensor, grad_total: Tensor | None, needs: tuple[bool, ...]) -> tuple[Any, ...]:
    """The gradients to rows, weight and bias; ``grad_total``, that of the rows from elsewhere, is added to the first.

    With n = (t - mean) / s and g = grad * weight: ``(g - mean(g) - n mean(g n)) / s`` to t, and to the weight the sum
    of ``grad * n`` over rows. Statistics are computed anew, which costs less than keeping them would in memory. On
    a GPU a kernel does all that, unless somebody asks for gradients of the gradients.
    """
    rows, weight = ctx.saved_tensors
    needs_rows, needs_weight, needs_bias = needs
    if not rows.is_cuda or torch.is_grad_enabled():
        return _composed_gradients(ctx, grad, grad_total, needs)
    grad = grad.to(rows.dtype)
    # The bias of a norm that is not centered, which hardly any has, is not the kernel's.
    needs_columns = needs_weight or (needs_bias and ctx.kind.centered)
    of_rows, sums = torch.ops.lowbit_rs.norm_backward.default(
        rows, grad, grad_total, weight, *ctx.kind, needs_rows, needs_columns
    )
    of_bias = None
    if needs_bias:
        of_bias = (sums[1] if ctx.kind.centered else _sum_of_rows(grad.float())).to(ctx.bias_dtype)
    return of_rows if needs_rows else None, sums[0].to(weight.dtype) if needs_weight else None, of_bias


def _norm_backward(
    rows: Tensor, grad: Tensor, grad_total: Tensor | None, weight: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    *kind, needs_rows, needs_columns = rest
    return cuda.norm_backward(rows, grad, grad_total, weight, kind, (needs_rows, needs_columns))


def _norm_backward_fake(
    rows: Tensor,
    grad: Tensor,
    grad_total: Tensor | None,
    weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    *kind, needs_rows, needs_columns = rest
    sums = (1 + kind[1], rows.shape[-1]) if needs_columns else (0,)
    return rows.new_empty(rows.shape if needs_rows else (0,)), rows.new_empty(sums, dtype=torch.float32)


def _composed_gradients(
    ctx: Any, grad: Tensor, grad_total: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """``_gradients`` made of operations of torch in fp32: differentiable in turn."""
    rows, weight = ctx.saved_tensors
    kind, dtype = ctx.kind, rows.dtype
    rows, grad = rows.float(), grad.float()
    if kind.centered:
        rows = rows - rows.mean(-1, keepdim=True)
    inverse = (rows.square().mean(-1, keepdim=True) + kind.eps).rsqrt()
    normalized = rows * inverse
    needs_rows, needs_weight, needs_bias = needs
    of_rows = of_weight = of_bias = None
    if needs_rows:
        scaled = grad if weight is None else grad * (weight.float() + float(kind.unit_offset))
        of_rows = scaled - normalized * (scaled * normalized).mean(-1, keepdim=True)
        if kind.centered:
            of_rows = of_rows - scaled.mean(-1, keepdim=True)
        of_rows = of_rows * inverse
        of_rows = (of_rows if grad_total is None else of_rows + grad_total).to(dtype)
    if needs_weight:
        of_weight = _sum_of_rows(grad * normalized).to(weight.dtype)
    if needs_bias:
        of_bias = _sum_of_rows(grad).to(ctx.bias_dtype)
    return of_rows, of_weight, of_bias


def _sum_of_rows(tensor: Tensor) -> Tensor:
    return tensor.sum(list(range(tensor.dim() - 1))) if tensor.dim() > 1 else tensor


for _name, _function, _fake, _backward, _setup in (
    ("norm", _norm, _norm_fake, _backward_norm, _save_norm),
    ("norm_residual", _norm_residual, _norm_residual_fake, _backward_norm_residual, _save_norm_residual),
):
    # For every device, so that one without kernels gets our error and not the dispatcher's.
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lowbit_rs::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"lowbit_rs::{_name}", _backward, setup_context=_setup, lib=_library)

_library.impl("norm_backward", _norm_backward, "CUDA")
torch.library.register_fake("lowbit_rs::norm_backward", _norm_backward_fake, lib=_library)
