"""What a safetensors file or model directory holds, from headers alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit_rs.packed import describe, dtype_name

from .checkpoint import Shard, open_checkpoint

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator


@dataclass(frozen=True)
class InspectedTensor:
    """A tensor, or a quantized weight with all its parts.

    Attributes:
        name: of the tensor.
        file: the name of the file that holds it.
        shape: of a quantized weight, that of the float weight.
        dtype: "BF16", ... as in the header; of a quantized weight "float32", ..., that of the float weight.
        format: how a quantized weight is packed, ``None`` for a plain tensor.
        weights: number of elements.
        nbytes: bytes in the file.
    """

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    format: str | None
    weights: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits in the file for each element, scales included; 0 for an empty tensor."""
        return 8 * self.nbytes / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Inspection:
    """What ``inspect`` found.

    Attributes:
        path: what was inspected.
        tensors: by the names of the files; in each, quantized weights first.
        foreign_scheme: in words, how a program other than this package quantized the checkpoint.
    """

    path: Path
    tensors: tuple[InspectedTensor, ...]
    foreign_scheme: str | None

    @property
    def weights(self) -> int:
        """Number of elements of all tensors."""
        return sum(tensor.weights for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits for each element of all tensors."""
        return 8 * self.nbytes / self.weights if self.weights else 0.0


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Lists the tensors of a plain or quantized safetensors file or model directory.

    Headers are read and checked, data is not read. Elements of foreign packed tensors are counted as they are stored:
    two 4-bit weights in a byte are one.

    Raises:
        InvalidArgument: naming the file and what is wrong with it.
        OSError: where a file cannot be read.
    """
    checkpoint = open_checkpoint(Path(path))
    tensors = tuple(tensor for shard in checkpoint.shards for tensor in _inspect(shard))
    return Inspection(checkpoint.path, tensors, checkpoint.foreign_scheme() if not checkpoint.is_quantized else None)


def _inspect(shard: Shard) -> Iterator[InspectedTensor]:
    file = shard.path.name
    for tensor in shard.quantized.values():
        shape, dtype = tuple(tensor.shape), dtype_name(tensor.dtype)
        yield InspectedTensor(
            tensor.name, file, shape, dtype, describe(tensor.spec), math.prod(shape), tensor.packed_bytes
        )
    for info in shard.plain_tensors():
        yield InspectedTensor(info.name, file, info.shape, info.dtype, None, math.prod(info.shape), info.nbytes)
