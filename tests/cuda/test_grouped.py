"""Products of rows with the matrices of a stack, the number of rows of each in device memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lowbit_rs
from lowbit_rs import PackedWeight

sys.path.insert(0, str(Path(__file__).parent.parent))
from oracle import unit_roundoff

OPS = torch.ops.lowbit_rs

#: What one kernel takes.
SERVED: dict[str, dict[str, Any]] = {
    "nf4": {},
    "fp4": {"format": "fp4", "scale_dtype": torch.float16},
    "int4": {"format": "int4", "block_size": 128, "scale_dtype": torch.bfloat16},
    "custom": {"codebook": (1.0, -1.0, 0.5, 0.0, -0.25), "signed_absmax": True},
    "double_quant": {"double_quant": True},
    "rows": {"block_size": "row"},
    "large_blocks": {"block_size": 4096},
}
#: What is multiplied matrix by matrix.
LEFT: dict[str, dict[str, Any]] = {
    "uint4": {"format": "uint4"},
    "int8": {"format": "int8"},
    "small_blocks": {"block_size": 32},
}
#: Numbers of rows of five experts, and rows beyond.
COUNTS = {
    "few": ([1, 0, 2, 0, 3], 0),
    "none": ([0, 0, 0, 0, 0], 3),
    "one": ([0, 0, 0, 37, 0], 0),
    "uneven": ([9, 0, 70, 1, 20], 4),
    "many": ([130, 64, 65, 1, 200], 0),
}


def stack(outputs: int = 200, cols: int = 192, **options: Any) -> PackedWeight:
    torch.manual_seed(0)
    return lowbit_rs.quantize(torch.randn(5, outputs, cols, device="cuda"), **options)


def multiply(x: Tensor, counts: Tensor, packed: PackedWeight) -> Tensor:
    product: Tensor = OPS.linear_grouped(x, counts, packed.operands(), list(packed.shape), *packed.scheme, "none")
    return product


def assert_right(product: Tensor, x: Tensor, counts: list[int], packed: PackedWeight) -> None:
    """Within the rounding of codes and of results to the dtype of x, and of fp32 sums in any order."""
    weights = packed.dequantize(torch.float32).double()
    unit, start = unit_roundoff(x.dtype), 0
    for weight, count in zip(weights, counts, strict=True):
        rows = slice(start, start + count)
        exact = x[rows].double() @ weight.T
        size = x[rows].double().abs() @ weight.abs().T
        bound = (unit + 2 * x.shape[1] * 2.0**-24) * size * (1 + unit) + unit * exact.abs() + 1e-6
        assert ((product[rows].double() - exact).abs() <= bound).all()
        start += count
    assert not product[start:].any()


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", SERVED.values(), ids=SERVED)
def test_products(options: dict[str, Any], dtype: torch.dtype, counts: tuple[list[int], int]) -> None:
    packed = stack(**options)
    each, beyond = counts
    x = torch.randn(sum(each) + beyond, 192, device="cuda", dtype=dtype)
    numbers = torch.tensor(each, device="cuda")
    with torch.cuda.use_mem_pool(torch.cuda.MemPool()):  # memory that nobody has written zeros to
        torch.full_like(multiply(x, numbers, packed), float("nan"))
        product = multiply(x, numbers, packed)
    assert_right(product, x, each, packed)
    assert torch.equal(product, multiply(x, numbers, packed))


@pytest.mark.parametrize("options", LEFT.values(), ids=LEFT)
def test_other_weights_are_multiplied_matrix_by_matrix(options: dict[str, Any]) -> None:
    packed = stack(**options)
    each = [9, 0, 70, 1, 20]
    x = torch.randn(102, 192, device="cuda", dtype=torch.float16)
    product = multiply(x, torch.tensor(each, device="cuda"), packed)
    weights = packed.dequantize(torch.float32).double()
    expected = torch.cat([part.double() @ weight.T for part, weight in zip(x[:100].split(each), weights, strict=True)])
    torch.testing.assert_close(product[:100].double(), expected, rtol=1e-2, atol=5e-2)
    assert not product[100:].any()


def test_rows_apart_and_widths() -> None:
    for cols in (64, 128, 320, 1408):
        packed = stack(130, cols)
        wide = torch.randn(40, cols + 8, device="cuda", dtype=torch.bfloat16)
        each = [8, 8, 0, 16, 8]
        product = multiply(wide[:, :cols], torch.tensor(each, device="cuda"), packed)
        assert_right(product, wide[:, :cols], each, packed)


@pytest.mark.parametrize("rows", [12, 100, 400])
def test_a_graph_takes_new_counts(rows: int) -> None:
    """Nothing waits for the device: the captured product serves whatever numbers of rows are there at its replay."""
    packed = stack()
    x = torch.randn(rows, 192, device="cuda", dtype=torch.bfloat16)
    counts = torch.tensor([rows, 0, 0, 0, 0], device="cuda")
    multiply(x, counts, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        product = multiply(x, counts, packed)
    for each in ([0, rows, 0, 0, 0], [1, 2, 3, 4, 2], [rows // 5] * 5, [0, 0, 0, 0, 0]):
        counts.copy_(torch.tensor(each))
        x.normal_()
        graph.replay()
        assert_right(product, x, each, packed)


def test_counts_beyond_the_rows_do_no_harm() -> None:
    packed = stack()
    x = torch.randn(10, 192, device="cuda", dtype=torch.bfloat16)
    product = multiply(x, torch.tensor([4, 2**40, 3, 5, -7], device="cuda"), packed)
    assert_right(product, x, [4, 6, 0, 0, 0], packed)
