"""PackedWeight as a value: what it holds, checks, compares, prints, and how it travels."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lowbit_rs
from lowbit_rs import InvalidArgument, PackedWeight, quantize
from lowbit_rs._native import Spec
from lowbit_rs.packed import FIELDS, format_bytes, state_key, storage, why_not_joined
from strategies import FORMATS

TABLE = (-1.0, -0.25, 0.0, 0.25, 1.0)


@pytest.fixture(params=[*FORMATS, "custom", "double_quant", "flat"])
def packed(request: pytest.FixtureRequest) -> PackedWeight:
    special: dict[str, dict[str, Any]] = {
        "custom": {"codebook": TABLE},
        "double_quant": {"format": "uint4", "double_quant": True},
        "flat": {"block_order": "flat"},
    }
    return lowbit_rs.quantize(torch.randn(12, 75), **special.get(request.param, {"format": request.param}))


def with_tensor(packed: PackedWeight, name: str, tensor: Tensor | None) -> PackedWeight:
    tensors = {key: value for key, value in (packed.tensors() | {name: tensor}).items() if value is not None}
    return PackedWeight.from_tensors(packed.spec, packed.shape, packed.dtype, tensors)


def test_attributes_of_the_plain_format() -> None:
    packed = lowbit_rs.quantize(torch.randn(8, 128, dtype=torch.bfloat16))
    assert packed.spec == Spec("nf4", 64)
    assert packed.shape == torch.Size([8, 128])
    assert packed.dtype == torch.bfloat16
    assert (packed.data.shape, packed.data.dtype) == ((8, 64), torch.uint8)
    assert (packed.scale.shape, packed.scale.dtype) == ((8, 2), torch.float32)
    assert packed.scale_2 is packed.scale_offset is packed.shift is packed.codebook is None
    assert packed.nbytes == 8 * 64 + 8 * 2 * 4
    assert packed.bits_per_weight == 4.5
    assert packed.device == torch.device("cpu")
    assert packed.dequantize().dtype == torch.bfloat16
    assert packed.dequantize(torch.float16).dtype == torch.float16


def test_storage_of_every_format(packed: PackedWeight) -> None:
    codebook = None if packed.codebook is None else packed.codebook.numel()
    expected = storage(packed.spec, packed.shape, codebook)
    tensors = packed.tensors()
    assert list(tensors) == list(expected) == [name for name in FIELDS if name in expected]
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} == expected


def test_shapes_of_storage() -> None:
    """Codes of a row end on a byte, scales on a block; double quantization adds one fp32 for 256 scales."""
    sizes = storage(Spec("uint4", 32, double_quant=True), (3, 100, 75))
    shapes = {name: list(size) for name, (size, _) in sizes.items()}
    blocks = 3 * 100 * 3
    assert shapes == {
        "data": [3, 100, 38],
        "scale": [3, 100, 3],
        "scale_2": [-(-blocks // 256)],
        "scale_offset": [1],
        "shift": [3, 100, 3],
    }
    flat = {name: list(size) for name, (size, _) in storage(Spec("nf4", 32, block_order="flat"), (100, 75)).items()}
    assert flat == {"data": [3750], "scale": [235]}


def test_from_tensors_gives_the_same_weight(packed: PackedWeight) -> None:
    same = PackedWeight.from_tensors(packed.spec, list(packed.shape), packed.dtype, packed.tensors())
    assert same == packed
    assert same.data is packed.data


def test_from_tensors_names_what_is_wrong() -> None:
    packed = lowbit_rs.quantize(torch.randn(8, 128))
    tensors = packed.tensors()
    wrong: list[tuple[dict[str, Tensor], str]] = [
        ({"data": packed.data}, r"tensors: got \['data'\], expected the key 'scale' among them"),
        (tensors | {"absmax": packed.scale}, r"tensors: got \['absmax'\], expected keys among data, scale"),
        (tensors | {"shift": packed.scale}, "shift: got a tensor, expected None for nf4, block_size=64"),
        (tensors | {"data": packed.data[1:]}, r"data: got torch.uint8 \[7, 64\], expected torch.uint8 \[8, 64\] for"),
        (tensors | {"data": packed.data.view(torch.int8)}, r"data: got torch.int8 \[8, 64\], expected torch.uint8"),
        (tensors | {"scale": packed.scale.half()}, r"scale: got torch.float16 \[8, 2\], expected torch.float32"),
        (tensors | {"scale": packed.scale.to("meta")}, "scale: got a tensor on meta, expected one on cpu"),
    ]
    for parts, message in wrong:
        with pytest.raises(InvalidArgument, match=message):
            PackedWeight.from_tensors(packed.spec, packed.shape, packed.dtype, parts)
    with pytest.raises(InvalidArgument, match=r"shape: got \[8\], expected \[N, K\] or \[experts, N, K\]"):
        PackedWeight.from_tensors(packed.spec, [8], packed.dtype, tensors)
    with pytest.raises(InvalidArgument, match=r"dtype: got torch\.float64"):
        PackedWeight.from_tensors(packed.spec, packed.shape, torch.float64, tensors)
    with pytest.raises(InvalidArgument, match=r"dtype: got torch\.int8"):
        packed.dequantize(torch.int8)
    custom = lowbit_rs.quantize(torch.randn(8, 128), codebook=TABLE)
    with pytest.raises(InvalidArgument, match="codebook: got None, expected a tensor for custom"):
        with_tensor(custom, "codebook", None)
    with pytest.raises(InvalidArgument, match="codebook: got 17 values, expected 2 to 16 values"):
        with_tensor(custom, "codebook", torch.zeros(17))


def test_equality_is_of_bits(packed: PackedWeight) -> None:
    assert packed == copy.deepcopy(packed)
    assert packed != packed.data
    for name, tensor in packed.tensors().items():
        changed = tensor.clone()
        changed.view(torch.uint8).flatten()[0] ^= 1
        assert with_tensor(packed, name, changed) != packed
    nan = with_tensor(packed, "scale", torch.zeros_like(packed.scale))
    if packed.scale.is_floating_point():
        negative_zero = with_tensor(packed, "scale", -torch.zeros_like(packed.scale))
        assert nan != negative_zero
        nan = with_tensor(packed, "scale", torch.full_like(packed.scale, torch.nan))
        assert nan == copy.deepcopy(nan)


def test_equality_looks_at_spec_shape_and_dtype() -> None:
    weight = torch.zeros(8, 128)
    packed = lowbit_rs.quantize(weight)
    assert packed != lowbit_rs.quantize(weight, "int4")
    assert packed != lowbit_rs.quantize(weight, block_size=128)
    assert packed != lowbit_rs.quantize(weight.reshape(1, 8, 128))
    assert packed != lowbit_rs.quantize(weight.half())


def test_equality_across_devices_is_an_error_as_in_torch() -> None:
    packed = lowbit_rs.quantize(torch.randn(8, 128))
    with pytest.raises((RuntimeError, NotImplementedError)):
        assert packed == packed.to("meta")


def test_is_not_hashable() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(lowbit_rs.quantize(torch.randn(8, 128)))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "PackedWeight(nf4, block_size=64, scale=float32, shape=[64, 1024], 4.50 bits/weight, 36.9 kB, cpu)"),
        (
            {"double_quant": True},
            "PackedWeight(nf4, block_size=64, double_quant, shape=[64, 1024], 4.13 bits/weight, 33.8 kB, cpu)",
        ),
        (
            {"format": "uint4", "block_size": "row", "double_quant": True},
            "PackedWeight(uint4, block_size=row, double_quant, shift=float32, shape=[64, 1024], "
            "4.04 bits/weight, 33.1 kB, cpu)",
        ),
        (
            {"codebook": TABLE, "signed_absmax": True, "scale_dtype": torch.bfloat16, "block_order": "flat"},
            "PackedWeight(custom, block_size=64, scale=bfloat16, block_order=flat, signed_absmax, shape=[64, 1024], "
            "4.25 bits/weight, 34.8 kB, cpu)",
        ),
    ],
)
def test_repr_says_what_it_is(options: dict[str, Any], text: str) -> None:
    assert repr(lowbit_rs.quantize(torch.randn(64, 1024), **options)) == text


def test_bytes_for_people() -> None:
    assert [format_bytes(count) for count in (0, 999, 1000, 9_437_184, 2_500_000_000)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "9.4 MB",
        "2.5 GB",
    ]


def test_pickle_and_torch_save(packed: PackedWeight) -> None:
    assert pickle.loads(pickle.dumps(packed)) == packed
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False) == packed


def test_moving_to_a_device_keeps_dtypes(packed: PackedWeight) -> None:
    assert packed.to("cpu") is packed
    moved = packed.to("meta")
    assert moved.device == torch.device("meta")
    assert (moved.spec, moved.shape, moved.dtype) == (packed.spec, packed.shape, packed.dtype)
    assert {k: v.dtype for k, v in moved.tensors().items()} == {k: v.dtype for k, v in packed.tensors().items()}
    assert moved.nbytes == packed.nbytes


def test_meta_weights_have_shapes_alone() -> None:
    assert lowbit_rs.quantize(torch.randn(8, 128)).to("meta").dequantize().is_meta


def test_is_immutable() -> None:
    packed = lowbit_rs.quantize(torch.randn(8, 128))
    with pytest.raises(AttributeError):
        packed.dtype = torch.float16  # type: ignore[misc]


def test_keys_of_files() -> None:
    assert [state_key("X.weight", field) for field in FIELDS] == [
        "X.weight",
        "X.weight_scale",
        "X.weight_scale_2",
        "X.weight_scale_offset",
        "X.weight_shift",
        "X.weight_codebook",
        "X.weight_permutation",
    ]


def test_corrupt_codes_of_a_short_codebook_read_as_zero() -> None:
    """Codes beyond the table's length have a meaning all the same, so no byte of a file can read out of bounds."""
    packed = lowbit_rs.quantize(torch.randn(1, 64), codebook=(-1.0, 1.0))
    assert not with_tensor(packed, "data", torch.full_like(packed.data, 0xFF)).dequantize().any()


def parts_of(packed: PackedWeight, rows: list[int]) -> list[PackedWeight]:
    """A packed weight cut between rows, with the scales of scales that each part begins with."""
    parts, start = [], 0
    for count in rows:
        stop = start + count
        tensors = dict(packed.tensors())
        for name in ("data", "scale", "shift"):
            if name in tensors:
                tensors[name] = tensors[name][start:stop]
        if "scale_2" in tensors:
            first = start * tensors["scale"].shape[1] // 256
            tensors["scale_2"] = tensors["scale_2"][first : first + -(-tensors["scale"].numel() // 256)]
        parts.append(PackedWeight.from_tensors(packed.spec, [count, packed.shape[1]], packed.dtype, tensors))
        start = stop
    return parts


@given(st.lists(st.integers(1, 48), min_size=2, max_size=3), st.sampled_from([64, 128, 512]), st.booleans())
def test_rule_of_joining(rows: list[int], cols: int, double_quant: bool) -> None:
    """What the rule lets pass decodes, as one matrix, to the rows of its parts; and it lets whole groups pass."""
    weight = torch.randn(sum(rows), cols, generator=torch.Generator().manual_seed(sum(rows)))
    packed = quantize(weight, block_size=16, double_quant=double_quant)
    parts = parts_of(packed, rows)
    blocks = [count * cols // 16 for count in rows[:-1]]
    fits = all(count % (256 if double_quant else 4) == 0 for count in blocks)
    assert (why_not_joined(parts) is None) == fits
    if fits:
        whole = torch.cat([part.dequantize() for part in parts])
        assert torch.equal(whole, packed.dequantize())


def test_double_quantized_weights_join_where_they_share_their_offset() -> None:
    weight = torch.randn(96, 512)
    first, second = parts_of(quantize(weight, block_size=64, double_quant=True), [64, 32])
    assert why_not_joined([first, second]) is None
    other = quantize(weight[64:], block_size=64, double_quant=True)
    assert why_not_joined([first, other]) == "their scale_offsets differ"
    assert why_not_joined([second, first]) is None  # 32 * 8 scales are a whole number, too
