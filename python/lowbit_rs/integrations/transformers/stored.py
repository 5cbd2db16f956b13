"""What the files of a checkpoint say of its packed weights, in the names of a model's modules."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowbit_rs.errors import Unsupported, invalid, unsupported
from lowbit_rs.files.metadata import QuantizedTensor, quantized_tensors
from lowbit_rs.files.safetensors_format import Header, TensorInfo
from lowbit_rs.files.safetensors_stream import read_header
from lowbit_rs.integrations.transformers.modules import weight_shapes
from lowbit_rs.packed import stacked_spec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel

#: Operations of transformers' converters that put rows below each other, by class and dimension: matrices become a
#: stack of experts, or several such stacks one, or several matrices one.
_STACKING = ((("MergeModulelist", 0),), (("MergeModulelist", 0), ("Concatenate", 1)), (("Concatenate", 0),))

_in_memory: ContextVar[Mapping[str, QuantizedTensor] | None] = ContextVar("packed weights in memory", default=None)


@contextmanager
def in_memory(weights: Mapping[str, QuantizedTensor]) -> Iterator[None]:
    """Models loaded in this block from a ``state_dict`` have these packed weights, by name in it."""
    token = _in_memory.set(weights)
    try:
        yield
    finally:
        _in_memory.reset(token)


@dataclass
class StoredWeights:
    """The packed weights that a checkpoint has for a model.

    Attributes:
        weights: what they are in the model, by module and parameter.
        stacks: those of them that are stored in several matrices, by the full name of the parameter: one of the
            matrices, and what they become.
    """

    weights: dict[str, dict[str, QuantizedTensor]] = field(default_factory=dict)
    stacks: dict[str, tuple[QuantizedTensor, QuantizedTensor]] = field(default_factory=dict)


def stored_weights(model: PreTrainedModel, files: Iterable[str] | None) -> StoredWeights:
    """The packed weights that safetensors files, or else a state_dict ``in_memory``, hold for ``model``.

    Raises InvalidArgument, naming the file and the tensor, where files are malformed or do not fit the model, and
    Unsupported where the model would put packed weights together in a way that would move their blocks.
    """
    stored = StoredWeights()
    described = _described([Path(file) for file in files or () if str(file).endswith(".safetensors")])
    groups: dict[str, list[QuantizedTensor]] = {}
    for weight, name, converter in _names_in(model, described or _in_memory.get() or {}):
        if converter is None:
            _add(model, stored, name, weight)
        else:
            _check_stacking(weight.name, name, converter)
            groups.setdefault(name, []).append(weight)
    for name, pieces in groups.items():
        if _shape_of(model, name) is not None:
            whole = _together(model, name, pieces)
            _add(model, stored, name, whole)
            stored.stacks[name] = pieces[0], whole
    for module_name, weights in stored.weights.items():
        lacking = sorted(set(_shapes_of(model, module_name)) - set(weights))
        if lacking:
            raise invalid("checkpoint", f"{module_name} without a packed {lacking[0]}", "all of its weights packed")
    return stored


def _add(model: PreTrainedModel, stored: StoredWeights, name: str, weight: QuantizedTensor) -> None:
    shape = _shape_of(model, name)
    if shape is None:
        return  # of a part that this model does not have, as a head: transformers lists it as unexpected
    if shape != tuple(weight.shape):
        got, wanted = f"shape {list(weight.shape)}", f"{list(shape)}, as in the model"
        raise invalid(f"checkpoint: {weight.name}", got, wanted)
    module_name, _, key = name.rpartition(".")
    stored.weights.setdefault(module_name, {})[key] = weight


def _together(model: PreTrainedModel, name: str, pieces: list[QuantizedTensor]) -> QuantizedTensor:
    """What matrices become whose rows are put below each other."""
    first, shape = pieces[0], _shape_of(model, name)
    assert shape is not None
    for piece in pieces:
        alike = (piece.spec, piece.dtype, piece.codebook_length) == (first.spec, first.dtype, first.codebook_length)
        if not alike or piece.permuted or len(piece.shape) != 2 or piece.shape[-1] != shape[-1]:
            reason = f"it is not packed as {first.name} is, or its columns are permuted: these two become one"
            raise unsupported(f"checkpoint: {piece.name}", reason)
    rows, wanted = sum(piece.shape[0] for piece in pieces), math.prod(shape[:-1])
    if rows != wanted:
        raise invalid(f"checkpoint: {name}", f"{rows} rows in {len(pieces)} packed matrices", f"{wanted}")
    try:
        spec = stacked_spec(first.spec)
    except Unsupported as error:
        raise unsupported(f"checkpoint: {first.name}", str(error)) from None
    return QuantizedTensor(name, spec, torch.Size(shape), first.dtype, first.codebook_length)


def _check_stacking(stored: str, name: str, converter: Any) -> None:
    operations = tuple((type(step).__name__, getattr(step, "dim", None)) for step in converter.operations)
    if operations not in _STACKING:
        raise unsupported(
            f"checkpoint: {stored}, packed before it is put together with others in {name}",
            "load the float checkpoint with a LowbitConfig, and save that",
        )


def _described(files: list[Path]) -> dict[str, QuantizedTensor]:
    """The packed weights that the headers of the files describe; the parts of one may lie in several files."""
    headers = {file: read_header(file) for file in files}
    tensors: dict[str, TensorInfo] = {}
    for header in headers.values():
        tensors |= header.tensors
    described: dict[str, QuantizedTensor] = {}
    for file, header in headers.items():
        described |= quantized_tensors(file, Header(tensors, {}, header.metadata))
    return described


def _shape_of(model: PreTrainedModel, name: str) -> tuple[int, ...] | None:
    """The shape of a float weight of the model that can be packed; None where it has none of this name."""
    module_name, _, key = name.rpartition(".")
    return _shapes_of(model, module_name).get(key)


def _shapes_of(model: PreTrainedModel, module_name: str) -> dict[str, tuple[int, ...]]:
    try:
        return {key: tuple(shape) for key, shape in weight_shapes(model.get_submodule(module_name)).items()}
    except AttributeError:  # no such module
        return {}


def _names_in(
    model: PreTrainedModel, described: Mapping[str, QuantizedTensor]
) -> Iterator[tuple[QuantizedTensor, str, Any]]:
    """Each weight with its name in the model, as transformers will rename it, and the converter that it goes to."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    parameters = {name: True for name, _ in model.named_parameters(remove_duplicate=False)}
    for stored, weight in described.items():
        name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, parameters)
        if name not in parameters and stored in parameters:
            name, pattern = rename_source_key(stored, [], [], model.base_model_prefix, parameters)
        yield weight, name, None if pattern is None else by_pattern[pattern]
