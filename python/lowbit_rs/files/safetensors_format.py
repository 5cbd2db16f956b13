"""The safetensors format: dtypes, and headers read with every check and written.

Eight bytes, the length of the header as a little-endian integer; the header, a JSON object that may be padded with
spaces; the data. The header maps a tensor's name to ``dtype``, ``shape`` and ``data_offsets`` (start and stop in the
data), and may map ``__metadata__`` to strings. The data of all tensors lies without holes or overlaps.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lowbit_rs.errors import invalid, unsupported

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library, which refuses longer headers as an attack on memory."""

_ALIGNMENT = 8
_LARGEST = (1 << 63) - 1

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits of an element of every dtype of the format."""

_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype; ``Unsupported`` where this version of torch has none."""
    dtype = getattr(torch, _TORCH_NAMES.get(name, ""), None)
    if not isinstance(dtype, torch.dtype):
        raise unsupported(f"dtype {name}", f"torch {torch.__version__} has no such type")
    return dtype


def safetensors_dtype(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype; ``InvalidArgument`` where the format has none."""
    for name, torch_name in _TORCH_NAMES.items():
        if getattr(torch, torch_name, None) is dtype:
            return name
    raise invalid("dtype", str(dtype), "one that safetensors files can hold: " + ", ".join(_TORCH_NAMES.values()))


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor but for its place; ``dtype`` is one of ``DTYPE_BITS``."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return bytes_of(self.dtype, self.shape)


@dataclass(frozen=True)
class Header:
    """The checked header of a file.

    Attributes:
        tensors: by name, in the order of their data.
        offsets: where each tensor's data begins, in bytes from the start of the file.
        metadata: the strings under ``__metadata__``.
    """

    tensors: Mapping[str, TensorInfo]
    offsets: Mapping[str, int]
    metadata: Mapping[str, str] | None


def bytes_of(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor. ``OverflowError`` past 2^63, ``ValueError`` where the elements do not fill whole bytes."""
    count = 1
    for size in shape:
        count *= size
        if count > _LARGEST:  # checked at every factor: the product of many large ones would take minutes
            raise OverflowError("more than 2^63 elements")
    bits = count * DTYPE_BITS[dtype]
    if bits % 8:
        raise ValueError("elements that do not fill whole bytes")
    if bits // 8 > _LARGEST:
        raise OverflowError("more than 2^63 bytes")
    return bits // 8


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the key {brief(name)} more than once")
        result[name] = value
    return result


def _short_integer(digits: str) -> int:
    if len(digits) > 20:  # longer ones are no offsets, and take quadratic time to convert
        raise ValueError(f"an integer of {len(digits)} digits")
    if digits == "-0":  # no integer to the safetensors library
        raise ValueError("the integer -0")
    return int(digits)


def _no_constant(name: str) -> None:
    raise ValueError(f"the constant {name}")


def parse_json(text: str) -> Any:
    """``json.loads`` that refuses duplicate keys, NaN, integers past 64 bits and deep nesting with ``ValueError``."""
    try:
        return json.loads(text, object_pairs_hook=_unique_pairs, parse_int=_short_integer, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("too many nested brackets") from None


def is_size(value: object) -> bool:
    """Whether a value of a JSON document is a size or an offset: an integer from 0 to 2^63 - 1."""
    return type(value) is int and 0 <= value <= _LARGEST


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # an unpaired surrogate, written as an escape in the JSON
        return False
    return True


def _parse_tensor(path: Path, name: str, value: object) -> tuple[int, int, TensorInfo]:
    """Checks one entry of the header by itself; gives start and stop of the data, and the rest."""
    where = f"{path}: tensor {brief(name)}"
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise invalid(where, brief(value), "an object with dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise invalid(f"{where}: dtype", brief(dtype), "one of " + ", ".join(DTYPE_BITS))
    if not isinstance(shape, list) or not all(is_size(size) for size in shape):
        raise invalid(f"{where}: shape", brief(shape), "a list of integers from 0 to 2^63 - 1")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_size(offset) for offset in offsets):
        raise invalid(f"{where}: data_offsets", brief(offsets), "two integers from 0 to 2^63 - 1")
    try:
        expected = bytes_of(dtype, shape)
    except (OverflowError, ValueError) as error:
        raise invalid(f"{where}: shape", f"{brief(shape)}, {error}", "a tensor of fewer bytes, all whole") from None
    start, stop = offsets
    if stop - start != expected:
        got = f"[{start}, {stop}], {stop - start} bytes"
        raise invalid(f"{where}: data_offsets", got, f"{expected} bytes for {dtype} {brief(shape)}")
    return start, stop, TensorInfo(name, dtype, tuple(shape))


def brief(value: object) -> str:
    """``repr`` cut to a readable line."""
    try:
        text = repr(value)
    except RecursionError:  # JSON that was parsed with nearly all of the stack
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 100 else text[:97] + "..."


def _parse_metadata(path: Path, value: object) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(
        isinstance(text, str) and _is_utf8(text) and _is_utf8(key) for key, text in value.items()
    ):
        raise invalid(f"{path}: __metadata__", brief(value), "an object of strings")
    return value


def parse_header(path: Path, text: str, data_start: int, data_bytes: int) -> Header:
    """Checks the JSON text of a header against the bytes that follow it.

    Args:
        path: of the file, for messages.
        text: the header.
        data_start: where the data begins, in bytes from the start of the file.
        data_bytes: bytes from there to the end of the file.
    """
    try:
        content = parse_json(text)
    except ValueError as error:
        raise invalid(f"{path}: header", str(error), "a JSON object") from None
    if not isinstance(content, dict) or not all(_is_utf8(name) for name in content):
        raise invalid(f"{path}: header", "a name that is not valid Unicode", "a JSON object in UTF-8")
    metadata = _parse_metadata(path, content.pop("__metadata__", None))
    places = [_parse_tensor(path, name, value) for name, value in content.items()]
    places.sort(key=lambda place: place[:2])
    end = 0
    for start, stop, tensor in places:
        if start != end:
            what = "overlaps the tensor before it" if start < end else "leaves a hole before it"
            got = f"{start} as its start, which {what}"
            raise invalid(f"{path}: tensor {brief(tensor.name)}: data_offsets", got, f"{end}")
        end = stop
    if end != data_bytes:
        what = "the file is truncated" if end > data_bytes else "some belong to no tensor"
        raise invalid(str(path), f"{data_bytes} bytes of data: {what}", f"{end}, where the last tensor ends")
    offsets = {tensor.name: data_start + start for start, _, tensor in places}
    return Header({tensor.name: tensor for _, _, tensor in places}, offsets, metadata)


def encode_header(tensors: Iterable[TensorInfo], metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file whose tensors lie in this order, up to its data, and where each tensor's data begins.

    The header is padded so that the data begins at a multiple of eight. ``InvalidArgument`` where a name occurs twice,
    or where the header would be longer than readers take.
    """
    content: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    starts: dict[str, int] = {}
    stop = 0
    for tensor in tensors:
        if tensor.name in starts or tensor.name == "__metadata__":
            raise invalid("tensors", f"the name {brief(tensor.name)} twice", "distinct names")
        starts[tensor.name], stop = stop, stop + tensor.nbytes
        offsets = [starts[tensor.name], stop]
        content[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    header = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    if len(header) > MAX_HEADER_BYTES:
        raise invalid("tensors", f"a header of {len(header)} bytes", f"at most {MAX_HEADER_BYTES}")
    head = len(header).to_bytes(LENGTH_BYTES, "little") + header
    return head, {name: len(head) + start for name, start in starts.items()}
