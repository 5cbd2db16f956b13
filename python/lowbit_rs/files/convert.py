"""Quantizing and dequantizing checkpoints on disk, tensor by tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit_rs.errors import InvalidArgument, invalid
from lowbit_rs.packed import dtype_name

from .checkpoint import Checkpoint, Shard, open_checkpoint
from .metadata import METADATA_KEY, QuantizedTensor, encode_metadata
from .model_config import NATIVE, rewritten_config
from .output import check_apart, check_destination
from .pipeline import Progress, Step, Summary, carry_over, convert_checkpoint, read_packed, write_packed
from .recipe import Recipe
from .safetensors_format import TensorInfo, brief, safetensors_dtype
from .safetensors_stream import Buffer, SafetensorsReader, SafetensorsWriter
from .selection import Selection, select

if TYPE_CHECKING:
    import os

    import torch

    from lowbit_rs.functional import CodebookLike
    from lowbit_rs.packed import BlockSize


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
    are the other files of a directory, but for the index of shards, which gets the new names, and config.json, which
    names this package to transformers. How the weights are stored, the header of each file says (see ``metadata``).

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
    selection = _select(checkpoint, skip, embeddings)
    conversion = _Quantization(recipe, selection.chosen)
    rewritten = rewritten_config(checkpoint.config, NATIVE)
    bytes_after, stale = convert_checkpoint(
        checkpoint, paths[1], conversion, force=force, progress=progress, rewritten=rewritten
    )
    names, copied = selection.in_order(checkpoint), checkpoint.others_but(rewritten)
    return Summary(names, selection.skipped, copied, checkpoint.data_bytes, bytes_after, stale)


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
    bit for bit, but for ``quantization_config`` of config.json, which is left out. Memory, atomicity and errors are
    those of ``quantize_file``.

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
        raise invalid("source", got, "what lowbit quantize wrote; lowbit convert reads other libraries' weights")
    check_apart(*paths)
    check_destination(paths[1], directory=checkpoint.is_directory, force=force)
    rewritten = rewritten_config(checkpoint.config, None)
    bytes_after, stale = convert_checkpoint(
        checkpoint, paths[1], _Dequantization(dtype), force=force, progress=progress, rewritten=rewritten
    )
    converted = tuple(name for shard in checkpoint.shards for name in shard.quantized)
    skipped = {tensor.name: "not quantized" for shard in checkpoint.shards for tensor in shard.plain_tensors()}
    copied = checkpoint.others_but(rewritten)
    return Summary(converted, skipped, copied, checkpoint.data_bytes, bytes_after, stale)


@dataclass(frozen=True)
class _Quantization:
    recipe: Recipe
    chosen: frozenset[str]

    def steps(self, shard: Shard, reader: SafetensorsReader, buffer: Buffer) -> list[Step]:
        return [
            self._quantize(tensor, reader, buffer) if tensor.name in self.chosen else carry_over(tensor, reader)
            for tensor in shard.header.tensors.values()
        ]

    def metadata(self, shard: Shard) -> Mapping[str, str]:
        chosen = [tensor for tensor in shard.header.tensors.values() if tensor.name in self.chosen]
        return encode_metadata(shard.header.metadata, map(self.recipe.describe, chosen))

    def _quantize(self, tensor: TensorInfo, reader: SafetensorsReader, buffer: Buffer) -> Step:
        described = self.recipe.describe(tensor)

        def run(writer: SafetensorsWriter) -> None:
            try:
                packed = self.recipe.pack(reader.read_into(tensor.name, buffer))
            except InvalidArgument as error:
                raise InvalidArgument(f"{reader.path}: tensor {brief(tensor.name)}: {error}") from error
            write_packed(writer, described, packed)

        return Step(tensor.name, tensor.nbytes, tuple(described.parts().values()), run)


@dataclass(frozen=True)
class _Dequantization:
    dtype: torch.dtype | None

    def steps(self, shard: Shard, reader: SafetensorsReader, buffer: Buffer) -> list[Step]:  # noqa: ARG002
        quantized = [self._dequantize(tensor, reader) for tensor in shard.quantized.values()]
        return quantized + [carry_over(tensor, reader) for tensor in shard.plain_tensors()]

    def metadata(self, shard: Shard) -> Mapping[str, str] | None:
        rest = {key: text for key, text in (shard.header.metadata or {}).items() if key != METADATA_KEY}
        return rest or None

    def _dequantize(self, tensor: QuantizedTensor, reader: SafetensorsReader) -> Step:
        output = TensorInfo(tensor.name, safetensors_dtype(self.dtype or tensor.dtype), tuple(tensor.shape))

        def run(writer: SafetensorsWriter) -> None:
            writer.write(tensor.name, read_packed(reader, tensor).dequantize(self.dtype))

        return Step(tensor.name, tensor.packed_bytes, (output,), run)


def _select(checkpoint: Checkpoint, skip: Iterable[str], embeddings: bool) -> Selection:
    """``select``, with an error where nothing is chosen."""
    selection = select(checkpoint, skip=skip, embeddings=embeddings)
    if not selection.chosen:
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(selection.skipped.values()).items())
        got = f"{checkpoint.path}, with no tensor to quantize ({reasons or 'empty'})"
        raise invalid("source", got, "linear weights")
    return selection


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    scheme = "lowbit_rs, as its header says" if checkpoint.is_quantized else checkpoint.foreign_scheme()
    if scheme is not None:
        raise invalid(
            "source",
            f"{checkpoint.path}, quantized by {scheme}",
            "a checkpoint with float weights; lowbit convert takes quantized ones",
        )
