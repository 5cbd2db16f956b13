"""RMSNorm and LayerNorm in fp64, how far fp32 may be from them, and what hypothesis draws for both."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from lowbit_rs._norm_ops import NormKind
from lowbit_rs.nn.norm import normalize
from strategies import DTYPES

KINDS = {
    "plain": NormKind(1e-6),
    "llama": NormKind(1e-5, cast_before_weight=True),
    "gemma": NormKind(1e-6, unit_offset=True),
    "layer": NormKind(1e-5, centered=True),
    "layer_offset": NormKind(1e-5, centered=True, unit_offset=True),
}


def exact(x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: NormKind) -> tuple[Tensor, Tensor]:
    """The normalized rows in fp64, and how far from them a result in the dtype of x may be.

    With u the unit roundoff of fp32, a sum of K squares in any order is off by at most K u of itself, and the root
    halves that; a mean is off by K u mean|x|, which moves every number by as much over s. Four more roundings follow,
    then one or two to the dtype. Twice that is allowed, for what is of second order.
    """
    rows = x.double()
    width = rows.shape[-1]
    unit = 2.0**-24
    mean = rows.mean(-1, keepdim=True) if kind.centered else torch.zeros_like(rows[..., :1])
    of_mean = width * unit * rows.abs().mean(-1, keepdim=True) if kind.centered else torch.zeros_like(mean)
    scale = ((rows - mean).square().mean(-1, keepdim=True) + kind.eps).sqrt()
    normalized = (rows - mean) / scale
    of_normalized = normalized.abs() * (width + 8) * unit + (of_mean + (rows.abs() + mean.abs()) * unit) / scale
    # The mean's own error enters the squares, too: relative to s, at most that of a number.
    of_normalized = of_normalized + normalized.abs() * of_mean / scale
    factor = torch.ones((), dtype=torch.float64, device=x.device) if weight is None else weight.double()
    factor = factor + (1 if kind.unit_offset and weight is not None else 0)
    y = normalized * factor
    roundoff = torch.finfo(x.dtype).eps / 2
    if kind.cast_before_weight:
        of_normalized = of_normalized + normalized.abs() * roundoff + torch.finfo(x.dtype).smallest_normal
    if bias is not None:
        y = y + bias.double()
    bound = of_normalized * factor.abs() + (y.abs() + (normalized * factor).abs()) * unit
    return y, 2 * (bound + y.abs() * roundoff) + torch.finfo(x.dtype).smallest_normal


def assert_exact(y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: NormKind) -> None:
    """That ``y`` is as near to the exact result as its arithmetic allows."""
    wanted, bound = exact(x, weight, bias, kind)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    distance = (y.double() - wanted).abs()
    assert bool((distance <= bound).all()), f"{float((distance / bound).max())} times the bound"


def assert_gradients(
    grad: Tensor, total_grad: Tensor | None, x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: NormKind
) -> None:
    """That autograd through ``normalize`` gives what it gives through the formula in fp64.

    With ``total_grad``, x is added to a residual of zeros, and that is the gradient of the sum.
    """
    tensors = {name: part for name, part in (("x", x), ("weight", weight), ("bias", bias)) if part is not None}
    inputs = {name: part.detach().requires_grad_() for name, part in tensors.items()}
    wide = {name: part.detach().double().requires_grad_() for name, part in tensors.items()}
    residual = None if total_grad is None else torch.zeros_like(x)
    results = normalize(inputs["x"], residual, inputs.get("weight"), inputs.get("bias"), kind)
    formula = wide["x"] - wide["x"].mean(-1, keepdim=True) if kind.centered else wide["x"]
    inverse = (formula.square().mean(-1, keepdim=True) + kind.eps).rsqrt()
    factors = wide["weight"] + kind.unit_offset if weight is not None else torch.ones_like(inverse)
    formula = formula * inverse * factors + wide.get("bias", 0)
    grads = [part for part in (grad, total_grad) if part is not None]
    mine = torch.autograd.grad([part for part in results if part is not None], list(inputs.values()), grads)
    wanted = torch.autograd.grad([formula, wide["x"]][: len(grads)], list(wide.values()), [g.double() for g in grads])
    sizes = grad.double().abs().sum(tuple(range(grad.dim() - 1)))  # what sums over rows are made of
    for name, got, expected in zip(inputs, mine, wanted, strict=True):
        assert got.dtype == tensors[name].dtype
        # Sums are fp32. Gradients to x cancel in them, where a row hardly varies to next to nothing of their terms.
        summed = expected.abs().amax(-1, keepdim=True) if name == "x" else 8 * sizes
        terms = (grad * factors).abs().amax(-1, keepdim=True) * inverse if name == "x" else torch.zeros_like(sizes)
        numbers = torch.finfo(got.dtype)
        bound = numbers.eps * expected.abs() + 1e-5 * summed + 5e-7 * terms + numbers.smallest_normal
        distance = (got.double() - expected).abs()
        assert bool((distance <= bound).all()), f"{name}: {float((distance / bound).max())} times the bound"


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, NormKind]:
    """x, residual, weight, bias and kind, of any widths and dtypes."""
    dtype = draw(st.sampled_from(DTYPES))
    kind = draw(st.sampled_from(list(KINDS.values())))
    shape = (*draw(st.lists(st.integers(1, 5), max_size=2)), draw(st.integers(1, 300)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def drawn(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        values = torch.randn(size, generator=generator) * 2.0 ** draw(st.integers(-12, 6)) + draw(st.integers(-2, 2))
        return values.to(dtype)

    def column() -> Tensor | None:
        return drawn(shape[-1], dtype=draw(st.sampled_from(DTYPES))) if draw(st.booleans()) else None

    residual = drawn(*shape) if draw(st.booleans()) else None
    return drawn(*shape), residual, column(), column(), kind
