"""Quantize, dequantize and embedding rows on a GPU: to the last bit what the CPU gives, and the golden codes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lowbit_rs
import strategies
from lowbit_rs import InvalidArgument, PackedWeight, _native
from lowbit_rs._backends import cuda
from test_golden import BLOCK_SIZES, CASES, DTYPES, GOLDEN, absmax, codes, digest, source

#: Widths that vectors divide, that they do not, and that bytes do not; each with blocks that are cut short.
SHAPES = [(24, 256), (40, 75), (33, 129), (3, 5, 72), (7, 4100), (1, 1), (300, 512), (5, 8192), (2, 3, 12304)]


def both(tensor: Tensor, **options: Any) -> tuple[PackedWeight, PackedWeight]:
    """A tensor packed on the GPU, moved to the CPU, and packed on the CPU."""
    packed = lowbit_rs.quantize(tensor.cuda(), **options)
    assert packed.device.type == "cuda"
    return packed.to("cpu"), lowbit_rs.quantize(tensor, **options)


def assert_same_bits(mine: Tensor, wanted: Tensor) -> None:
    mine = mine.cpu()
    assert mine.dtype == wanted.dtype
    torch.testing.assert_close(mine, wanted, rtol=0, atol=0, equal_nan=True)


@given(strategies.weights(), strategies.options(), st.booleans())
def test_packing_is_the_cpus(tensor: Tensor, options: strategies.Options, double_quant: bool) -> None:
    keywords = options.keywords() | {"double_quant": double_quant}
    try:
        wanted = lowbit_rs.quantize(tensor, **keywords)
    except InvalidArgument:  # a scale that its dtype cannot hold
        with pytest.raises(InvalidArgument, match="scale_dtype: got"):
            lowbit_rs.quantize(tensor.cuda(), **keywords)
        return
    packed = lowbit_rs.quantize(tensor.cuda(), **keywords)
    assert packed.to("cpu") == wanted
    for dtype in DTYPES:
        assert_same_bits(packed.dequantize(dtype), wanted.dequantize(dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_kind_of_weight(options: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    mine, wanted = both(torch.randn(*shape).to(dtype), **options)
    assert mine == wanted
    for out in DTYPES:
        assert_same_bits(mine.to("cuda").dequantize(out), wanted.dequantize(out))


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256, 512])
@pytest.mark.parametrize("format", strategies.FORMATS)
def test_large_weights(format: str, block_size: int) -> None:
    """Many thread blocks, whole vectors, scales by the thousand."""
    tensor = (torch.randn(512, 4096) * torch.rand(512, 1)).bfloat16()
    for double_quant in (False, True):
        mine, wanted = both(tensor, format=format, block_size=block_size, double_quant=double_quant)
        assert mine == wanted


@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
def test_extreme_values(scale_dtype: torch.dtype) -> None:
    tiny = torch.tensor([1e-45, -3e-39, 1e-38, 0.0, -0.0, 2e-20]).repeat(64)[: 6 * 64].reshape(6, 64)
    huge = (torch.linspace(-1, 1, 384) * 3e38).reshape(6, 64)
    zero = torch.zeros(6, 64)
    for tensor in (tiny, zero, -zero, *([huge] if scale_dtype != torch.float16 else [])):
        for format in strategies.FORMATS[:3]:
            mine, wanted = both(tensor, format=format, scale_dtype=scale_dtype)
            assert mine == wanted


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_golden_inputs(case: str, format: str, dtype: torch.dtype) -> None:
    """The CPU's codes, which tests/test_golden.py holds to those of bitsandbytes; and bitsandbytes' own, decoded."""
    tensor = source(case, dtype)[None]
    for index, block_size in enumerate(BLOCK_SIZES):
        mine, wanted = both(tensor, format=format, block_size=block_size)
        assert mine == wanted
        parts = {"data": codes(case, format, dtype, block_size)[None], "scale": absmax(case, dtype, block_size)[None]}
        golden = PackedWeight.from_tensors(mine.spec, tensor.shape, dtype, parts).to("cuda").dequantize()
        assert digest(golden.cpu()) == GOLDEN[f"{case}|{format}|y"][DTYPES.index(dtype), index].tobytes()


def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 40, 128, device="cuda").to(dtype)
    wanted = lowbit_rs.quantize(tensor)
    turned = tensor.mT.contiguous().mT
    offset = torch.zeros(tensor.numel() + 1, dtype=dtype, device="cuda")[1:].view(3, 40, 128).copy_(tensor)
    wide = torch.cat([tensor, tensor], -1)[..., :128]
    expanded = tensor[:1].expand(3, 40, 128)
    for same in (turned, offset, wide):
        assert lowbit_rs.quantize(same) == wanted
    assert lowbit_rs.quantize(expanded) == lowbit_rs.quantize(expanded.contiguous())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("shape", [(8, 128), (8, 75), (2, 4, 128), (5, 8192)], ids=str)
def test_nonfinite_values(bad: float, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    """The first one is named; or its block becomes NaN, and no other."""
    tensor = torch.randn(*shape)
    for place in ((1, 2, 70)[-len(shape) :], (1, 3, 71)[-len(shape) :]):
        tensor[place] = bad
    with pytest.raises(InvalidArgument) as wanted:
        lowbit_rs.quantize(tensor, **options)
    with pytest.raises(InvalidArgument) as raised:
        lowbit_rs.quantize(tensor.cuda(), **options)
    assert str(raised.value) == str(wanted.value)
    mine, packed = both(tensor, nonfinite="propagate", **options)
    assert_same_bits(mine.dequantize(), packed.dequantize())
    assert_same_bits(mine.to("cuda").dequantize(), packed.dequantize())


def test_scales_that_overflow_their_dtype() -> None:
    with pytest.raises(InvalidArgument, match="scale_dtype: got float16"):
        lowbit_rs.quantize(torch.full((2, 64), 1e30, device="cuda"), scale_dtype=torch.float16)


@pytest.mark.parametrize("window", [(0, 0, 24, 256), (3, 64, 7, 128), (3, 0, 7, 256), (1, 8, 1, 16), (5, 9, 11, 30)])
def test_windows(window: tuple[int, int, int, int], options: dict[str, Any], dtype: torch.dtype) -> None:
    packed = lowbit_rs.quantize(torch.randn(24, 256, device="cuda"), **options)
    view = cuda.view(packed.spec, packed.shape, list(packed.tensors().values()))
    row, col, rows, cols = window
    out = torch.full((rows, cols), torch.nan, dtype=dtype, device="cuda")
    _native.cuda_dequantize(view, window, (out.data_ptr(), out.numel(), str(dtype)[6:]), 0)
    assert_same_bits(out, packed.dequantize(dtype)[row : row + rows, col : col + cols].cpu())
    with pytest.raises(InvalidArgument, match="window: got"):
        _native.cuda_dequantize(view, (20, 0, 5, 256), (out.data_ptr(), 5 * 256, str(dtype)[6:]), 0)


@pytest.mark.parametrize("cols", [75, 128])
def test_embedding_rows(options: dict[str, Any], cols: int, dtype: torch.dtype) -> None:
    packed = lowbit_rs.quantize(torch.randn(40, cols, device="cuda").to(dtype), **options)
    for indices in (torch.randint(40, (2, 7)), torch.tensor(39), torch.empty(0, dtype=torch.int64)):
        for kind in (torch.int64, torch.int32):
            rows = torch.ops.lowbit_rs.embedding.default(
                indices.to("cuda", kind), list(packed.tensors().values()), list(packed.shape), *packed.scheme, dtype
            )
            assert torch.equal(rows, packed.dequantize()[indices.cuda()])


def test_an_index_outside_stops_the_program_as_in_torch() -> None:
    code = """
import torch, lowbit_rs
layer = lowbit_rs.QuantEmbedding(40, 64, device="cuda")
layer(torch.tensor([1, 40], device="cuda"))
torch.cuda.synchronize()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "device-side assert" in run.stderr


@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    rows, cols = 2**17 + 3, 2**14 + 64
    if torch.cuda.mem_get_info()[0] < 14 * rows * cols // 4:
        pytest.skip("the GPU has too little free memory")
    tensor = torch.empty(rows, cols, dtype=torch.bfloat16, device="cuda")
    tensor.normal_()
    packed = lowbit_rs.quantize(tensor, double_quant=True)
    last = tensor[-3:].cpu()
    del tensor
    whole = packed.dequantize()
    plain = lowbit_rs.quantize(last)
    assert torch.equal(packed.data[-3:].cpu(), plain.data)
    assert torch.equal(packed.dequantize(torch.bfloat16)[:3], whole[:3])
    wanted = lowbit_rs.quantize(last).dequantize()
    # Double quantization moves each scale by less than a 1/100 of the largest; the codes are the same.
    torch.testing.assert_close(whole[-3:].cpu(), wanted, rtol=0.05, atol=0.05)
    y = lowbit_rs.linear(torch.ones(1, cols, dtype=torch.bfloat16, device="cuda"), packed)
    exact = whole[-3:].double().sum(1)
    bound = whole[-3:].double().abs().sum(1) * 2**-7
    assert bool(((y[0, -3:].double() - exact).abs() <= bound).all())


def test_empty_weights() -> None:
    for shape in ((0, 64), (8, 0), (0, 0), (0, 3, 64)):
        for options in ({}, {"double_quant": True}):
            mine, wanted = both(torch.zeros(*shape), **options)
            assert mine == wanted
            assert mine.to("cuda").dequantize().shape == shape


def test_numpy_arrays_go_where_they_are_sent() -> None:
    packed = lowbit_rs.quantize(np.eye(4, 64, dtype=np.float32))
    assert packed.to("cuda").to("cpu") == packed
