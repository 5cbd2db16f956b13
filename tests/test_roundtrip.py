"""What packing promises for every weight: bounds that are theorems, with every term derived."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import lowbit_rs
import oracle
from lowbit_rs import PackedWeight, codebooks
from lowbit_rs.packed import DTYPES, BlockSize
from strategies import FORMATS, LARGEST, Options, options, tables, weights


def pack(weight: Tensor, how: Options) -> PackedWeight:
    # A scale must fit its storage; those of shifted formats span up to twice the largest weight.
    assume(float(weight.abs().max()) <= LARGEST[how.scale_dtype])
    return lowbit_rs.quantize(weight, **how.keywords())


def block_maximum(packed: PackedWeight, values: Tensor) -> Tensor:
    """The largest of ``values`` in the block of each weight."""
    blocks = torch.arange(packed.scale.numel()).reshape(packed.scale.shape)
    index = oracle.per_weight(packed, blocks)
    maxima = torch.full((packed.scale.numel(),), -torch.inf, dtype=torch.float64)
    maxima.scatter_reduce_(0, index.flatten(), values.double().flatten(), "amax")
    return maxima[index]


def error_bound(weight: Tensor, packed: PackedWeight, unpacked: Tensor) -> Tensor:
    """The largest |w - w'| that the format allows, per weight.

    With E the block's extent (the largest distance from its shift, 0 where it has none), L the codebook's limit and C
    its largest magnitude, w = E/L u + shift and w' = round(s c + shift') where
    - |c - u| <= L radius, plus L 2^-21 for the fp32 roundings of 1/E (relative 2^-22 where it is subnormal), of the
      distance from the shift and of the product;
    - s = E/L with a relative rounding of fp32 and of the scale's storage, or an absolute one where those are subnormal;
    - shift' is the stored minimum or, in 8 bits, middle: weights below the minimum become it;
    - w' is rounded to fp32, and to the output's dtype.
    """
    codebook = oracle.codebook_of(packed.spec, packed.codebook)
    storage, out = DTYPES[packed.spec.scale_dtype], unpacked.dtype
    stored = oracle.unit_roundoff(storage) + oracle.unit_roundoff(torch.float32)
    largest = float(codebook.values.abs().max())
    if packed.shift is None:
        extent, lost = block_maximum(packed, weight.abs()), torch.tensor(0.0)
    else:
        low, high = -block_maximum(packed, -weight), block_maximum(packed, weight)
        shift = low if packed.spec.bits == 4 else (low + high) / 2
        # A middle is rounded to fp32 before it is stored.
        rounding = oracle.unit_roundoff(storage) + oracle.unit_roundoff(torch.float32) * (packed.spec.bits == 8)
        lost = rounding * (1 + 2.0**-8) * shift.abs() + oracle.half_step(storage)
        extent = high - shift + lost
    relative = codebook.radius + 2.0**-21 + largest / codebook.limit * stored * (1 + 2.0**-8)
    absolute = largest * (oracle.half_step(storage) + oracle.half_step(torch.float32)) + 2 * oracle.half_step(out)
    rounding = (oracle.unit_roundoff(torch.float32) + oracle.unit_roundoff(out)) * (1 + 2.0**-8)
    return extent * relative + lost + unpacked.double().abs() * rounding + absolute


@given(weights(), options(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_error_is_at_most_the_covering_radius_of_the_codebook(weight: Tensor, how: Options, out: torch.dtype) -> None:
    assume(float(weight.abs().max()) <= LARGEST[out])
    packed = pack(weight, how)
    unpacked = packed.dequantize(out)
    excess = (weight.double() - unpacked.double()).abs() - error_bound(weight, packed, unpacked)
    assert excess.max() <= 0


@given(weights(), options(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_dequantize_is_the_definition_to_the_bit(weight: Tensor, how: Options, out: torch.dtype) -> None:
    packed = pack(weight, how)
    assert torch.equal(packed.dequantize(out), oracle.dequantize(packed, out))


@given(weights(), options())
def test_zero_blocks_come_back_as_zeros(weight: Tensor, how: Options) -> None:
    assume(0.0 in oracle.codebook_of(pack(weight, how).spec, table(how)).values)
    weight = weight.clone()
    weight[..., 0, :] = 0
    packed = pack(weight, how)
    # Whole blocks of zeros: all of row 0 in row order, those inside it in flat order.
    zero = block_maximum(packed, weight.abs()) == 0
    assert not packed.dequantize()[zero].any()
    assert not torch.signbit(packed.dequantize())[zero].any() or how.signed_absmax


def table(how: Options) -> Tensor | None:
    return None if how.codebook is None else torch.tensor(how.codebook)


@st.composite
def both_ends(draw: st.DrawFn) -> Options:
    """Options whose codebook holds both -limit and +limit, so that a block's largest weight keeps its code."""
    how = draw(options(formats=("nf4", "fp4", "int4", "int8", "custom"), scale_dtypes=(torch.float32,)))
    if how.codebook is None:
        return how
    inner = [value for value in how.codebook if abs(value) != 1][:14]
    return Options(how.format, how.block_size, codebook=(-1.0, *inner, 1.0), block_order=how.block_order)


@given(weights(), both_ends())
def test_quantizing_a_dequantized_weight_gives_the_same_codes(weight: Tensor, how: Options) -> None:
    """In fp32, where the largest weight of a block survives: it is scale * limit, within a rounding of it.

    Below 2^-120 the fp32 products would lose bits, and codes with them.
    """
    largest = float(weight.abs().max())
    small = weight[weight != 0].abs().double().min() if weight.any() else 1.0
    assume(small >= 2.0**-110 and largest <= 2.0**100)
    packed = pack(weight, how)
    again = pack(packed.dequantize(torch.float32), how)
    # A zero that has two codes (FP4's -0) may change its sign: compare what codes stand for.
    assert torch.equal(oracle.codes(packed), oracle.codes(again)) or (
        how.format == "fp4" and torch.equal(packed.dequantize(torch.float32), again.dequantize(torch.float32))
    )


@given(weights(dtypes=(torch.float32,), largest=2.0**20), st.integers(-20, 20), st.booleans(), options())
def test_scaling_by_a_power_of_two_scales_exactly(weight: Tensor, power: int, double_quant: bool, how: Options) -> None:
    weight = torch.where(weight.abs() < 2.0**-20, 0.0, weight)
    keywords = how.keywords() | {"double_quant": double_quant, "scale_dtype": None}
    packed = lowbit_rs.quantize(weight, **keywords)
    scaled = lowbit_rs.quantize(weight * 2.0**power, **keywords)
    assert torch.equal(packed.data, scaled.data)
    assert torch.equal(packed.dequantize() * 2.0**power, scaled.dequantize())


@given(weights(), options(), st.data())
def test_blocks_are_independent(weight: Tensor, how: Options, data: st.DataObject) -> None:
    packed = pack(weight, how)
    block = data.draw(st.integers(0, packed.scale.numel() - 1), label="block")
    inside = oracle.per_weight(packed, torch.arange(packed.scale.numel()).reshape(packed.scale.shape)) == block
    changed = pack(torch.where(inside, weight / 2 + 1, weight), how)
    others = torch.arange(packed.scale.numel()) != block
    assert torch.equal(oracle.codes(packed)[~inside], oracle.codes(changed)[~inside])
    assert torch.equal(packed.scale.flatten()[others], changed.scale.flatten()[others])


@given(weights(), st.sampled_from(FORMATS), st.sampled_from([16, 64, "row"]))
def test_double_quantization_moves_scales_by_at_most_half_a_gap_of_its_map(
    weight: Tensor, format: str, block_size: BlockSize
) -> None:
    """Codes stay; a scale moves by at most scale_2 times the covering radius of the dynamic map, and roundings.

    Those are: of scale - offset, of its quotient, of product and sum when it is restored, each relative to numbers of
    at most |scale| + |offset| + scale_2.
    """
    plain = lowbit_rs.quantize(weight, format, block_size)
    double = lowbit_rs.quantize(weight, format, block_size, double_quant=True)
    assert torch.equal(plain.data, double.data)
    assert double.scale_2 is not None
    assert double.scale_offset is not None
    dynamic = np.sort(np.asarray(codebooks.dynamic_map(), dtype=np.float64))
    radius = max(float(np.diff(dynamic).max()) / 2, 1 + dynamic[0], 1 - dynamic[-1])
    scale_2 = double.scale_2.double().repeat_interleave(256)[: plain.scale.numel()]
    moved = (plain.scale.double() - oracle.scales(double).double()).abs().flatten()
    size = plain.scale.double().abs().flatten() + double.scale_offset.double().abs() + scale_2
    assert (moved - scale_2 * radius - size * 2.0**-21 - 4 * oracle.half_step(torch.float32)).max() <= 0


@pytest.mark.parametrize("format", ["nf4", "fp4", "int4", "uint4"])
def test_packing_is_a_bijection(format: str) -> None:
    """Every byte is two codes, the high nibble first, and no two bytes are the same two weights."""
    data = torch.arange(256, dtype=torch.uint8).reshape(8, 32)
    scheme = lowbit_rs.quantize(torch.ones(8, 64), format, 64)
    packed = PackedWeight.from_tensors(
        scheme.spec, (8, 64), torch.float32, {**scheme.tensors(), "data": data, "scale": torch.ones(8, 1)}
    )
    values = oracle.codebook_of(packed.spec, None).values
    shift = 0.0 if packed.shift is None else float(packed.shift[0, 0])
    pairs = packed.dequantize().reshape(256, 2)
    high, low = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    assert torch.equal(pairs, torch.stack([values[high], values[low]], -1).reshape(256, 2).float() + shift)


@given(tables(), st.data())
def test_custom_codes_stand_for_the_given_values(values: tuple[float, ...], data: st.DataObject) -> None:
    """A weight that is a codebook value times the scale comes back exactly, whatever the table's order."""
    extended = tuple(dict.fromkeys((*values[:15], 1.0)))
    rows = data.draw(st.lists(st.sampled_from(extended), min_size=1, max_size=64), label="row")
    weight = torch.tensor([[1.0, *rows]]) * 0.75
    packed = lowbit_rs.quantize(weight, codebook=extended, block_size="row")
    assert torch.equal(packed.dequantize(), weight)


@pytest.mark.usefixtures("isa")
@given(weights(), options())
def test_every_isa_packs_the_same_bits(weight: Tensor, how: Options) -> None:
    from lowbit_rs import _native

    current = _native.isa()
    packed = pack(weight, how)
    _native.force_isa("scalar")
    try:
        assert packed == pack(weight, how)
        assert torch.equal(packed.dequantize(), oracle.dequantize(packed, weight.dtype))
    finally:
        _native.force_isa(current)
