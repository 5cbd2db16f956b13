"""Activations in int8 on a GPU, held to the definition in fp64 by bounds that hold for every order of summation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import lowbit_rs
import oracle
from lowbit_rs import Unsupported
from lowbit_rs._backends import cuda
from lowbit_rs._native import CUDA_SIDE_NUMBERS
from lowbit_rs._ops import borrow

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="products of int8 with int8 are for compute capability 9.0",
)

#: Around the sizes of tiles, and the last with more columns than have room beside the integers.
SHAPES = [(24, 256), (264, 144), (1000, 1040), (72, 4096)]
TOKENS = (1, 17, 129, 300)


def activations(tokens: int, cols: int, dtype: torch.dtype, outliers: int) -> Tensor:
    """Normal numbers, and in so many columns a number beyond them in every third row."""
    x = torch.randn(tokens, cols).clamp(-4, 4)
    columns = torch.randperm(cols)[:outliers]
    x[::3, columns] = 30 * torch.randn(len(x[::3]), outliers).sign() + torch.randn(len(x[::3]), outliers)
    return x.to(dtype)


def multiply(x: Tensor, packed: lowbit_rs.PackedWeight, bias: Tensor | None, threshold: float) -> Tensor:
    """What the layer does from some number of tokens on."""
    _, view = borrow(packed.operands(), packed.shape, packed.scheme)
    return cuda.linear_int8(view, x, cuda.round_rows(x, threshold), bias)


def assert_within(y: Tensor, x: Tensor, packed: lowbit_rs.PackedWeight, bias: Tensor | None, threshold: float) -> None:
    """Within what fp32 sums of the definition's terms, and 16 bits for what codes leave, may be off by.

    In a column of outliers, x beyond its code is at most half a scale, or all of x; that is exact in 16 bits where x
    has as many, and off by 2^-16 of it in twice 8. With too many such columns x in 16 bits stays what it is, and meets
    weights that were rounded twice.
    """
    product = oracle.linear_int8(packed, x, threshold)
    if product.columns.numel() > CUDA_SIDE_NUMBERS and x.dtype != torch.float32:
        weight = oracle.codes(packed).double() * packed.scale.double()
        sums = x.double().abs() @ weight.abs().T + (0 if bias is None else bias.double().abs())
        error = (2.1 * oracle.unit_roundoff(x.dtype) + (x.shape[1] + 16) * 2.0**-24) * sums
        assert_close(y, x.double() @ weight.T + (0 if bias is None else bias.double()), error, x.dtype)
        return
    values = x.double().abs()[:, product.columns]
    half = product.scales.double() / 2 * 1.01
    left = (
        values * 2.0**-16 if x.dtype == torch.float32 else torch.minimum(values, half) * oracle.unit_roundoff(x.dtype)
    )
    weights = (oracle.codes(packed).double() * packed.scale.double()).abs()[:, product.columns]
    wanted = product.y if bias is None else product.y + bias.double()
    # A code that is a tie in one order of roundings, and its correction, cancel: sums are of the definition's size.
    error = 2 * product.error + left @ weights.T + (0 if bias is None else bias.double().abs() * 2.0**-23)
    assert_close(y, wanted, error, x.dtype)


def assert_close(y: Tensor, wanted: Tensor, error: Tensor, dtype: torch.dtype) -> None:
    """Within an error and one rounding to the dtype."""
    bound = error + oracle.unit_roundoff(dtype) * (wanted.abs() + error) + oracle.half_step(dtype) + 1e-38
    off = (y.double() - wanted).abs()
    assert bool((off <= bound).all()), (float((off / bound).max()), list(y.shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("outliers", [None, 0, 5, 40, 300])
def test_products(shape: tuple[int, int], outliers: int | None, dtype: torch.dtype) -> None:
    packed = lowbit_rs.quantize(torch.randn(*shape), "int8", "row")
    there = packed.to("cuda")
    threshold = 0.0 if outliers is None else 6.0
    for tokens in TOKENS:
        x = activations(tokens, shape[1], dtype, min(outliers or 0, shape[1] // 2))
        for bias in (None, torch.randn(shape[0]).half()):
            y = multiply(x.cuda(), there, None if bias is None else bias.cuda(), threshold)
            assert_within(y.cpu(), x, packed, bias, threshold)
            assert torch.equal(y, multiply(x.cuda(), there, None if bias is None else bias.cuda(), threshold))


@pytest.mark.parametrize("cols", [64, 75, 4096, 20_000])
def test_rows_are_rounded_as_defined(cols: int, dtype: torch.dtype) -> None:
    packed = lowbit_rs.quantize(torch.randn(1, cols), "int8", "row")
    for threshold in (0.0, 6.0):
        x = activations(33, cols, dtype, 7 if threshold else 0)
        x[4] = 0
        rows = cuda.round_rows(x.cuda()[:, :], threshold)
        wanted = oracle.linear_int8(packed, x, threshold)
        codes = rows.codes.cpu()[:, :cols].double()
        is_kept = torch.ones(cols, dtype=torch.bool)
        is_kept[wanted.columns] = False
        assert torch.equal(codes[:, is_kept], wanted.codes.double()[:, is_kept])
        assert torch.equal(rows.scales.cpu(), wanted.scales.flatten())
        assert not rows.codes[:, cols:].any()
        assert bool((codes.abs() <= 127).all())
        if rows.outliers is not None:
            flags = rows.outliers.cpu()[: -(-cols // 32)]
            bits = (flags[:, None] >> torch.arange(32)) & 1
            assert torch.equal(bits.flatten().nonzero().flatten(), wanted.columns)


def test_rows_that_lie_apart() -> None:
    packed = lowbit_rs.quantize(torch.randn(24, 256), "int8", "row")
    x = activations(40, 300, torch.bfloat16, 3)
    y = multiply(x.cuda()[:, :256], packed.to("cuda"), None, 6.0)
    assert_within(y.cpu(), x[:, :256], packed, None, 6.0)


def test_what_is_not_finite() -> None:
    packed = lowbit_rs.quantize(torch.eye(8, 64), "int8", "row").to("cuda")
    x = torch.full((40, 64), 0.5, device="cuda", dtype=torch.bfloat16)
    x[1, 3], x[2, 4] = math.inf, math.nan
    y = multiply(x, packed, None, 6.0)
    assert y[1, 3] == math.inf
    assert y[2].isnan().all()
    assert torch.equal(y[3:], x[3:, :8])
    y = multiply(x, packed, None, 0.0)
    assert y[1].isfinite().sum() == 0
    assert y[2].isnan().all()
    assert torch.equal(y[3:], x[3:, :8])


@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # torch's, of its thread of gradients
def test_layers_round_from_some_number_of_tokens_on() -> None:
    linear = torch.nn.Linear(2048, 8192, device="cuda")
    layer = lowbit_rs.QuantLinear.from_linear(linear, "int8", "row", activation="auto")
    assert "activation=auto (int8 from " in repr(layer)
    tokens = int(repr(layer).partition("int8 from ")[2].split()[0])
    for count, rounds in ((tokens - 1, False), (tokens, True)):
        x = activations(count, 2048, torch.bfloat16, 3).cuda()
        y = layer(x)
        layer.activation = "none"
        assert torch.equal(y, layer(x)) is not rounds
        layer.activation = "auto"
    x = activations(tokens, 2048, torch.bfloat16, 3).cuda().requires_grad_()
    grad = torch.randn(tokens, 8192, device="cuda", dtype=torch.bfloat16)
    layer(x).backward(grad)
    assert x.grad is not None
    wanted = grad.double() @ layer.dequantize().double()
    assert float((x.grad.double() - wanted).norm() / wanted.norm()) < 1e-2


def test_graphs_replay_with_other_outliers() -> None:
    layer = lowbit_rs.QuantLinear.from_linear(torch.nn.Linear(512, 96), "int8", "row", activation="int8").to("cuda")
    static = activations(64, 512, torch.float16, 0).cuda()
    layer(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(static)
    for outliers in (0, 3, 200, CUDA_SIDE_NUMBERS + 44, 1):
        x = activations(64, 512, torch.float16, outliers)
        static.copy_(x)
        graph.replay()
        assert_within(y.cpu(), x, layer.packed.to("cpu"), layer.bias.detach().cpu(), 6.0)


def test_other_weights_are_refused_or_taken_as_they_are() -> None:
    x = torch.randn(64, 75, device="cuda")
    for options in ({"format": "int8", "block_size": "row"}, {"format": "nf4"}):
        packed = lowbit_rs.quantize(torch.randn(8, 75, device="cuda"), **options)  # type: ignore[arg-type]
        assert torch.equal(lowbit_rs.linear(x, packed, activation="auto"), lowbit_rs.linear(x, packed))
        with pytest.raises(Unsupported, match=r'activation="int8" on CUDA: not supported: '):
            lowbit_rs.linear(x, packed, activation="int8")
