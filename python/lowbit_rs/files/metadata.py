"""How a quantized weight stands in a safetensors file.

The weight called ``X.weight`` is stored under the names that ``QuantLinear`` gives its parameters: ``X.weight`` holds
the codes, ``X.weight_scale``, ``X.weight_scale_2``, ``X.weight_scale_offset``, ``X.weight_shift``,
``X.weight_codebook`` and ``X.weight_permutation`` the parts that it has. What cannot be told from these tensors stands
in the header, so that a reader needs no other file: ``__metadata__`` maps ``lowbit`` to the JSON text

    {"format_version": 1, "tensors": {"X.weight": {"format": "nf4", "block_size": 64, "block_order": "row",
     "scale_dtype": "float32", "double_quant": true, "signed_absmax": false, "shape": [N, K], "dtype": "bfloat16"}}}

where ``shape`` and ``dtype`` are those of the float weight, and where a permutation of its columns adds
``"permuted": true``. It is per file: in a sharded model each shard describes its own tensors, and the parts of a weight
lie in one shard. A shard may describe tensors of other shards as well, as those that transformers writes do.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lowbit_rs._native import Spec
from lowbit_rs.errors import InvalidArgument, invalid
from lowbit_rs.packed import DTYPES, FIELDS, PackedWeight, dtype_name, state_key, storage

from .safetensors_format import Header, TensorInfo, brief, is_size, parse_json, safetensors_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

METADATA_KEY = "lowbit"
FORMAT_VERSION = 1

_SPEC_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "format": str,
    "block_size": (int, str),
    "block_order": str,
    "scale_dtype": str,
    "double_quant": bool,
    "signed_absmax": bool,
}
_FIELDS = (*_SPEC_FIELDS, "shape", "dtype")


@dataclass(frozen=True)
class QuantizedTensor:
    """One quantized weight of a file.

    Attributes:
        name: of the weight, ``X.weight``.
        spec: how it is packed.
        shape: [N, K] or [experts, N, K], that of the float weight.
        dtype: torch.float32, float16 or bfloat16, that of the float weight.
        codebook_length: number of values in the table of a custom format, ``None`` for the others.
        permuted: whether columns are permuted.
    """

    name: str
    spec: Spec
    shape: torch.Size
    dtype: torch.dtype
    codebook_length: int | None = None
    permuted: bool = False

    @classmethod
    def of(cls, name: str, packed: PackedWeight) -> QuantizedTensor:
        """What a packed weight is in a file, under ``name``."""
        length = None if packed.codebook is None else packed.codebook.numel()
        return cls(name, packed.spec, packed.shape, packed.dtype, length, packed.permutation is not None)

    def parts(self) -> dict[str, TensorInfo]:
        """The tensors that hold the weight, keyed as ``PackedWeight.tensors``."""
        parts = {}
        sizes = storage(self.spec, self.shape, self.codebook_length, self.permuted)
        for part, (shape, dtype) in sizes.items():
            parts[part] = TensorInfo(state_key(self.name, part), safetensors_dtype(dtype), tuple(shape))
        return parts

    @property
    def source_bytes(self) -> int:
        """Bytes of the float weight."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def packed_bytes(self) -> int:
        """Bytes of its parts."""
        return sum(part.nbytes for part in self.parts().values())


def encode_metadata(source: Mapping[str, str] | None, tensors: Iterable[QuantizedTensor]) -> dict[str, str]:
    """The ``__metadata__`` of a file with these quantized weights; other entries of ``source`` are kept.

    Where ``source`` names no framework, "format": "pt" is added: Hugging Face's loader takes a file without metadata
    for PyTorch's, but refuses one whose metadata lack the entry.
    """
    described = {
        tensor.name: {
            **{field: getattr(tensor.spec, field) for field in _SPEC_FIELDS},
            "shape": list(tensor.shape),
            "dtype": dtype_name(tensor.dtype),
            **({"permuted": True} if tensor.permuted else {}),
        }
        for tensor in tensors
    }
    content = {"format_version": FORMAT_VERSION, "tensors": described}
    return {"format": "pt", **(source or {}), METADATA_KEY: json.dumps(content, separators=(",", ":"))}


def quantized_tensors(path: Path, header: Header) -> dict[str, QuantizedTensor]:
    """The quantized weights of a file by name, each checked against the tensors that it consists of; none if plain.

    Weights that are described, but of which the file has no tensor, are those of another shard.

    Raises:
        InvalidArgument: naming the file and the tensor where the metadata are malformed or do not fit the tensors.
    """
    text = (header.metadata or {}).get(METADATA_KEY)
    if text is None:
        return {}
    where = f"{path}: metadata {METADATA_KEY!r}"
    try:
        content = parse_json(text)
    except ValueError as error:
        raise invalid(where, str(error), "a JSON object") from None
    if not isinstance(content, dict) or not isinstance(content.get("tensors"), dict):
        raise invalid(where, brief(content), "an object with format_version and tensors")
    version = content.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise invalid(f"{where}: format_version", brief(version), f"{FORMAT_VERSION}, which this lowbit_rs reads")
    owners: dict[str, str] = {}
    result = {}
    for name, value in content["tensors"].items():
        if not any(state_key(name, part) in header.tensors for part in FIELDS):
            continue
        tensor = _parse_tensor(f"{where}: tensor {brief(name)}", name, value, header)
        for part in tensor.parts().values():
            if owners.setdefault(part.name, name) != name:
                raise invalid(where, f"{brief(part.name)} in two weights", "parts of one weight each")
        result[name] = tensor
    return result


def _parse_tensor(where: str, name: str, value: object, header: Header) -> QuantizedTensor:
    if not isinstance(value, dict) or not value.keys() >= set(_FIELDS):
        raise invalid(where, brief(value), "an object with " + ", ".join(_FIELDS))
    shape, dtype, permuted = value["shape"], value["dtype"], value.get("permuted", False)
    if not isinstance(shape, list) or len(shape) not in (2, 3) or not all(is_size(size) for size in shape):
        raise invalid(f"{where}: shape", brief(shape), "two or three sizes")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise invalid(f"{where}: dtype", brief(dtype), '"float32", "float16" or "bfloat16"')
    if not isinstance(permuted, bool):
        raise invalid(f"{where}: permuted", brief(permuted), "true or false")
    codebook = header.tensors.get(state_key(name, "codebook"))
    codebook_length = codebook.shape[0] if codebook is not None and len(codebook.shape) == 1 else None
    try:
        spec = _parse_spec(value)
        tensor = QuantizedTensor(name, spec, torch.Size(shape), DTYPES[dtype], codebook_length, permuted)
        parts = tensor.parts()
    except (InvalidArgument, OverflowError) as error:
        raise InvalidArgument(f"{where}: {error}") from None
    if "codebook" in parts and not 2 <= math.prod(parts["codebook"].shape) <= 16:
        raise invalid(f"{where}: codebook", f"{codebook_length} values", "2 to 16")
    for part in parts.values():
        got = header.tensors.get(part.name)
        if got != part:
            found = "no such tensor" if got is None else f"{got.dtype} {brief(list(got.shape))}"
            raise invalid(f"{where}: {brief(part.name)}", found, f"{part.dtype} {brief(list(part.shape))}")
    return tensor


def _parse_spec(value: Mapping[str, Any]) -> Spec:
    for field, kind in _SPEC_FIELDS.items():
        got = value[field]
        if not isinstance(got, kind) or (isinstance(got, bool) and kind is not bool):
            raise invalid(field, brief(got), "a value of the type that Spec takes")
    return Spec(**{field: value[field] for field in _SPEC_FIELDS})
