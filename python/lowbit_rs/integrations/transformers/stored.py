"""What the files of a checkpoint say of its packed weights, in the names of a model's modules."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lowbit_rs.errors import invalid, unsupported
from lowbit_rs.files.metadata import QuantizedTensor, quantized_tensors
from lowbit_rs.files.safetensors_format import Header, TensorInfo
from lowbit_rs.files.safetensors_stream import read_header
from lowbit_rs.integrations.transformers.modules import weight_shapes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel


def stored_weights(model: PreTrainedModel, files: Iterable[str] | None) -> dict[str, dict[str, QuantizedTensor]]:
    """By module and parameter of ``model``, the packed weights that safetensors files hold for it.

    Raises InvalidArgument, naming the file and the tensor, where files are malformed or do not fit the model, and
    Unsupported where the model would put packed weights together that are stored apart.
    """
    plans: dict[str, dict[str, QuantizedTensor]] = {}
    described = _described([Path(file) for file in files or () if str(file).endswith(".safetensors")])
    names = _names_in(model, described)
    for stored, weight in described.items():
        module_name, _, key = names[stored].rpartition(".")
        shapes = _shapes_of(model, module_name)
        if key not in shapes:
            continue  # of a part that this model does not have, as a head: transformers lists it as unexpected
        if tuple(shapes[key]) != tuple(weight.shape):
            raise invalid(
                f"checkpoint: {stored}", f"shape {list(weight.shape)}", f"{list(shapes[key])}, as in the model"
            )
        plans.setdefault(module_name, {})[key] = weight
    for module_name, weights in plans.items():
        lacking = sorted(set(_shapes_of(model, module_name)) - set(weights))
        if lacking:
            raise invalid("checkpoint", f"{module_name} without a packed {lacking[0]}", "all of its weights packed")
    return plans


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


def _shapes_of(model: PreTrainedModel, module_name: str) -> dict[str, tuple[int, ...]]:
    try:
        return {key: tuple(shape) for key, shape in weight_shapes(model.get_submodule(module_name)).items()}
    except AttributeError:  # no such module
        return {}


def _names_in(model: PreTrainedModel, described: Iterable[str]) -> dict[str, str]:
    """For each name of a weight in the files, its name in the model: as transformers will rename it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    parameters = {name: True for name, _ in model.named_parameters(remove_duplicate=False)}
    names = {}
    for stored in described:
        name, converted = rename_source_key(stored, renamings, converters, model.base_model_prefix, parameters)
        if name not in parameters and stored in parameters:
            name, converted = rename_source_key(stored, [], [], model.base_model_prefix, parameters)
        if converted is not None:
            raise unsupported(
                f"checkpoint: {stored}, packed before it is put together with others in {name}",
                "load the float checkpoint with a LowbitConfig, and save that",
            )
        names[stored] = name
    return names
