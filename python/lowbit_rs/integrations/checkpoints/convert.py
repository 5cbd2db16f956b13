"""Rewriting checkpoints on disk: those of other libraries as native files, and native ones for bitsandbytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit_rs.errors import InvalidArgument, Unsupported, invalid
from lowbit_rs.files.checkpoint import Shard, open_checkpoint
from lowbit_rs.files.metadata import METADATA_KEY, QuantizedTensor, encode_metadata
from lowbit_rs.files.model_config import NATIVE, rewritten_config
from lowbit_rs.files.output import check_apart, check_destination
from lowbit_rs.files.pipeline import Progress, Step, Summary, carry_over, convert_checkpoint, write_packed
from lowbit_rs.files.safetensors_format import TensorInfo, brief
from lowbit_rs.files.safetensors_stream import Buffer, SafetensorsReader, SafetensorsWriter

from . import bitsandbytes
from .registry import OPTION_FILES, foreign_weights, product_options
from .source import ForeignWeight, TensorSource

if TYPE_CHECKING:
    import os

#: What ``convert_file`` writes.
TARGETS = ("native", "bitsandbytes")


def convert_file(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    to: str = "native",
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Rewrites a quantized safetensors file or model directory in another layout, with the same weights.

    No float weight is made: codes and scales are moved, one weight at a time. Everything else is carried over bit for
    bit, but for what config.json says of the quantization, by which transformers finds the library. Memory, atomicity
    and ``progress`` are those of ``lowbit_rs.files.quantize_file``.

    Args:
        source: what bitsandbytes, a GPTQ or AWQ library or compressed-tensors wrote; or, for bitsandbytes, a native
            file or directory.
        destination: a path that does not exist, in a directory that does.
        to: "native", or "bitsandbytes" for native NF4, FP4 and int8 weights.
        force: whether a file or model directory at ``destination`` is replaced.
        progress: called before each tensor.

    Raises:
        InvalidArgument: where an argument, the source or the destination is not fit.
        Unsupported: naming the weight or the option, for what the other layout does not have.
        OSError: where reading or writing fails.
    """
    if to not in TARGETS:
        raise invalid("to", repr(to), '"native" or "bitsandbytes"')
    paths = Path(source), Path(destination)
    checkpoint = open_checkpoint(paths[0])
    check_apart(*paths)
    check_destination(paths[1], directory=checkpoint.is_directory, force=force)
    with TensorSource(checkpoint) as tensors:
        conversion: _ToNative | _ToBitsandbytes
        conversion = _to_native(tensors) if to == "native" else _to_bitsandbytes(tensors)
        rewritten: dict[Path, bytes | None] = {Path(name): None for name in OPTION_FILES}
        rewritten |= rewritten_config(checkpoint.config, conversion.quantization_config)
        bytes_after, stale = convert_checkpoint(
            checkpoint, paths[1], conversion, force=force, progress=progress, rewritten=rewritten
        )
    skipped = {
        tensor.name: "not quantized" for tensor in checkpoint.tensors() if tensor.name not in conversion.consumed
    }
    copied = checkpoint.others_but(rewritten)
    return Summary(conversion.names, skipped, copied, checkpoint.data_bytes, bytes_after, stale)


@dataclass(frozen=True)
class _ToNative:
    source: TensorSource
    weights: tuple[ForeignWeight, ...]
    consumed: frozenset[str]
    quantization_config: Mapping[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(weight.tensor.name for weight in self.weights)

    def _of(self, shard: Shard) -> list[ForeignWeight]:
        """The weights whose first part lies in a file."""
        return [weight for weight in self.weights if weight.parts[0] in shard.header.tensors]

    def steps(self, shard: Shard, reader: SafetensorsReader, buffer: Buffer) -> list[Step]:  # noqa: ARG002
        plain = [tensor for tensor in shard.header.tensors.values() if tensor.name not in self.consumed]
        return [*map(self._convert, self._of(shard)), *(carry_over(tensor, reader) for tensor in plain)]

    def metadata(self, shard: Shard) -> Mapping[str, str]:
        return encode_metadata(shard.header.metadata, [weight.tensor for weight in self._of(shard)])

    def _convert(self, weight: ForeignWeight) -> Step:
        def run(writer: SafetensorsWriter) -> None:
            write_packed(writer, weight.tensor, load_weight(weight))

        nbytes = sum(self.source.info(part).nbytes for part in weight.parts)
        return Step(weight.tensor.name, nbytes, tuple(weight.tensor.parts().values()), run)


def load_weight(weight: ForeignWeight) -> Any:
    """``weight.load()``, with the weight's name in the message of an error."""
    try:
        return weight.load()
    except (InvalidArgument, Unsupported) as error:
        raise type(error)(f"{brief(weight.tensor.name)}: {error}") from error


def _to_native(source: TensorSource) -> _ToNative:
    method, weights = foreign_weights(source)
    consumed = [part for weight in weights for part in weight.parts]
    outputs = {part.name for weight in weights for part in weight.tensor.parts().values()}
    clash = sorted(outputs & (source.infos.keys() - set(consumed)))
    if clash or len(consumed) != len(set(consumed)):
        got = f"{brief(clash[0])}, a name that the native weight needs" if clash else "a tensor in two weights"
        raise invalid(f"{source.checkpoint.path}: {method}", got, "the parts of each weight alone")
    config = {**NATIVE, **product_options(source.checkpoint)}
    return _ToNative(source, tuple(weights), frozenset(consumed), config)


@dataclass(frozen=True)
class _ToBitsandbytes:
    parts: Mapping[str, list[bitsandbytes.Part]]
    quantized: Mapping[str, QuantizedTensor]
    consumed: frozenset[str]
    quantization_config: Mapping[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.parts)

    def steps(self, shard: Shard, reader: SafetensorsReader, buffer: Buffer) -> list[Step]:  # noqa: ARG002
        quantized = [self._convert(tensor) for tensor in shard.quantized.values()]
        return quantized + [carry_over(tensor, reader) for tensor in shard.plain_tensors()]

    def metadata(self, shard: Shard) -> Mapping[str, str]:
        rest = {key: text for key, text in (shard.header.metadata or {}).items() if key != METADATA_KEY}
        return {"format": "pt", **rest}

    def _convert(self, tensor: QuantizedTensor) -> Step:
        parts = self.parts[tensor.name]

        def run(writer: SafetensorsWriter) -> None:
            for info, make in parts:
                writer.write(info.name, make())

        return Step(tensor.name, tensor.packed_bytes, tuple(info for info, _ in parts), run)


def _to_bitsandbytes(source: TensorSource) -> _ToBitsandbytes:
    checkpoint = source.checkpoint
    quantized = {name: tensor for shard in checkpoint.shards for name, tensor in shard.quantized.items()}
    if not quantized:
        raise invalid("source", f"{checkpoint.path}, with no native quantized weight", "what lowbit_rs wrote")
    parts = {name: bitsandbytes.write(tensor, source) for name, tensor in quantized.items()}
    plain = [tensor for shard in checkpoint.shards for tensor in shard.plain_tensors()]
    consumed = frozenset(source.infos.keys() - {tensor.name for tensor in plain})
    config = bitsandbytes.config_of(list(quantized.values()), _float_modules(plain))
    return _ToBitsandbytes(parts, quantized, consumed, config)


def _float_modules(tensors: list[TensorInfo]) -> list[str]:
    """Names of the modules with a float matrix: linear layers that stay as they are, and others that do not mind."""
    matrices = [tensor.name for tensor in tensors if tensor.name.endswith(".weight") and len(tensor.shape) == 2]
    return sorted(name.removesuffix(".weight") for name in matrices)
