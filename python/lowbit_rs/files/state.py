"""Packed weights between safetensors files and memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lowbit_rs.errors import InvalidArgument, invalid, unsupported
from lowbit_rs.nn import QuantEmbedding, QuantLinear
from lowbit_rs.nn.model import replace_module
from lowbit_rs.packed import PackedWeight, state_key

from .checkpoint import open_checkpoint
from .metadata import QuantizedTensor, encode_metadata
from .output import atomic_file, check_destination
from .pipeline import read_packed, write_packed
from .safetensors_format import TensorInfo, brief, safetensors_dtype
from .safetensors_stream import SafetensorsReader, SafetensorsWriter

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping


def load_packed(path: str | os.PathLike[str]) -> dict[str, PackedWeight | Tensor]:
    """Reads a quantized safetensors file or model directory.

    Returns:
        the quantized weights by name (``X.weight``) as ``PackedWeight``, all other tensors as they are.

    Raises:
        InvalidArgument: naming the file and what is wrong with it.
        Unsupported: where the file has a dtype that this version of torch lacks.
    """
    result: dict[str, PackedWeight | Tensor] = {}
    for shard in open_checkpoint(Path(path)).shards:
        with SafetensorsReader(shard.path) as reader:
            result |= {name: read_packed(reader, tensor) for name, tensor in shard.quantized.items()}
            result |= {tensor.name: reader.read(tensor.name) for tensor in shard.plain_tensors()}
    return result


def save_packed(
    tensors: Mapping[str, PackedWeight | Tensor], path: str | os.PathLike[str], *, force: bool = False
) -> None:
    """Writes packed weights and plain tensors by name to one safetensors file, which ``load_packed`` reads.

    The file is complete or absent, as that of ``quantize_file``; ``force`` replaces one at ``path``.
    """
    destination = Path(path)
    check_destination(destination, directory=False, force=force)
    described = {
        name: QuantizedTensor.of(name, weight) for name, weight in tensors.items() if isinstance(weight, PackedWeight)
    }
    infos = [part for tensor in described.values() for part in tensor.parts().values()]
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            infos.append(TensorInfo(name, safetensors_dtype(tensor.dtype), tuple(tensor.shape)))
    metadata = encode_metadata(None, described.values())
    with atomic_file(destination, force=force) as partial, SafetensorsWriter(partial, infos, metadata) as writer:
        for name, tensor in tensors.items():
            if isinstance(tensor, PackedWeight):
                write_packed(writer, described[name], tensor)
            else:
                writer.write(name, tensor)


def load_model(model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> None:
    """Loads a quantized safetensors file or model directory into a model of its architecture.

    Where the file has a quantized weight ``X.weight``, the module ``X`` becomes a ``QuantLinear`` or ``QuantEmbedding``
    with that weight, whether it is a float layer or a packed one, of the same format or another. Everything else is
    loaded by ``load_state_dict``; parameters on the meta device are replaced. Parameters that are tied stay so.

    Args:
        model: a model of nn.Linear and nn.Embedding layers, quantized or not, changed in place.
        path: what ``quantize_file`` or ``save_packed`` wrote.
        strict: whether the names in the file and in the model must be the same.

    Raises:
        InvalidArgument: where names (if ``strict``) or shapes do not agree, or the file is malformed. The model may
            have been changed in part by then.
        Unsupported: where the model holds a quantized weight in something else than such a layer.
    """
    ties = _ties(model)
    state: dict[str, Tensor] = {}
    for name, weight in load_packed(path).items():
        if isinstance(weight, PackedWeight):
            _place(model, name, weight)
            state |= {state_key(name, part): tensor for part, tensor in weight.tensors().items()}
        else:
            state[name] = weight
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, assign=on_meta)
    except RuntimeError as error:
        raise InvalidArgument(f"{path}: {error}") from error
    missing = [name for name in missing if not _tie(model, name, ties, state)]
    if strict and (missing or unexpected):
        got = f"the names {brief(unexpected)} and not {brief(missing)}"
        raise invalid(str(path), got, "the names of the model's parameters")


def _place(model: nn.Module, name: str, weight: PackedWeight) -> None:
    """Makes the module whose weight is called ``name`` a packed one."""
    path = name.removesuffix(".weight")
    try:
        module = model.get_submodule(path) if name.endswith(".weight") else model
    except AttributeError:
        raise invalid("model", f"no module {brief(path)}", f"one for the weight {brief(name)}") from None
    if isinstance(module, nn.Linear) and type(module).forward in (nn.Linear.forward, QuantLinear.forward):
        _check_shape(name, [module.out_features, module.in_features], weight)
        compute_dtype = module.compute_dtype if isinstance(module, QuantLinear) else None
        new: nn.Module = QuantLinear.from_packed(weight, module.bias, compute_dtype=compute_dtype)
    elif isinstance(module, nn.Embedding) and type(module).forward in (nn.Embedding.forward, QuantEmbedding.forward):
        _check_shape(name, [module.num_embeddings, module.embedding_dim], weight)
        new = QuantEmbedding.from_packed(weight, module.padding_idx)
    else:
        where = f"{type(module).__name__} at {brief(path)}"
        raise unsupported(f"model: a packed weight in {where}", "nn.Linear and nn.Embedding have packed layers")
    replace_module(model, module, new.train(module.training))


def _check_shape(name: str, shape: list[int], weight: PackedWeight) -> None:
    if shape != list(weight.shape):
        raise invalid(f"model: {brief(name)}", f"shape {shape}", f"{list(weight.shape)}, as in the file")


def _ties(model: nn.Module) -> dict[str, list[str]]:
    """For each parameter that has several names, all of them under each."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def _tie(model: nn.Module, name: str, ties: Mapping[str, list[str]], state: Mapping[str, Tensor]) -> bool:
    """Makes a parameter that was not in the file the one that it was tied to before; whether there is one."""
    for other in ties.get(name, ()):
        if other in state:
            path, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(path), attribute, model.get_parameter(other))
            return True
    return False
