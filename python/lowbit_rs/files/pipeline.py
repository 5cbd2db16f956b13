"""Making a new checkpoint of an old one, tensor by tensor: what every conversion on disk has in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lowbit_rs.packed import PackedWeight

from .output import atomic_directory, atomic_file, copy_file, leftovers, sync_tree, write_bytes
from .safetensors_stream import Buffer, SafetensorsReader, SafetensorsWriter

if TYPE_CHECKING:
    from .checkpoint import Checkpoint, Shard
    from .metadata import QuantizedTensor
    from .safetensors_format import TensorInfo

Progress = Callable[[str, int, int], None]
"""Called before each tensor with its name, the bytes of source done so far, and those of the whole source."""


@dataclass(frozen=True)
class Summary:
    """What a conversion did.

    Attributes:
        converted: names of the tensors that were quantized or dequantized.
        skipped: why each other tensor was carried over as it is.
        copied_files: files of a model directory that were carried over, relative to it.
        bytes_before: bytes of all tensors of the source.
        bytes_after: bytes of all tensors of the destination.
        leftovers: partial outputs of other runs beside the destination. Where such a run was killed and is not still at
            work, its output can be deleted.
    """

    converted: tuple[str, ...]
    skipped: Mapping[str, str]
    copied_files: tuple[Path, ...]
    bytes_before: int
    bytes_after: int
    leftovers: tuple[Path, ...]


@dataclass(frozen=True)
class Step:
    """The tensors of a new file that come of one tensor of the old one."""

    name: str
    source_bytes: int
    outputs: tuple[TensorInfo, ...]
    run: Callable[[SafetensorsWriter], None]


class Conversion(Protocol):
    """What happens to the tensors of a file."""

    def steps(self, shard: Shard, reader: SafetensorsReader, buffer: Buffer) -> list[Step]:
        """One step for each tensor, or for each quantized weight with all its parts."""

    def metadata(self, shard: Shard) -> Mapping[str, str] | None:
        """The metadata of the new file."""


def carry_over(tensor: TensorInfo, reader: SafetensorsReader) -> Step:
    """The step that copies a tensor bit for bit, whatever its dtype."""

    def run(writer: SafetensorsWriter) -> None:
        writer.write_chunks(tensor.name, reader.chunks(tensor.name))

    return Step(tensor.name, tensor.nbytes, (tensor,), run)


def write_packed(writer: SafetensorsWriter, tensor: QuantizedTensor, packed: PackedWeight) -> None:
    """Writes the parts of a weight."""
    parts = tensor.parts()
    for part, data in packed.tensors().items():
        writer.write(parts[part].name, data)


def read_packed(reader: SafetensorsReader, tensor: QuantizedTensor) -> PackedWeight:
    """Reads the parts of a weight, each into memory of its own."""
    parts = {part: reader.read(info.name) for part, info in tensor.parts().items()}
    return PackedWeight.from_tensors(tensor.spec, tensor.shape, tensor.dtype, parts)


def convert_checkpoint(
    checkpoint: Checkpoint,
    destination: Path,
    conversion: Conversion,
    *,
    force: bool,
    progress: Progress | None,
    rewritten: Mapping[Path, bytes | None] | None = None,
) -> tuple[int, tuple[Path, ...]]:
    """Writes the converted checkpoint; gives the bytes of its tensors and the leftovers of other runs.

    ``rewritten`` has the new content of files of a model directory that are not to be carried over as they are, and
    ``None`` for those that are to be left out.
    """
    rewritten = {} if rewritten is None else rewritten
    stale = tuple(leftovers(destination))
    report = _Reporter(checkpoint.data_bytes, progress)
    buffer = Buffer()
    if not checkpoint.is_directory:
        with atomic_file(destination, force=force) as partial:
            outputs = _convert_shard(checkpoint.shards[0], partial, conversion, buffer, report)
        return sum(tensor.nbytes for tensor in outputs), stale
    with atomic_directory(destination, force=force) as partial:
        weight_map: dict[str, str] = {}
        total_bytes = 0
        for shard in checkpoint.shards:
            outputs = _convert_shard(shard, partial / shard.path.name, conversion, buffer, report)
            weight_map |= {tensor.name: shard.path.name for tensor in outputs}
            total_bytes += sum(tensor.nbytes for tensor in outputs)
        for file in checkpoint.others:
            content = rewritten.get(file, b"")
            if file not in rewritten:
                copy_file(checkpoint.path / file, partial / file)
            elif content is not None:
                write_bytes(partial / file, content)
        if checkpoint.index is not None:
            _write_index(checkpoint.index, partial, weight_map, total_bytes)
        sync_tree(partial)
    return total_bytes, stale


class _Reporter:
    """Adds up what has been done, for the caller's progress bar."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def begin(self, step: Step) -> None:
        if self._progress is not None:
            self._progress(step.name, self._done, self._total)
        self._done += step.source_bytes


def _convert_shard(
    shard: Shard, path: Path, conversion: Conversion, buffer: Buffer, report: _Reporter
) -> list[TensorInfo]:
    """Writes one converted file; gives its tensors."""
    with SafetensorsReader(shard.path) as reader:
        steps = conversion.steps(shard, reader, buffer)
        outputs = [tensor for step in steps for tensor in step.outputs]
        with SafetensorsWriter(path, outputs, conversion.metadata(shard)) as writer:
            for step in steps:
                report.begin(step)
                step.run(writer)
    return outputs


def _write_index(
    index: tuple[Path, dict[str, Any]], directory: Path, weight_map: dict[str, str], total_bytes: int
) -> None:
    """The index of the source with the new names and the new size."""
    path, content = index
    metadata = {**content.get("metadata", {}), "total_size": total_bytes}
    new = {**content, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write_bytes(directory / path.name, (json.dumps(new, indent=2, ensure_ascii=False) + "\n").encode())
