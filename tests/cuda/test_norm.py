"""RMSNorm and LayerNorm on a GPU: against fp64, torch and the CPU; streams, graphs, gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import example, given
from torch import Tensor, nn

import lowbit_rs
from lowbit_rs._norm_ops import NormKind
from lowbit_rs.nn import LayerNorm, RMSNorm
from lowbit_rs.nn.norm import normalize
from norms import KINDS, assert_exact, assert_gradients, cases
from test_norm import MODULES, Block, Case, LlamaNorm

#: Every kernel, full and with lanes that have nothing to do, and widths that are no whole vectors or too wide.
WIDTHS = (8, 128, 136, 256, 264, 512, 1024, 2048, 3200, 4096, 5120, 8192, 12288, 16384, 16392, 75, 4100)


@given(cases())
def test_norms_are_exact(case: Case) -> None:
    *tensors, kind = case
    x, residual, weight, bias = (None if tensor is None else tensor.cuda() for tensor in tensors)
    assert x is not None
    y, total = normalize(x, residual, weight, bias, kind)
    if residual is not None:
        assert total is not None
        assert torch.equal(total, x + residual)
    assert_exact(y, x if residual is None else x + residual, weight, bias, kind)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_kernel(width: int, name: str, dtype: torch.dtype) -> None:
    kind = KINDS[name]
    for rows, weight_dtype in ((1, dtype), (37, dtype), (3, torch.float32), (3, torch.bfloat16)):
        x = (torch.randn(rows, width, device="cuda") * 3 + 1).to(dtype)
        residual = torch.randn(rows, width, device="cuda").to(dtype)
        weight = torch.randn(width, device="cuda").to(weight_dtype)
        bias = torch.randn(width, device="cuda").to(weight_dtype) if kind.centered else None
        assert_exact(normalize(x, None, weight, bias, kind)[0], x, weight, bias, kind)
        y, total = normalize(x, residual, weight, None, kind)
        assert total is not None
        assert torch.equal(total, x + residual)
        assert_exact(y, total, weight, None, kind)
    x = torch.randn(5, width, device="cuda").to(dtype)
    assert_exact(normalize(x, None, None, None, kind)[0], x, None, None, kind)


def test_strides_and_addresses_do_not_matter(dtype: torch.dtype) -> None:
    x, weight = torch.randn(6, 256, device="cuda").to(dtype), torch.randn(256, device="cuda").to(dtype)
    kind = KINDS["plain"]
    wanted, _ = normalize(x, None, weight, None, kind)
    wide = torch.cat([x, x], -1)[:, :256]
    assert torch.equal(normalize(wide, None, weight, None, kind)[0], wanted)
    assert torch.equal(normalize(x.T.contiguous().T, None, weight, None, kind)[0], wanted)
    odd = torch.zeros(x.numel() + 1, dtype=dtype, device="cuda")[1:].view(6, 256).copy_(x)
    assert_exact(normalize(odd, None, weight, None, kind)[0], x, weight, None, kind)
    total = normalize(x, wide, weight, None, kind)[1]
    assert total is not None
    assert torch.equal(total, x + x)


def test_the_same_bits_every_time() -> None:
    x, weight = torch.randn(300, 4096, device="cuda"), torch.randn(4096, device="cuda")
    wanted = normalize(x, None, weight, None, KINDS["layer"])[0]
    for _ in range(5):
        assert torch.equal(normalize(x, None, weight, None, KINDS["layer"])[0], wanted)
    # Neither does a row depend on its neighbours.
    assert torch.equal(normalize(x[7:8], None, weight, None, KINDS["layer"])[0], wanted[7:8])


@pytest.mark.parametrize("name", MODULES)
def test_gradients_are_those_of_the_cpu(name: str) -> None:
    norm = copy.deepcopy(MODULES[name][0])
    x = torch.randn(4, *norm.normalized_shape)
    gradients = []
    for device in ("cpu", "cuda"):
        moved, source = copy.deepcopy(norm).to(device), x.detach().to(device).requires_grad_()
        y, total = moved(source, source.detach())
        (y.square().sum() + total.sum()).backward()
        gradients.append([part.cpu() for part in (source.grad, *(p.grad for p in moved.parameters()))])
    for mine, wanted in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_kernel_of_gradients(width: int, name: str, dtype: torch.dtype) -> None:
    kind = KINDS[name]
    # More rows than blocks walk them at once, where they share one; and one.
    for rows, weight_dtype, has_bias in ((1, dtype, True), (700, dtype, False), (37, torch.float32, True)):
        x = (torch.randn(rows, width, device="cuda") * 3 + 1).to(dtype)
        grad, total_grad = (torch.randn(rows, width, device="cuda").to(dtype) for _ in range(2))
        weight = torch.randn(width, device="cuda").to(weight_dtype)
        bias = torch.randn(width, device="cuda").to(weight_dtype) if has_bias else None
        assert_gradients(grad, None, x, weight, bias, kind)
        assert_gradients(grad, total_grad, x, weight, bias, kind)
    assert_gradients(grad, None, x, None, None, kind)


@given(cases())
@example((torch.tensor([1.541]), None, torch.tensor([-0.2934]), None, NormKind(1e-5, centered=True, unit_offset=True)))
def test_gradients_are_exact(case: Case) -> None:
    *tensors, kind = case
    x, _, weight, bias = (None if tensor is None else tensor.cuda() for tensor in tensors)
    assert x is not None
    generator = torch.Generator().manual_seed(1)
    grad, total_grad = (torch.randn(x.shape, generator=generator).to(x) for _ in range(2))
    assert_gradients(grad, total_grad, x, weight, bias, kind)


def test_gradients_of_any_strides() -> None:
    x, weight = torch.randn(6, 256, device="cuda"), torch.randn(256, device="cuda")
    wide = torch.randn(6, 300, device="cuda")
    for rows in (x.T.contiguous().T, wide[:, :256], wide[:, 1:257]):
        assert_gradients(x, wide[:, 3:259], rows, weight, None, KINDS["plain"])
        assert_gradients(rows, x, x, weight, weight, KINDS["layer"])
    assert_gradients(torch.ones(1, 1, device="cuda").expand(6, 256), None, x, weight, weight, KINDS["layer"])


def test_gradients_of_no_rows_and_of_frozen_parameters() -> None:
    norm = LayerNorm(64, device="cuda")
    norm(torch.empty(0, 64, device="cuda", requires_grad=True)).sum().backward()
    assert torch.equal(norm.weight.grad, torch.zeros(64, device="cuda"))
    norm.requires_grad_(False).zero_grad()
    x = torch.randn(5, 64, device="cuda", requires_grad=True)
    norm(x).square().sum().backward()
    assert x.grad is not None
    assert norm.weight.grad is None
    norm.weight.requires_grad_()
    norm(x.detach()).sum().backward()
    assert norm.weight.grad is not None


# opcheck itself reads .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", ["llama", "layer"])
def test_gradients_are_well_formed_and_differentiable(name: str) -> None:
    x, weight = (torch.randn(size, device="cuda", requires_grad=True) for size in ((3, 16), (16,)))
    torch.library.opcheck(torch.ops.lowbit_rs.norm.default, (x, weight, None, *KINDS[name]))
    grad = torch.randn_like(x)
    for needs in ((True, True), (True, False), (False, True)):
        arguments = (x.detach(), grad, grad, weight.detach(), *KINDS[name], *needs)
        torch.library.opcheck(torch.ops.lowbit_rs.norm_backward.default, arguments)
    (first,) = torch.autograd.grad(normalize(x, None, weight, None, KINDS[name])[0], x, grad, create_graph=True)
    (plain,) = torch.autograd.grad(normalize(x, None, weight, None, KINDS[name])[0], x, grad)
    torch.testing.assert_close(first, plain)
    (second,) = torch.autograd.grad(first.square().sum(), weight)
    assert bool(second.isfinite().all())


def test_compiled_gradients() -> None:
    norm = LayerNorm(64, device="cuda")
    nn.init.normal_(norm.weight)
    x = torch.randn(5, 64, device="cuda", requires_grad=True)
    wanted = torch.autograd.grad(norm(x).square().sum(), (x, norm.weight, norm.bias))
    compiled = torch.compile(norm, fullgraph=True)
    for mine, exact in zip(
        torch.autograd.grad(compiled(x).square().sum(), (x, norm.weight, norm.bias)), wanted, strict=True
    ):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_autocast_is_as_with_torch() -> None:
    """RMSNorm was not cast before some version of torch."""
    x = torch.randn(3, 64, device="cuda", dtype=torch.bfloat16)
    for mine, theirs in ((RMSNorm(64), nn.RMSNorm(64)), (LayerNorm(64), nn.LayerNorm(64))):
        with torch.autocast("cuda", torch.bfloat16):
            y, wanted = mine.cuda()(x), theirs.cuda()(x)
        assert y.dtype == wanted.dtype
        tolerance = 4 * torch.finfo(y.dtype).eps
        torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance)


def test_graphs_and_compilation() -> None:
    model = Block(LlamaNorm(64)).cuda().bfloat16()
    lowbit_rs.quantize_model(model, fuse_norms=True, progress=False)
    norm, x = model.norm, torch.randn(4, 64, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        wanted = norm(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = norm(x)
        x.copy_(-x)
        graph.replay()
        assert torch.equal(y, -wanted)
        compiled = torch.compile(norm, fullgraph=True)
        assert torch.equal(compiled(x), -wanted)


def test_devices_must_agree() -> None:
    x = torch.randn(2, 8)
    with pytest.raises(lowbit_rs.InvalidArgument, match="weight: got a tensor on cuda:0"):
        RMSNorm(8).cuda()(x)
    with pytest.raises(lowbit_rs.InvalidArgument, match="residual: got a tensor on cpu"):
        RMSNorm(8).cuda()(x.cuda(), x)


def test_a_million_rows() -> None:
    """More rows than blocks walk at once where vectors cannot be moved, and many that share a block."""
    for width in (3, 8):
        x: Tensor = torch.randn((1 << 20) + 5, width, device="cuda")
        assert_exact(normalize(x, None, None, None, NormKind(1e-6))[0], x, None, None, NormKind(1e-6))
