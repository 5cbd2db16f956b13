"""What a path holds: one safetensors file, or a model directory with its weights, index, config and other files."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit_rs.errors import invalid

from .metadata import METADATA_KEY, QuantizedTensor, quantized_tensors
from .model_config import QUANT_METHOD
from .safetensors_format import Header, TensorInfo, brief
from .safetensors_stream import read_header

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

_WEIGHTS = "model.safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"

_FOREIGN_KEYS = (
    ("bitsandbytes", re.compile(r"\.(absmax|quant_map|nested_absmax|SCB|quant_state\.bitsandbytes__\w+)$")),
    ("GPTQ or AWQ", re.compile(r"\.(qweight|qzeros|g_idx)$")),
    ("compressed-tensors", re.compile(r"\.weight_(packed|zero_point)$")),
    ("MXFP4", re.compile(r"_proj_(blocks|scales)$")),
    ("an 8-bit float or integer scheme", re.compile(r"\.(weight_scale|weight_scale_inv|input_scale)$")),
)
"""Names of tensors that only quantized checkpoints have, tried in this order."""


@dataclass(frozen=True)
class Shard:
    """One safetensors file with its checked header and the quantized weights that its metadata describe."""

    path: Path
    header: Header
    quantized: Mapping[str, QuantizedTensor]

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.header.tensors.values())

    def plain_tensors(self) -> list[TensorInfo]:
        """The tensors that are no part of a quantized weight."""
        parts = {part.name for tensor in self.quantized.values() for part in tensor.parts().values()}
        return [tensor for tensor in self.header.tensors.values() if tensor.name not in parts]


@dataclass(frozen=True)
class Checkpoint:
    """A safetensors file or a model directory.

    Attributes:
        path: of the file or directory.
        shards: the safetensors files with the model's weights, in the order of their names.
        index: of a directory with an index, the index file and its content.
        config: the content of config.json, empty where there is none.
        others: the remaining files of the directory, relative to it.
    """

    path: Path
    shards: tuple[Shard, ...]
    index: tuple[Path, dict[str, Any]] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    others: tuple[Path, ...] = ()

    @property
    def is_directory(self) -> bool:
        """Whether this is a directory with possibly several files."""
        return self.path.is_dir()

    @property
    def is_quantized(self) -> bool:
        """Whether this package wrote it."""
        return any(METADATA_KEY in (shard.header.metadata or {}) for shard in self.shards)

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.data_bytes for shard in self.shards)

    def tensors(self) -> Iterator[TensorInfo]:
        """All tensors of all shards."""
        for shard in self.shards:
            yield from shard.header.tensors.values()

    def others_but(self, files: Collection[Path]) -> tuple[Path, ...]:
        """``others`` without ``files``."""
        return tuple(file for file in self.others if file not in files)

    def foreign_scheme(self) -> str | None:
        """How another program quantized this checkpoint, in words, or ``None``."""
        quantization = self.config.get("quantization_config")
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if quantization and method != QUANT_METHOD:
            return f"{method or 'a method that is not named'}, as quantization_config in config.json says"
        for tensor in self.tensors():
            for scheme, pattern in _FOREIGN_KEYS:
                if pattern.search(tensor.name):
                    return f"{scheme}, as the tensor {brief(tensor.name)} shows"
        return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Reads and checks all headers of a file or model directory, and no data.

    A directory holds its weights in ``model.safetensors``, in the shards that one ``*.safetensors.index.json`` lists,
    or in a single safetensors file of any name.

    Raises:
        InvalidArgument: where there is nothing at ``path``, where a file is malformed, or where the directory does not
            say which files hold its weights.
    """
    if not path.exists():
        raise invalid(str(path), "nothing at this path", "a safetensors file or a model directory")
    if not path.is_dir():
        return Checkpoint(path, (_open_shard(path),))
    index = _read_index(path)
    names = _weight_files(path) if index is None else sorted(set(index[1]["weight_map"].values()))
    shards = tuple(_open_shard(path / name) for name in names)
    _check_names(path, shards, None if index is None else index[1]["weight_map"])
    taken = {path / name for name in names} | (set() if index is None else {index[0]})
    others = tuple(file.relative_to(path) for file in _walk(path) if file not in taken)
    config_file = path / "config.json"
    config = _read_object(config_file) if config_file.exists() else {}
    return Checkpoint(path, shards, index, config, others)


def _open_shard(path: Path) -> Shard:
    header = read_header(path)
    return Shard(path, header, quantized_tensors(path, header))


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))  # configs in use hold Infinity, which JSON does not have
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise invalid(str(path), str(error), "a JSON object") from None
    if not isinstance(content, dict):
        raise invalid(str(path), brief(content), "a JSON object")
    return content


def _read_index(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    files = sorted(directory.glob(f"*{_INDEX_SUFFIX}"))
    if not files:
        return None
    if len(files) > 1 or (directory / _WEIGHTS).exists():
        names = ", ".join(file.name for file in files)
        raise invalid(str(directory), f"several sets of weights ({names})", f"one index, or {_WEIGHTS} alone")
    content = _read_object(files[0])
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise invalid(f"{files[0]}: weight_map", brief(weight_map), "an object that maps tensors to files")
    for name, shard in weight_map.items():
        # The name is joined to the output directory: it must not lead out of it.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise invalid(f"{files[0]}: {brief(name)}", brief(shard), "the name of a safetensors file beside the index")
        if not (directory / shard).exists():
            raise invalid(f"{files[0]}: {brief(name)}", f"{brief(shard)}, which does not exist", "a file beside it")
    if not isinstance(content.get("metadata", {}), dict):
        raise invalid(f"{files[0]}: metadata", brief(content["metadata"]), "an object")
    return files[0], content


def _weight_files(directory: Path) -> list[str]:
    names = sorted(file.name for file in directory.glob("*.safetensors"))
    if _WEIGHTS in names:
        return [_WEIGHTS]
    if len(names) != 1:
        got = "no safetensors file" if not names else f"{len(names)} safetensors files and no index"
        raise invalid(str(directory), got, f"{_WEIGHTS}, or shards with model{_INDEX_SUFFIX}")
    return names


def _check_names(directory: Path, shards: tuple[Shard, ...], weight_map: Mapping[str, str] | None) -> None:
    """Each name in one shard alone, and in the one that the index says."""
    places: dict[str, str] = {}
    for shard in shards:
        for name in shard.header.tensors:
            if name in places:
                raise invalid(str(shard.path), f"the tensor {brief(name)}, also in {places[name]}", "distinct names")
            places[name] = shard.path.name
    for name, file in (weight_map or {}).items():
        if places.get(name) != file:
            raise invalid(str(directory / file), f"no tensor {brief(name)}", "the tensors that the index lists")


def _walk(directory: Path) -> Iterator[Path]:
    """All files below a directory, in the order of their names; links are followed, but not round in circles."""
    seen = set()
    for parent, directories, files in os.walk(directory, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            directories.clear()
            continue
        seen.add(real)
        directories.sort()
        yield from (Path(parent, file) for file in sorted(files))
