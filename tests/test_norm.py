"""RMSNorm and LayerNorm: against fp64 and torch, their gradients, the modules, and putting them into models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

import lowbit_rs
from lowbit_rs import InvalidArgument, _native
from lowbit_rs._norm_ops import NormKind
from lowbit_rs.nn import LayerNorm, RMSNorm
from lowbit_rs.nn.norm import normalize
from norms import KINDS, assert_exact, cases

Case = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, NormKind]


@given(cases())
def test_norms_are_exact(case: Case) -> None:
    x, residual, weight, bias, kind = case
    for isa in _native.available_isas():
        _native.force_isa(isa)
        try:
            y, total = normalize(x, residual, weight, bias, kind)
        finally:
            _native.force_isa(None)
        if residual is None:
            assert total is None
            assert_exact(y, x, weight, bias, kind)
        else:
            assert total is not None
            assert torch.equal(total, x + residual)
            assert_exact(y, x + residual, weight, bias, kind)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("threads", [1, 3])
def test_many_rows_on_many_threads(threads: int, dtype: torch.dtype) -> None:
    x, residual = torch.randn(50, 3000).to(dtype), torch.randn(50, 3000).to(dtype)
    weight = torch.randn(3000)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y, total = normalize(x, residual, weight, None, KINDS["gemma"])
    finally:
        torch.set_num_threads(before)
    assert total is not None
    assert torch.equal(total, x + residual)
    assert_exact(y, total, weight, None, KINDS["gemma"])


def test_strides_and_addresses_do_not_matter(dtype: torch.dtype) -> None:
    x = torch.randn(6, 40).to(dtype)
    weight = torch.randn(40).to(dtype)
    wanted, _ = normalize(x, None, weight, None, KINDS["plain"])
    wide = torch.cat([x, x], -1)[:, :40]
    odd = torch.zeros(x.numel() + 1, dtype=dtype)[1:].view(6, 40).copy_(x)
    for same in (x.T.contiguous().T, wide, odd):
        assert torch.equal(normalize(same, None, weight.repeat(2)[:40], None, KINDS["plain"])[0], wanted)
        total = normalize(x, same, weight, None, KINDS["plain"])[1]
        assert total is not None
        assert torch.equal(total, x + x)


def test_empty_tensors() -> None:
    assert RMSNorm(8)(torch.empty(0, 8)).shape == (0, 8)
    assert LayerNorm(8)(torch.empty(3, 0, 8)).shape == (3, 0, 8)
    y, total = RMSNorm(8)(torch.empty(0, 8), torch.empty(0, 8))
    assert y.shape == total.shape == (0, 8)


def test_nan_stays_in_its_row() -> None:
    x = torch.randn(3, 16)
    x[1, 2] = torch.nan
    for norm in (RMSNorm(16), LayerNorm(16)):
        y = norm(x)
        assert bool(y[1].isnan().all())
        assert bool(y[[0, 2]].isfinite().all())


def with_random_parameters(norm: nn.Module) -> nn.Module:
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


MODULES: dict[str, tuple[Any, Any]] = {
    "rms": (RMSNorm(24), nn.RMSNorm(24)),
    "rms_eps": (RMSNorm(24, 1e-3), nn.RMSNorm(24, 1e-3)),
    "rms_bare": (RMSNorm(24, elementwise_affine=False), nn.RMSNorm(24, elementwise_affine=False)),
    "rms_planes": (RMSNorm([3, 8]), nn.RMSNorm([3, 8])),
    "layer": (LayerNorm(24), nn.LayerNorm(24)),
    "layer_bare": (LayerNorm(24, elementwise_affine=False), nn.LayerNorm(24, elementwise_affine=False)),
    "layer_no_bias": (LayerNorm(24, bias=False), nn.LayerNorm(24, bias=False)),
    "layer_planes": (LayerNorm((3, 8), 1e-3), nn.LayerNorm((3, 8), 1e-3)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_those_of_torch(name: str, dtype: torch.dtype) -> None:
    mine, theirs = copy.deepcopy(MODULES[name])
    mine.load_state_dict(with_random_parameters(theirs).state_dict())
    assert isinstance(mine, type(theirs))
    assert repr(mine) == repr(theirs)
    x = torch.randn(5, *theirs.normalized_shape)
    mine, theirs = mine.to(dtype), theirs.to(dtype)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(mine(x.to(dtype)), theirs(x.to(dtype)), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", MODULES)
def test_gradients_are_those_of_torch(name: str) -> None:
    mine, theirs = copy.deepcopy(MODULES[name])
    mine.load_state_dict(with_random_parameters(theirs).state_dict())
    x = torch.randn(2, 5, *theirs.normalized_shape, requires_grad=True)
    grad = torch.randn_like(x)
    for module in (mine, theirs):
        module(x).backward(grad)
        module.of_x, x.grad = x.grad, None
    torch.testing.assert_close(mine.of_x, theirs.of_x, rtol=1e-4, atol=1e-5)
    for (key, parameter), other in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", KINDS)
def test_gradients_with_a_residual(name: str) -> None:
    """Against autograd through the formula in fp64, of both results, and of the gradients themselves."""
    kind = KINDS[name]
    tensors = [torch.randn(3, 10), torch.randn(3, 10), torch.randn(10), torch.randn(10)]
    grads, more = (torch.randn(3, 10), torch.randn(3, 10)), [torch.randn_like(tensor) for tensor in tensors]

    def formula(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        rows = total - total.mean(-1, keepdim=True) if kind.centered else total
        rows = rows / (rows.square().mean(-1, keepdim=True) + kind.eps).sqrt()
        return rows * (weight + kind.unit_offset) + bias, total

    def second_order(function: Any, dtype: torch.dtype) -> list[Tensor]:
        inputs = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        outputs = function(*inputs)
        first = torch.autograd.grad(outputs, inputs, [grad.to(dtype) for grad in grads], create_graph=True)
        weighted = sum((part * factor.to(dtype)).sum() for part, factor in zip(first, more, strict=True))
        second = torch.autograd.grad(weighted, inputs[:3])  # type: ignore[arg-type]  # a sum of tensors
        return [part.detach().double() for part in (*first, *second)]

    mine = second_order(lambda x, r, w, b: normalize(x, r, w, b, kind), torch.float32)
    for part, wanted in zip(mine, second_order(formula, torch.float64), strict=True):
        torch.testing.assert_close(part, wanted, rtol=1e-3, atol=1e-4)


def test_only_wanted_gradients_are_made() -> None:
    norm = RMSNorm(8).requires_grad_(False)
    x = torch.randn(3, 8, requires_grad=True)
    norm(x).sum().backward()
    assert norm.weight.grad is None
    y, total = RMSNorm(8)(torch.randn(3, 8), x)
    (y.sum() + total.sum()).backward()
    assert x.grad is not None


# opcheck itself reads .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", ["llama", "layer"])
def test_operators_are_well_formed(name: str) -> None:
    x, weight = torch.randn(3, 10, requires_grad=True), torch.randn(10, requires_grad=True)
    bias = torch.randn(10, requires_grad=True)
    torch.library.opcheck(torch.ops.lowbit_rs.norm.default, (x, weight, bias, *KINDS[name]))
    residual = torch.randn(3, 10, requires_grad=True)
    torch.library.opcheck(torch.ops.lowbit_rs.norm_residual.default, (x, residual, weight, None, *KINDS[name]))


def test_wrong_arguments() -> None:
    norm = RMSNorm(8)
    for message, arguments in (
        (r"x: got torch.float64, expected", (torch.randn(2, 8).double(),)),
        (r"weight: got shape \[8\], expected \[7\]", (torch.randn(2, 7),)),
        (r"x: got shape \[\]", (torch.tensor(1.0),)),
        (r"residual: got torch.float32 \[8\], expected torch.float32 \[2, 8\]", (torch.randn(2, 8), torch.randn(8))),
        (r"residual: got torch.float16", (torch.randn(2, 8), torch.randn(2, 8).half())),
    ):
        with pytest.raises(InvalidArgument, match=message):
            norm(*arguments)
    with pytest.raises(InvalidArgument, match=r"x: got shape \[2, 7\], expected \[..., 8\]"):
        RMSNorm(8, elementwise_affine=False)(torch.randn(2, 7))
    with pytest.raises(InvalidArgument, match=r"x: got shape \[24\], expected \[..., 3, 8\]"):
        LayerNorm((3, 8))(torch.randn(24))
    with pytest.raises(InvalidArgument, match=r"norm: got a centered one"):
        normalize(torch.randn(2, 8), None, None, None, NormKind(1e-5, centered=True, cast_before_weight=True))


def test_unit_offset_starts_at_one() -> None:
    x = torch.randn(3, 8)
    for plain, offset in ((RMSNorm(8), RMSNorm(8, unit_offset=True)), (LayerNorm(8), LayerNorm(8, unit_offset=True))):
        assert torch.equal(offset.weight, torch.zeros(8))
        assert torch.equal(offset(x), plain(x))
        assert "unit_offset=True" in repr(offset)


class LlamaNorm(nn.Module):
    """The norm of Llama: the product is that of the dtypes, after the cast."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.variance_epsilon = eps

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(
            hidden.dtype
        )


class GemmaNorm(LlamaNorm):
    """The norm of Gemma: one more than the weight, before the cast."""

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (wide * (1.0 + self.weight.float())).type_as(hidden)


class OlmoNorm(LlamaNorm):
    """The plain product, before the cast."""

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * wide).to(hidden.dtype)


class CohereNorm(LlamaNorm):
    """LayerNorm without a bias."""

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.float() * wide).to(hidden.dtype)


class L1Norm(LlamaNorm):
    """None of ours."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden / (hidden.abs().mean(-1, keepdim=True) + self.variance_epsilon)


class Block(nn.Module):
    """A linear layer, and a norm behind it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(64, 64), norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x + self.linear(x))
        return y


#: A norm of a model, and what takes its place.
SWAPPED: dict[str, tuple[Any, type[nn.Module], NormKind]] = {
    "llama": (LlamaNorm, RMSNorm, NormKind(1e-6, cast_before_weight=True)),
    "gemma": (GemmaNorm, RMSNorm, NormKind(1e-6, unit_offset=True)),
    "olmo": (OlmoNorm, RMSNorm, NormKind(1e-6)),
    "cohere": (CohereNorm, LayerNorm, NormKind(1e-6, centered=True)),
    "torch_rms": (nn.RMSNorm, RMSNorm, NormKind(torch.finfo(torch.float32).eps)),
    "torch_layer": (nn.LayerNorm, LayerNorm, NormKind(1e-5, centered=True)),
}


@pytest.mark.parametrize("name", SWAPPED)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_of_models_are_swapped(name: str, weight_dtype: torch.dtype, dtype: torch.dtype) -> None:
    of_model, mine, kind = SWAPPED[name]
    model = Block(with_random_parameters(of_model(64)))
    theirs, keys = copy.deepcopy(model.norm), set(model.norm.state_dict())
    weight = model.norm.weight
    report = lowbit_rs.quantize_model(model, fuse_norms=True, progress=False)
    assert report.fused_norms == ["norm"]
    assert "fused 1 norm" in str(report)
    assert type(model.norm) is mine
    assert model.norm.kind == kind
    assert model.norm.weight is weight
    assert set(model.norm.state_dict()) == keys
    x = torch.randn(7, 64).to(dtype)
    if name.startswith("torch") and weight_dtype != dtype:
        return  # torch warns of it, or refuses
    wanted = theirs.to(weight_dtype)(x)
    y = model.norm.to(weight_dtype)(x)
    assert y.dtype == wanted.dtype
    # Two numbers, each next to the exact one; Llama's also was rounded before.
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance)


def test_what_is_left_alone() -> None:
    model = nn.ModuleDict({"a": LlamaNorm(16), "b": L1Norm(16), "c": nn.LayerNorm(16), "d": nn.LayerNorm(16).double()})
    model["c"].forward = lambda x: x
    with pytest.warns(UserWarning, match="replaced no layer"):
        report = lowbit_rs.quantize_model(model, fuse_norms=True, progress=False, skip=["a"])
    assert report.fused_norms == []
    assert report.skipped == {
        "a": "matches skip='a'",
        "b": "L1Norm computes none of the norms that there are kernels for",
        "c": "its forward was replaced",
        "d": "its weight is torch.float64",
    }
    with pytest.warns(UserWarning, match="replaced no layer"):
        assert lowbit_rs.quantize_model(model, progress=False).skipped == {}
    model = nn.ModuleDict({"a": LlamaNorm(16)})
    assert lowbit_rs.quantize_model(model, fuse_norms=True, progress=False).fused_norms == ["a"]
    with pytest.warns(UserWarning, match="already fused"):
        lowbit_rs.quantize_model(model, fuse_norms=True, progress=False)


def test_hooks_stay() -> None:
    model = Block(LlamaNorm(64))
    seen = []
    model.norm.register_forward_hook(lambda module, *_: seen.append(type(module)))
    lowbit_rs.quantize_model(model, fuse_norms=True, progress=False)
    assert seen == []  # trials do not run them
    model(torch.randn(2, 64))
    assert seen == [RMSNorm]


def test_compiled_and_exported() -> None:
    model = Block(LlamaNorm(64))
    lowbit_rs.quantize_model(model, fuse_norms=True, progress=False)
    x = torch.randn(3, 64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
