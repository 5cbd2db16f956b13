"""Fused layers on a GPU: one launch, in graphs, across streams and moves."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from counted_products import count_products
from lowbit_rs import fuse_model, quantize_model
from lowbit_rs._backends import cuda
from test_fusion import QKV, Attention, is_joined

hopper = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="8-bit products are Hopper's"
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return count_products(monkeypatch, cuda)


def pair(dtype: torch.dtype, **options: Any) -> tuple[Attention, Attention]:
    torch.manual_seed(0)
    plain = Attention(bias=True).to("cuda", dtype)
    quantize_model(plain, progress=False, **options)
    fused = copy.deepcopy(plain)
    assert fuse_model(fused).groups == [QKV]
    return fused, plain


def assert_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"format": "uint4"}, {"format": "int8"}, {"codebook": (-1.0, 0.0, 1.0)}, {"scale_dtype": torch.float16}],
    ids=lambda options: "-".join(options),
)
def test_one_launch_for_three(options: dict[str, Any], dtype: torch.dtype, products: list[int]) -> None:
    fused, plain = pair(dtype, **options)
    for tokens in (1, 3, 16, 17, 100):
        x = torch.randn(tokens, 64, device="cuda", dtype=dtype)
        expected = plain(x)
        products.clear()
        assert_same(fused(x), expected)
        assert products == ([160] if tokens <= cuda.MAX_JOINED_TOKENS else [96, 32, 32])


@torch.no_grad()
def test_captured(products: list[int]) -> None:
    fused, plain = pair(torch.bfloat16)
    x = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fused(x)
        fused.q_proj(x)  # parts that are left are none of the graph's
    graph = torch.cuda.CUDAGraph()
    products.clear()
    with torch.cuda.graph(graph, stream=stream):
        k = fused.k_proj(x)
        q, v = fused.q_proj(x), fused.v_proj(x)
    assert products == [160]
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert_same((q, k, v), plain(x))


@torch.no_grad()
def test_another_stream_is_another_product(products: list[int]) -> None:
    fused, plain = pair(torch.bfloat16)
    x = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    q = fused.q_proj(x)
    with torch.cuda.stream(torch.cuda.Stream()):
        k = fused.k_proj(x)
    assert products == [160, 160]
    torch.cuda.synchronize()
    assert_same((q, k), plain(x)[:2])


@pytest.fixture
def roundings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of every activation that is rounded."""
    made: list[int] = []
    round_rows = cuda.round_rows

    def counted(x: Tensor, threshold: float) -> cuda.Int8Rows:
        made.append(x.numel() // x.shape[-1])
        return round_rows(x, threshold)

    monkeypatch.setattr(cuda, "round_rows", counted)
    return made


@hopper
@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize("compute_dtype", [None, torch.float16])
def test_activations_are_rounded_once(
    compute_dtype: torch.dtype | None, threshold: float, roundings: list[int]
) -> None:
    options = {"format": "int8", "block_size": "row", "activation": "int8", "threshold": threshold}
    fused, plain = pair(torch.bfloat16, compute_dtype=compute_dtype, **options)
    for shape in ((17, 64), (2, 50, 64)):
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        expected = plain(x)
        roundings.clear()
        for one, other in zip(fused(x), expected, strict=True):
            assert torch.equal(one, other)
        assert roundings == [x.numel() // 64]
        x.mul_(2)  # what was rounded is out of date
        assert torch.equal(fused.q_proj(x), plain.q_proj(x))
        x.mul_(2)
        assert torch.equal(fused.k_proj(x), plain.k_proj(x))


@hopper
@torch.no_grad()
def test_rounded_once_in_a_graph(roundings: list[int]) -> None:
    fused, plain = pair(torch.bfloat16, format="int8", block_size="row", activation="int8", threshold=3.0)
    x = torch.randn(40, 64, device="cuda", dtype=torch.bfloat16)
    fused(x)
    fused.q_proj(x)  # parts that are left are none of the graph's
    graph = torch.cuda.CUDAGraph()
    roundings.clear()
    with torch.cuda.graph(graph):
        parts = fused(x)
    assert roundings == [40]
    for _ in range(3):
        x.normal_()
        graph.replay()
        for one, other in zip(parts, plain(x), strict=True):
            assert torch.equal(one, other)


@torch.no_grad()
def test_moves(products: list[int]) -> None:
    fused, plain = pair(torch.float32)
    x = torch.randn(4, 64)
    expected = plain.cpu()(x)
    products.clear()
    for device in ("cpu", "cuda"):
        fused.to(device)
        assert all(map(is_joined, (fused.q_proj, fused.k_proj, fused.v_proj)))
        assert_same(tuple(part.cpu() for part in fused(x.to(device))), expected)
    assert products == [160]
    fused.k_proj.cpu()  # apart: each multiplies where it lies
    assert fused.q_proj(x.cuda()).is_cuda
    assert not fused.k_proj(x).is_cuda


@torch.no_grad()
def test_compiled() -> None:
    fused, plain = pair(torch.bfloat16)
    x = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16)
    assert_same(torch.compile(fused, fullgraph=True, backend="aot_eager")(x), plain(x))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()
