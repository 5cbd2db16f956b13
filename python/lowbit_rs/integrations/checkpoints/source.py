"""The tensors of a checkpoint by name, in whichever file they lie, and the weights that are made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit_rs._native import Spec
from lowbit_rs.errors import invalid
from lowbit_rs.files.checkpoint import Checkpoint
from lowbit_rs.files.metadata import QuantizedTensor
from lowbit_rs.files.safetensors_format import TensorInfo, brief, safetensors_dtype
from lowbit_rs.files.safetensors_stream import SafetensorsReader
from lowbit_rs.packed import DTYPES, PackedWeight

if TYPE_CHECKING:
    from typing_extensions import Self

#: Keys of config.json under which transformers writes the dtype of a model, the newer first.
_DTYPE_KEYS = ("dtype", "torch_dtype")


class TensorSource:
    """Reads the tensors of a checkpoint one at a time; a context manager.

    A shard may end between the parts of a weight, so that a name is looked up in all files.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.infos: dict[str, TensorInfo] = {tensor.name: tensor for tensor in checkpoint.tensors()}
        self._readers: dict[str, SafetensorsReader] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for shard in self.checkpoint.shards:
            reader = self._stack.enter_context(SafetensorsReader(shard.path))
            self._readers |= dict.fromkeys(shard.header.tensors, reader)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, name: str) -> Tensor:
        """The tensor called ``name``, in memory of its own."""
        self.info(name)
        return self._readers[name].read(name)

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of the tensor called ``name``. Raises InvalidArgument where there is none."""
        info = self.infos.get(name)
        if info is None:
            raise invalid(str(self.checkpoint.path), f"no tensor {brief(name)}", "all parts of each quantized weight")
        return info

    def expect(self, name: str, dtypes: tuple[torch.dtype, ...], *shape: int | None) -> TensorInfo:
        """``info``, after a check of the dtype and of the shape, in which ``None`` stands for any size."""
        info = self.info(name)
        names = [safetensors_dtype(dtype) for dtype in dtypes]
        fits = len(info.shape) == len(shape) and all(
            wanted in (None, size) for size, wanted in zip(info.shape, shape, strict=True)
        )
        if info.dtype not in names or not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise invalid(brief(name), f"{info.dtype} {list(info.shape)}", f"{' or '.join(names)} [{wanted}]")
        return info

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that config.json gives for the model, where it gives one of ours."""
        named = next((self.checkpoint.config[key] for key in _DTYPE_KEYS if key in self.checkpoint.config), None)
        return DTYPES.get(named) if isinstance(named, str) else None


@dataclass(frozen=True)
class ForeignWeight:
    """One quantized weight of a foreign checkpoint.

    Attributes:
        tensor: what it becomes.
        parts: names of the tensors that it is made of; where the first lies, the weight will.
        load: reads them and gives the packed weight.
    """

    tensor: QuantizedTensor
    parts: tuple[str, ...]
    load: Callable[[], PackedWeight]


@dataclass(frozen=True)
class Quantization:
    """What config.json says of the quantization.

    Attributes:
        config: the object ``quantization_config``, or that of a file beside config.json; empty where there is none.
    """

    config: Mapping[str, Any] = field(default_factory=dict)

    def get(self, *keys: str, default: Any = None) -> Any:
        """The value under the first of ``keys`` that is there and not null; libraries renamed some."""
        return next((self.config[key] for key in keys if self.config.get(key) is not None), default)

    def integer(self, *keys: str, default: int | None = None) -> int:
        """``get`` for an integer. Raises InvalidArgument for anything else."""
        value = self.get(*keys, default=default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise invalid(f"quantization_config: {keys[0]}", brief(value), "an integer")
        return value


def foreign_weight(
    name: str,
    spec: Spec,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    parts: tuple[str, ...],
    load: Callable[[], Mapping[str, Tensor]],
    *,
    codebook_length: int | None = None,
    permuted: bool = False,
) -> ForeignWeight:
    """A ForeignWeight whose ``load`` gives the tensors of a PackedWeight by field."""
    tensor = QuantizedTensor(name, spec, torch.Size(shape), dtype, codebook_length, permuted)

    def packed() -> PackedWeight:
        return PackedWeight.from_tensors(spec, shape, dtype, load())

    return ForeignWeight(tensor, parts, packed)
