"""Norms that round their result to int8 for the layers behind them: the same bits by every kernel, and who asks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from lowbit_rs import fuse_model, quantize_model
from lowbit_rs._backends import cuda
from lowbit_rs.nn import LayerNorm, RMSNorm
from norms import KINDS, cases
from test_fusion import Attention
from test_norm import Case

WIDTHS = (8, 72, 128, 256, 264, 512, 1024, 2048, 3200, 4096, 4104, 8192, 12288, 16384, 16392, 75, 4100)

hopper = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="8-bit products are Hopper's"
)


def assert_same_rows(rows: cuda.Int8Rows, y: Tensor, threshold: float) -> None:
    """That ``rows`` is y as it is rounded alone, to the bit."""
    wanted = cuda.round_rows(y, threshold)
    assert torch.equal(rows.codes, wanted.codes)
    torch.testing.assert_close(rows.scales, wanted.scales, rtol=0, atol=0, equal_nan=True)
    assert (rows.outliers is None) == (wanted.outliers is None) == (not threshold)
    if rows.outliers is not None and wanted.outliers is not None:
        flags = -(-y.shape[-1] // 32)  # the list of columns is made by the product
        assert torch.equal(rows.outliers[:flags], wanted.outliers[:flags])


def assert_rounded(case: Case, threshold: float) -> None:
    *tensors, kind = case
    x, residual, weight, bias = (None if tensor is None else tensor.cuda() for tensor in tensors)
    assert x is not None
    y, total, rows = cuda.norm_rounded(x, residual, weight, bias, kind, threshold)
    wanted, same = cuda.norm(x, residual, weight, bias, kind)
    torch.testing.assert_close((y, total), (wanted, same), rtol=0, atol=0, equal_nan=True)
    assert_same_rows(rows, y, threshold)


@given(cases())
def test_rows_are_those_of_the_result(case: Case) -> None:
    for threshold in (0.0, 0.5):
        assert_rounded(case, threshold)


@pytest.mark.parametrize("name", ["llama", "gemma", "layer"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_kernel(width: int, name: str, dtype: torch.dtype) -> None:
    x = torch.randn(37, width).to(dtype)
    x[::5, width // 2] = 300.0
    weight = torch.randn(width).to(dtype)
    for threshold in (0.0, 2.5):
        assert_rounded((x, None, weight, None, KINDS[name]), threshold)
        assert_rounded((x, x, weight.float(), weight, KINDS[name]), threshold)


@pytest.mark.parametrize("threshold", [0.0, 2.5])
def test_numbers_that_are_not_finite(threshold: float) -> None:
    x = torch.randn(3, 64)
    x[1, 3] = torch.nan
    assert_rounded((x, None, None, None, KINDS["plain"]), threshold)
    x[1, 3], x[0] = torch.inf, 0.0
    assert_rounded((x, None, torch.full((64,), 1e30), None, KINDS["layer"]), threshold)


class Model(nn.Module):
    """A norm, projections of its result, and how many roundings a call took beside the norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention = norm, Attention()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts: tuple[Tensor, Tensor, Tensor] = self.attention(self.norm(x))
        return parts


def models(norm: nn.Module, **options: Any) -> tuple[Model, Model]:
    plain = Model(norm).to("cuda", torch.bfloat16)
    quantize_model(plain, "int8", "row", progress=False, activation="int8", **options)
    fused = copy.deepcopy(plain)
    fuse_model(fused)
    return fused, plain


@pytest.fixture
def roundings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who rounds activations: "alone" or "norm"."""
    made: list[str] = []

    def counted(call: Any, name: str) -> Any:
        def function(*arguments: Any) -> Any:
            made.append(name)
            return call(*arguments)

        return function

    monkeypatch.setattr(cuda, "round_rows", counted(cuda.round_rows, "alone"))
    monkeypatch.setattr(cuda, "norm_rounded", counted(cuda.norm_rounded, "norm"))
    return made


def assert_equal(parts: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for one, other in zip(parts, wanted, strict=True):
        assert torch.equal(one, other)


@hopper
@torch.no_grad()
@pytest.mark.parametrize("threshold", [None, 2.0])
@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_a_norm_rounds_once_it_was_asked(kind: Any, threshold: float | None, roundings: list[str]) -> None:
    fused, plain = models(kind(64), threshold=threshold)
    for shape, wanted in (
        ((40, 64), ["alone"]),
        ((40, 64), ["norm"]),
        ((2, 30, 64), ["norm"]),
        ((3, 64), []),  # too few to be rounded, and no reason to forget
        ((17, 64), ["norm"]),
    ):
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        expected = plain(x)
        roundings.clear()
        parts = fused(x)
        assert roundings == wanted
        for one, other in zip(parts, expected, strict=True):
            assert torch.equal(one, other) if wanted else torch.allclose(one, other, rtol=1e-2, atol=1e-2)


@hopper
@torch.no_grad()
def test_rows_are_not_taken_for_others(roundings: list[str]) -> None:
    fused, plain = models(RMSNorm(64), threshold=2.0)
    x = torch.randn(40, 64, device="cuda", dtype=torch.bfloat16)
    fused(x)
    y = fused.norm(x)
    assert roundings[-1] == "norm"
    y.mul_(2)  # its rows are out of date
    assert_equal(fused.attention(y), plain.attention(y))
    y = fused.norm(x)
    fused.norm(-x)  # whose rows these are is forgotten
    assert_equal(fused.attention(y), plain.attention(y))
    y = fused.norm(x)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        roundings.clear()
        parts = fused.attention(y)
    torch.cuda.synchronize()
    assert roundings == ["alone"]
    assert_equal(parts, plain.attention(y))


@hopper
@torch.no_grad()
def test_in_a_graph_and_under_a_compiler(roundings: list[str]) -> None:
    fused, plain = models(RMSNorm(64), threshold=2.0)
    x = torch.randn(40, 64, device="cuda", dtype=torch.bfloat16)
    fused(x)
    graph = torch.cuda.CUDAGraph()
    roundings.clear()
    with torch.cuda.graph(graph):
        parts = fused(x)
    assert roundings == ["norm"]
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert_equal(parts, plain(x))
    assert_equal(torch.compile(fused, fullgraph=True, backend="aot_eager")(x), plain(x))
    torch._dynamo.reset()
