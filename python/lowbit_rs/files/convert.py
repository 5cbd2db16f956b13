"""Quantizing and dequantizing checkpoints on disk, tensor by tensor."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lowbit_rs.errors import InvalidArgument, invalid
from lowbit_rs.packed import PackedWeight, dtype_name

from .checkpoint import Checkpoint, Shard, open_checkpoint
from .metadata import METADATA_KEY, QuantizedTensor, encode_metadata
from .output import (
    atomic_directory,
    atomic_file,
    check_apart,
    check_destination,
    copy_file,
    leftovers,
    sync_tree,
    write_bytes,
)
from .recipe import Recipe
from .safetensors_format import TensorInfo, brief, safetensors_dtype
from .safetensors_stream import Buffer, SafetensorsReader, SafetensorsWriter
from .selection import select

if TYPE_CHECKING:
    import os

    import torch

    from lowbit_rs.functional import CodebookLike
    from lowbit_rs.packed import BlockSize

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


def quantize_file(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    format: str = "nf4",
    block_size: BlockSize = 64,
    double_quant: bool = False,
    codebook: str | CodebookLike | None = None,
    nonfinite: str = "error",
    *,
    scale_dtype: torch.dtype | None = None,
    signed_absmax: bool = False,
    skip: Iterable[str] = ("lm_head",),
    embeddings: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Quantizes the linear weights of a safetensors file or of a model directory into another.

    Which tensors these are, ``lowbit_rs.files.selection`` says. All other tensors are carried over bit for bit, and so
    are the other files of a directory, but for the index of shards, which gets the new names. How the weights are
    stored, ``lowbit_rs.files.metadata`` says: in the header of each file, so config.json stays as it is.

    Tensors are read, packed and written one at a time: memory is that of the largest float weight and its packed form.
    ``destination`` is complete or absent at any time: it is written under a temporary name beside its place, flushed to
    disk and renamed. Its name is ``.<destination>.<random>.lowbit-partial``; a killed run leaves it behind.

    Args:
        source: a safetensors file or a model directory.
        destination: a path that does not exist, in a directory that does.
        format: as in ``lowbit_rs.quantize``, like the five options after it.
        block_size: weights that share a scale.
        double_quant: whether scales are stored in 8 bits.
        codebook: 2 to 16 values; or "block-optimal", those that are best for normal weights at this block size; or
            "fit", those that are best for the tensor at hand, for each tensor anew.
        nonfinite: what to do with NaN and infinities: "error" or "propagate".
        scale_dtype: storage of scales and shifts.
        signed_absmax: whether scales carry a sign; with a codebook only.
        skip: names and patterns of modules whose weights stay as they are, as in ``lowbit_rs.quantize_model``.
        embeddings: whether embeddings are quantized, too.
        force: whether a file or model directory at ``destination`` is replaced.
        progress: called before each tensor.

    Raises:
        InvalidArgument: where an argument, the source or the destination is not fit; where the source is quantized.
        OSError: where reading or writing fails, as on a full disk.
    """
    paths = Path(source), Path(destination)
    recipe = Recipe(format, block_size, double_quant, codebook, nonfinite, scale_dtype, signed_absmax)
    checkpoint = open_checkpoint(paths[0])
    _refuse_quantized(checkpoint)
    check_apart(*paths)
    check_destination(paths[1], directory=checkpoint.is_directory, force=force)
    selection = select(checkpoint, skip=skip, embeddings=embeddings)
    if not selection.chosen:
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(selection.skipped.values()).items())
        raise invalid("source", f"{source}, with no tensor to quantize ({reasons or 'empty'})", "linear weights")
    conversion = _Quantization(recipe, selection.chosen)
    bytes_after, stale = _convert(checkpoint, paths[1], conversion, force=force, progress=progress)
    converted = tuple(tensor.name for tensor in checkpoint.tensors() if tensor.name in selection.chosen)
    return Summary(converted, selection.skipped, checkpoint.others, checkpoint.data_bytes, bytes_after, stale)


def dequantize_file(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Turns the quantized weights of a file or model directory back into float weights.

    Names, shapes and, unless ``dtype`` is given, dtypes are those before quantization. Everything else is carried over
    bit for bit. Memory, atomicity and errors are those of ``quantize_file``.

    Args:
        source: what ``quantize_file`` wrote.
        destination: a path that does not exist, in a directory that does.
        dtype: torch.float32, float16 or bfloat16 for all weights that are dequantized.
        force: whether a file or model directory at ``destination`` is replaced.
        progress: called before each tensor.
    """
    paths = Path(source), Path(destination)
    if dtype is not None:
        dtype_name(dtype)
    checkpoint = open_checkpoint(paths[0])
    if not checkpoint.is_quantized:
        scheme = checkpoint.foreign_scheme()
        got = f"{paths[0]}, " + ("which is not quantized" if scheme is None else f"quantized by {scheme}")
        raise invalid("source", got, "what lowbit quantize wrote")
    check_apart(*paths)
    check_destination(paths[1], directory=checkpoint.is_directory, force=force)
    bytes_after, stale = _convert(checkpoint, paths[1], _Dequantization(dtype), force=force, progress=progress)
    converted = tuple(name for shard in checkpoint.shards for name in shard.quantized)
    skipped = {tensor.name: "not quantized" for shard in checkpoint.shards for tensor in shard.plain_tensors()}
    return Summary(converted, skipped, checkpoint.others, checkpoint.data_bytes, bytes_after, stale)


@dataclass(frozen=True)
class _Step:
    """The tensors of a new file that come of one tensor of the old one."""

    name: str
    source_bytes: int
    outputs: tuple[TensorInfo, ...]
    run: Callable[[SafetensorsWriter], None]


class _Conversion(Protocol):
    """What happens to the tensors of a file."""

    def steps(self, shard: Shard, reader: SafetensorsReader, buffer: Buffer) -> list[_Step]:
        """One step for each tensor, or for each quantized weight with all its parts."""

    def metadata(self, shard: Shard) -> Mapping[str, str] | None:
        """The metadata of the new file."""


def _carry_over(tensor: TensorInfo, reader: SafetensorsReader) -> _Step:
    def run(writer: SafetensorsWriter) -> None:
        writer.write_chunks(tensor.name, reader.chunks(tensor.name))

    return _Step(tensor.name, tensor.nbytes, (tensor,), run)


@dataclass(frozen=True)
class _Quantization:
    recipe: Recipe
    chosen: frozenset[str]

    def steps(self, shard: Shard, reader: SafetensorsReader, buffer: Buffer) -> list[_Step]:
        return [
            self._quantize(tensor, reader, buffer) if tensor.name in self.chosen else _carry_over(tensor, reader)
            for tensor in shard.header.tensors.values()
        ]

    def metadata(self, shard: Shard) -> Mapping[str, str]:
        chosen = [tensor for tensor in shard.header.tensors.values() if tensor.name in self.chosen]
        return encode_metadata(shard.header.metadata, map(self.recipe.describe, chosen))

    def _quantize(self, tensor: TensorInfo, reader: SafetensorsReader, buffer: Buffer) -> _Step:
        described = self.recipe.describe(tensor)

        def run(writer: SafetensorsWriter) -> None:
            try:
                packed = self.recipe.pack(reader.read_into(tensor.name, buffer))
            except InvalidArgument as error:
                raise InvalidArgument(f"{reader.path}: tensor {brief(tensor.name)}: {error}") from error
            write_packed(writer, described, packed)

        return _Step(tensor.name, tensor.nbytes, tuple(described.parts().values()), run)


@dataclass(frozen=True)
class _Dequantization:
    dtype: torch.dtype | None

    def steps(self, shard: Shard, reader: SafetensorsReader, buffer: Buffer) -> list[_Step]:  # noqa: ARG002
        quantized = [self._dequantize(tensor, reader) for tensor in shard.quantized.values()]
        return quantized + [_carry_over(tensor, reader) for tensor in shard.plain_tensors()]

    def metadata(self, shard: Shard) -> Mapping[str, str] | None:
        rest = {key: text for key, text in (shard.header.metadata or {}).items() if key != METADATA_KEY}
        return rest or None

    def _dequantize(self, tensor: QuantizedTensor, reader: SafetensorsReader) -> _Step:
        output = TensorInfo(tensor.name, safetensors_dtype(self.dtype or tensor.dtype), tuple(tensor.shape))

        def run(writer: SafetensorsWriter) -> None:
            writer.write(tensor.name, read_packed(reader, tensor).dequantize(self.dtype))

        return _Step(tensor.name, tensor.packed_bytes, (output,), run)


def write_packed(writer: SafetensorsWriter, tensor: QuantizedTensor, packed: PackedWeight) -> None:
    """Writes the parts of a weight."""
    parts = tensor.parts()
    for part, data in packed.tensors().items():
        writer.write(parts[part].name, data)


def read_packed(reader: SafetensorsReader, tensor: QuantizedTensor) -> PackedWeight:
    """Reads the parts of a weight, each into memory of its own."""
    parts = {part: reader.read(info.name) for part, info in tensor.parts().items()}
    return PackedWeight.from_tensors(tensor.spec, tensor.shape, tensor.dtype, parts)


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    scheme = "lowbit_rs, as its header says" if checkpoint.is_quantized else checkpoint.foreign_scheme()
    if scheme is not None:
        raise invalid("source", f"{checkpoint.path}, quantized by {scheme}", "a checkpoint with float weights")


def _convert(
    checkpoint: Checkpoint, destination: Path, conversion: _Conversion, *, force: bool, progress: Progress | None
) -> tuple[int, tuple[Path, ...]]:
    """Writes the converted checkpoint; gives the bytes of its tensors and the leftovers of other runs."""
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
            copy_file(checkpoint.path / file, partial / file)
        if checkpoint.index is not None:
            _write_index(checkpoint.index, partial, weight_map, total_bytes)
        sync_tree(partial)
    return total_bytes, stale


class _Reporter:
    """Adds up what has been done, for the caller's progress bar."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def begin(self, step: _Step) -> None:
        if self._progress is not None:
            self._progress(step.name, self._done, self._total)
        self._done += step.source_bytes


def _convert_shard(
    shard: Shard, path: Path, conversion: _Conversion, buffer: Buffer, report: _Reporter
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
