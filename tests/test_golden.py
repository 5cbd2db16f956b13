"""Bit for bit what bitsandbytes' CUDA kernels return, from tests/data/golden.npz."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import lowbit_rs
from lowbit_rs import PackedWeight

GOLDEN = np.load(Path(__file__).parent / "data" / "golden.npz")
CASES = ("even", "ragged", "tiny", "zeroblock", "heavy", "tinyvals", "grid")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

#: Values of FP4 that sit on a threshold, where CUDA's approximate reciprocal tips them to the other side. CASE, dtype,
#: block size -> how many. Four of 443,400 values.
FP4_TIES = {
    ("even", torch.bfloat16, 32): 1,
    ("even", torch.bfloat16, 64): 1,
    ("ragged", torch.bfloat16, 32): 1,
    ("ragged", torch.bfloat16, 64): 1,
}

#: Cases of double quantization (of 7 inputs, 3 dtypes, 2 block sizes) whose fp32 mean has bitsandbytes' bits.
EQUAL_SCALES = 38


def source(case: str, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(GOLDEN[f"{case}|x"]).to(dtype)


def nibbles(data: Tensor, count: int) -> Tensor:
    data = data.flatten()
    return torch.stack([data >> 4, data & 15], -1).flatten()[:count]


def digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).digest()


def absmax(case: str, dtype: torch.dtype, block_size: int) -> Tensor:
    return torch.from_numpy(GOLDEN[f"{case}|{block_size}|absmax"][DTYPES.index(dtype)])


def codes(case: str, format: str, dtype: torch.dtype, block_size: int) -> Tensor:
    return torch.from_numpy(GOLDEN[f"{case}|{format}|codes"][DTYPES.index(dtype), BLOCK_SIZES.index(block_size)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("case", CASES)
def test_codes_and_scales(case: str, format: str, dtype: torch.dtype) -> None:
    """Equal codes but for FP4_TIES, and but for blocks of zeros.

    In those bitsandbytes keeps the codes 0 (0 * infinity is NaN, which no threshold catches), which is -1 in NF4; here
    it is the code of 0.0, so that a zero block unpacks to zeros under any later scale.
    """
    x = source(case, dtype)
    for block_size in BLOCK_SIZES:
        packed = lowbit_rs.quantize(x[None], format, block_size)
        expected = absmax(case, dtype, block_size)
        assert torch.equal(packed.scale.flatten(), expected)
        in_zero_block = (expected == 0).repeat_interleave(block_size)[: x.numel()]
        got, wanted = nibbles(packed.data, x.numel()), nibbles(codes(case, format, dtype, block_size), x.numel())
        differing = (got != wanted) & ~in_zero_block
        ties = FP4_TIES.get((case, dtype, block_size), 0) if format == "fp4" else 0
        assert int(differing.sum()) == ties
        assert bool((got[in_zero_block] == (7 if format == "nf4" else 0)).all())
        assert bool((wanted[in_zero_block] == 0).all())


def test_ties_are_four_in_all() -> None:
    assert sum(FP4_TIES.values()) == 4
    assert sum(GOLDEN[f"{case}|x"].size for case in CASES) * len(DTYPES) * len(BLOCK_SIZES) == 443_400


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("case", CASES)
def test_dequantized_values(case: str, format: str, dtype: torch.dtype) -> None:
    """Every value of every case, from bitsandbytes' own codes and scales. A zero block's -1 * 0 is its -0."""
    count = source(case, dtype).numel()
    for index, block_size in enumerate(BLOCK_SIZES):
        packed = PackedWeight.from_tensors(
            lowbit_rs.quantize(torch.zeros(1, 1), format, block_size).spec,
            (1, count),
            dtype,
            {
                "data": codes(case, format, dtype, block_size)[None],
                "scale": absmax(case, dtype, block_size)[None],
            },
        )
        assert digest(packed.dequantize()) == GOLDEN[f"{case}|{format}|y"][DTYPES.index(dtype), index].tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [64, 256])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("case", CASES)
def test_double_quantized_values(case: str, format: str, block_size: int, dtype: torch.dtype) -> None:
    """The scales that bitsandbytes stored are restored, and with them every value, to the bit."""
    row = DTYPES.index(dtype)
    scale, offset, scale_2 = golden_scales(case, dtype, block_size)
    data = codes(case, format, dtype, block_size)[None]
    packed = PackedWeight.from_tensors(
        lowbit_rs.quantize(torch.zeros(1, 1), format, block_size, double_quant=True).spec,
        (1, source(case, dtype).numel()),
        dtype,
        {"data": data, "scale": scale[None], "scale_2": scale_2, "scale_offset": offset},
    )
    assert digest(packed.dequantize()) == GOLDEN[f"{case}|{format}|{block_size}|dq_y"][row].tobytes()


@pytest.mark.parametrize("case", CASES)
def test_double_quantized_scales(case: str) -> None:
    """The same 8-bit codes wherever offset and scale_2 are equal, that is in `EQUAL_SCALES` cases.

    The offset is the mean of the scales, and a mean depends on the order of its sum: bitsandbytes' reduction on a GPU
    is not ours. Where it differs, by at most the roundings of n sums, codes may differ, but by one step. Where all
    scales are equal, scale_2 is 0, and bitsandbytes' codes are 0 for the same reason as in zero blocks; ours are 127,
    that of 0.0.
    """
    for dtype, block_size, packed in double_quantized(case):
        scale, offset, scale_2 = golden_scales(case, dtype, block_size)
        assert packed.scale_2 is not None
        assert packed.scale_offset is not None
        assert torch.allclose(packed.scale_offset, offset, rtol=packed.scale.numel() * 2.0**-24, atol=0)
        if float(scale_2[0]) == 0:
            assert bool((packed.scale == 127).all())
            assert bool((scale == 0).all())
        elif torch.equal(packed.scale_offset, offset) and torch.equal(packed.scale_2, scale_2):
            assert torch.equal(packed.scale.flatten(), scale)
        else:
            assert int((packed.scale.flatten().int() - scale.int()).abs().max()) <= 1


def test_offsets_of_double_quantization_are_mostly_equal() -> None:
    """In how many of the 42 cases the test above compares codes to the bit."""
    equal = 0
    for case in CASES:
        for dtype, block_size, packed in double_quantized(case):
            _, offset, scale_2 = golden_scales(case, dtype, block_size)
            assert packed.scale_2 is not None
            assert packed.scale_offset is not None
            equal += torch.equal(packed.scale_offset, offset) and torch.equal(packed.scale_2, scale_2)
    assert equal == EQUAL_SCALES


def double_quantized(case: str) -> Iterator[tuple[torch.dtype, int, PackedWeight]]:
    for dtype in DTYPES:
        for block_size in (64, 256):
            yield dtype, block_size, lowbit_rs.quantize(source(case, dtype)[None], "nf4", block_size, double_quant=True)


def golden_scales(case: str, dtype: torch.dtype, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """bitsandbytes' 8-bit scales, offset and second-level scales."""
    parts = (GOLDEN[f"{case}|{block_size}|dq_{part}"][DTYPES.index(dtype)] for part in ("absmax", "offset", "absmax2"))
    scale, offset, scale_2 = (torch.from_numpy(np.array(part).reshape(-1)) for part in parts)
    return scale, offset, scale_2


def test_flat_blocks_are_those_of_the_flattened_tensor() -> None:
    """2049 = 3 x 683: blocks of every size straddle the rows."""
    x = source("grid", torch.float32)
    for block_size in BLOCK_SIZES:
        packed = lowbit_rs.quantize(x.reshape(3, 683), "nf4", block_size, block_order="flat")
        assert torch.equal(packed.data, codes("grid", "nf4", torch.float32, block_size))
        assert torch.equal(packed.scale, absmax("grid", torch.float32, block_size))


def test_row_aligned_blocks_are_flat_ones_where_rows_are_whole_blocks() -> None:
    x = source("even", torch.float32).reshape(24, 256)
    for block_size in (32, 64, 128, 256):
        packed = lowbit_rs.quantize(x, "nf4", block_size)
        assert torch.equal(packed.data.flatten(), codes("even", "nf4", torch.float32, block_size))
        assert packed == lowbit_rs.quantize(x, "nf4", block_size)
        flat = lowbit_rs.quantize(x, "nf4", block_size, block_order="flat")
        assert torch.equal(packed.data, flat.data)
        assert packed.data.shape == flat.data.shape


@pytest.mark.parametrize("shape", ["5x48x96", "33x64x256"])
def test_int8_rows(shape: str) -> None:
    """LLM.int8's weight: a scale a row. bitsandbytes stores the absolute maximum, this package 1/127 of it.

    In either weight, one value times 127 / absmax is exactly 63.5. It goes to the even 64; CUDA's approximate
    reciprocal takes it to 63.
    """
    weight = torch.from_numpy(GOLDEN[f"int8|{shape}|W"]).view(torch.float16)
    codes, absmax = torch.from_numpy(GOLDEN[f"int8|{shape}|CB"]), torch.from_numpy(GOLDEN[f"int8|{shape}|SCB"])
    packed = lowbit_rs.quantize(weight, "int8", "row")
    assert torch.equal(packed.scale.flatten(), absmax / 127)
    differing = packed.data != codes
    tie = (weight.double() * 127 / absmax.double()[:, None]).abs() == 63.5
    assert int(differing.sum()) == 1
    assert bool(tie[differing].all())
    assert packed.data[differing].abs().tolist() == [64]
