"""Hostile safetensors files: the reader takes only what the safetensors library takes, too, or names what is wrong."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

import lowbit_rs
from lowbit_rs import InvalidArgument, PackedWeight
from lowbit_rs.files import inspect, load_packed, save_packed
from lowbit_rs.files.safetensors_format import DTYPE_BITS
from lowbit_rs.files.safetensors_stream import SafetensorsReader, read_header

#: Far above what a file of a few kilobytes takes, and far below what its header may claim.
MOST_SECONDS, MOST_BYTES = 5.0, 8 << 20

one_file = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def build(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def describe(**tensors: object) -> bytes:
    return json.dumps(tensors).encode()


def f32(start: int, stop: int, *shape: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, stop]}


def plain_file() -> bytes:
    tensors = {
        "a.weight": torch.arange(12.0).reshape(3, 4),
        "b": torch.arange(5, dtype=torch.bfloat16),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "µ": torch.tensor([True, False]),
    }
    return bytes(save(tensors, {"format": "pt"}))


def quantized_file(directory: Path) -> bytes:
    weight = torch.linspace(-1, 1, 3 * 40).reshape(3, 40)
    weights: dict[str, PackedWeight | torch.Tensor] = {
        "a.weight": lowbit_rs.quantize(weight, "uint4", 16, double_quant=True),
        "b.weight": lowbit_rs.quantize(weight.half(), codebook=[-1, -0.5, 0, 0.5, 1]),
        "norm.weight": torch.ones(3),
    }
    path = directory / "quantized.safetensors"
    save_packed(weights, path, force=True)
    return path.read_bytes()


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A change of a few bytes anywhere, the header more often than the data."""
    position = draw(st.integers(0, 2000) | st.integers(0, 40))
    kind = draw(st.sampled_from(["set", "insert", "delete", "truncate", "digit", "length", "swap"]))
    value = draw(st.binary(min_size=1, max_size=6))

    def mutate(content: bytes) -> bytes:
        at = position % (len(content) + 1)
        if kind == "set":
            return content[:at] + value + content[at + len(value) :]
        if kind == "insert":
            return content[:at] + value + content[at:]
        if kind == "delete":
            return content[:at] + content[at + len(value) :]
        if kind == "truncate":
            return content[:at]
        if kind == "length":
            return value.ljust(8, b"\0") + content[8:]
        if kind == "swap":  # of two equal pieces, which keeps the JSON whole more often
            return content[:at] + content[at + 8 : at + 16] + content[at : at + 8] + content[at + 16 :]
        digits = [index for index, byte in enumerate(content) if 48 <= byte < 58]
        if not digits:
            return content
        at = digits[at % len(digits)]
        return content[:at] + bytes([48 + value[0] % 10]) + content[at + 1 :]

    return mutate


def attempt(read: Callable[[Path], Any], path: Path) -> Any:
    """What ``read`` makes of the file, or None where it refuses it by name; any other exception is a failure."""
    try:
        return read(path)
    except (InvalidArgument, lowbit_rs.Unsupported) as error:
        refusal = str(error)
    assert str(path) in refusal
    return None


def check(path: Path, content: bytes) -> None:
    """Reads ``content`` in every way: each gives a consistent result or refuses the file."""
    path.write_bytes(content)
    start = time.monotonic()
    header = attempt(read_header, path)
    if header is not None:
        starts = sorted(header.offsets.values())
        stops = sorted(header.offsets[name] + info.nbytes for name, info in header.tensors.items())
        assert [*starts[1:], len(content)] == stops or not starts
        assert_library_agrees(path, content)
    attempt(load_packed, path)
    attempt(inspect, path)
    assert time.monotonic() - start < MOST_SECONDS


def assert_library_agrees(path: Path, content: bytes) -> None:
    """The safetensors library takes the file and finds the same tensors, byte for byte."""
    theirs = dict(safetensors.deserialize(content))
    with SafetensorsReader(path) as reader:
        assert theirs.keys() == reader.header.tensors.keys()
        for name, info in reader.header.tensors.items():
            assert (theirs[name]["dtype"], tuple(theirs[name]["shape"])) == (info.dtype, info.shape)
            assert bytes(theirs[name]["data"]) == b"".join(bytes(piece) for piece in reader.chunks(name))


@given(changes=st.lists(mutations(), max_size=4))
@settings(one_file, max_examples=300)
def test_mutated_plain_file(tmp_path: Path, changes: list[Callable[[bytes], bytes]]) -> None:
    content = plain_file()
    for change in changes:
        content = change(content)
    check(tmp_path / "mutated.safetensors", content)


@given(changes=st.lists(mutations(), min_size=1, max_size=3))
@settings(one_file, max_examples=300)
def test_mutated_quantized_file(tmp_path: Path, changes: list[Callable[[bytes], bytes]]) -> None:
    content = quantized_file(tmp_path)
    for change in changes:
        content = change(content)
    check(tmp_path / "mutated.safetensors", content)


@given(content=st.binary(max_size=64))
@one_file
@example(b"")
@example(b"\0" * 8)
@example(b"\x02" + b"\0" * 7 + b"{}")
def test_arbitrary_bytes(tmp_path: Path, content: bytes) -> None:
    check(tmp_path / "arbitrary.safetensors", content)


sizes = st.integers(0, 4) | st.sampled_from([-1, 2**31, 2**62, 2**63 - 1, 2**63, 2**64, 10**30])
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=4) | sizes,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BITS, "F33"]) | json_values,
        "shape": st.lists(sizes, max_size=4) | json_values,
        "data_offsets": st.lists(st.integers(0, 64) | sizes, min_size=2, max_size=2) | json_values,
    }
)


@given(
    tensors=st.dictionaries(st.text(max_size=4), entries | json_values, max_size=4),
    metadata=st.none() | st.dictionaries(st.text(max_size=4), st.text(max_size=4) | json_values),
    data=st.binary(max_size=64),
)
@settings(one_file, max_examples=300)
def test_arbitrary_headers(
    tmp_path: Path, tensors: dict[str, Any], metadata: dict[str, Any] | None, data: bytes
) -> None:
    header = tensors if metadata is None else {"__metadata__": metadata, **tensors}
    check(tmp_path / "header.safetensors", build(json.dumps(header).encode(), data))


@given(
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=4),
    dtypes=st.lists(st.sampled_from(list(DTYPE_BITS)), min_size=4, max_size=4),
    shuffle=st.randoms(use_true_random=False),
)
@one_file
def test_valid_headers_are_taken(tmp_path: Path, shapes: list[list[int]], dtypes: list[str], shuffle: Any) -> None:
    """In any order of the names, and with any dtype whose elements fill whole bytes."""
    header, end = {}, 0
    for index, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False)):
        bits = DTYPE_BITS[dtype] * int(torch.Size(shape).numel())
        if bits % 8 == 0:
            header[f"t{index}"] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + bits // 8]}
            end += bits // 8
    items = list(header.items())
    shuffle.shuffle(items)
    content = build(json.dumps(dict(items)).encode(), bytes(range(256))[:end].ljust(end, b"\1"))
    path = tmp_path / "valid.safetensors"
    path.write_bytes(content)
    assert read_header(path).tensors.keys() == header.keys()
    assert_library_agrees(path, content)


fields = {
    "format": st.sampled_from(["nf4", "int8", "uint4", "custom", "nf5"]),
    "block_size": st.sampled_from([16, 32, "row", 48, 0, -1, 2**70, "64", True, 16.0]),
    "block_order": st.sampled_from(["row", "flat", "column"]),
    "scale_dtype": st.sampled_from(["float32", "bfloat16", "float64"]),
    "double_quant": st.booleans() | st.sampled_from([0, 1, "true"]),
    "signed_absmax": st.booleans(),
    "shape": st.sampled_from([[3, 40], [1, 3, 40], [3, 41], [40], [2**62, 2**62], [3, -40], [3, 40.0], [0, 0], "340"]),
    "dtype": st.sampled_from(["float32", "float16", "float64", 3]),
}


@given(changes=st.fixed_dictionaries({}, optional={key: value | json_values for key, value in fields.items()}))
@settings(one_file, max_examples=300)
def test_metadata_that_do_not_fit(tmp_path: Path, changes: dict[str, Any]) -> None:
    content = quantized_file(tmp_path)
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    lowbit = json.loads(header["__metadata__"]["lowbit"])
    lowbit["tensors"]["a.weight"] |= changes
    header["__metadata__"]["lowbit"] = json.dumps(lowbit)
    check(tmp_path / "metadata.safetensors", build(json.dumps(header).encode(), content[8 + length :]))


deep = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
malformed = {
    "empty": (b"", "got 0 bytes, expected a safetensors file, which has at least 8"),
    "short": (b"\x02\0\0", "got 3 bytes"),
    "truncated header": (build(b"{}", length=100), "got a header of 100 bytes in a file of 10, expected at most 2"),
    "huge header": (build(b"{}", length=2**64 - 1), "a header of 18446744073709551615 bytes"),
    "no object": (build(b"[]"), "header: got b'[]', expected a JSON object"),
    "leading space": (build(b" {}"), "header: got b' {}', expected a JSON object"),
    "not UTF-8": (build(b'{"\xff":1}'), "header: got a bad byte at 2, expected UTF-8"),
    "surrogate": (build(b'{"\\ud800":1}'), "a name that is not valid Unicode"),
    "broken JSON": (build(b'{"a":}'), "header: got Expecting value"),
    "trailing garbage": (build(b"{} x"), "header: got Extra data"),
    "deep": (build(deep), "header: got too many nested brackets"),
    "duplicate": (build(b'{"a":1,"a":2}'), "header: got the key 'a' more than once"),
    "duplicate field": (build(b'{"a":{"dtype":"F32","dtype":"F16"}}'), "got the key 'dtype' more than once"),
    "NaN": (build(b'{"a":NaN}'), "got the constant NaN"),
    "long integer": (build(b'{"a":' + b"9" * 5000 + b"}"), "got an integer of 5000 digits"),
    "no entry": (build(describe(a=3)), "tensor 'a': got 3, expected an object with dtype, shape and data_offsets"),
    "no shape": (build(b'{"a":{"dtype":"F32","data_offsets":[0,0]}}'), "expected an object with dtype, shape"),
    "dtype": (build(describe(a={**f32(0, 4, 1), "dtype": "F33"}), b"1234"), "dtype: got 'F33', expected one of BOOL"),
    "shape": (build(describe(a=f32(0, 4, -1)), b"1234"), "shape: got [-1], expected a list of integers"),
    "float shape": (build(describe(a={**f32(0, 4), "shape": [1.0]}), b"1234"), "shape: got [1.0]"),
    "bool shape": (build(describe(a={**f32(0, 4), "shape": [True]}), b"1234"), "shape: got [True]"),
    "shape overflow": (build(describe(a=f32(0, 4, 2**40, 2**40)), b"1234"), "more than 2^63 elements"),
    "many factors": (build(describe(a=f32(0, 4, *[2**60] * 50_000)), b"1234"), "more than 2^63 elements"),
    "part of a byte": (
        build(describe(a={"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}), b"1"),
        "elements that do not fill whole bytes",
    ),
    "offsets": (
        build(describe(a={**f32(0, 4, 1), "data_offsets": [0]}), b"1234"),
        "data_offsets: got [0], expected two",
    ),
    "reversed": (build(describe(a=f32(4, 0, 1)), b"1234"), "got [4, 0], -4 bytes, expected 4 bytes for F32 [1]"),
    "size": (build(describe(a=f32(0, 8, 1)), b"12345678"), "got [0, 8], 8 bytes, expected 4 bytes for F32 [1]"),
    "overlap": (
        build(describe(a=f32(0, 8, 2), b=f32(4, 12, 2)), bytes(12)),
        "tensor 'b': data_offsets: got 4 as its start, which overlaps the tensor before it, expected 8",
    ),
    "hole": (
        build(describe(a=f32(4, 8, 1)), bytes(8)),
        "got 4 as its start, which leaves a hole before it, expected 0",
    ),
    "truncated data": (
        build(describe(a=f32(0, 400, 100)), bytes(399)),
        "got 399 bytes of data: the file is truncated, expected 400, where the last tensor ends",
    ),
    "extra data": (
        build(describe(a=f32(0, 4, 1)), bytes(5)),
        "got 5 bytes of data: some belong to no tensor, expected 4",
    ),
    "metadata": (build(b'{"__metadata__":{"a":1}}'), "__metadata__: got {'a': 1}, expected an object of strings"),
}


@pytest.mark.parametrize(("content", "message"), malformed.values(), ids=malformed)
def test_malformed_file_is_named_with_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "malformed.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidArgument) as error:
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
    if not content[8:].startswith(b" {"):  # which the format's description forbids and the library takes
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize(content)
