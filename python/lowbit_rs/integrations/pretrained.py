"""from_pretrained: a transformers model of a packed checkpoint, native or of another library."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from lowbit_rs.errors import invalid, unsupported
from lowbit_rs.files.checkpoint import Checkpoint, open_checkpoint
from lowbit_rs.files.metadata import QuantizedTensor
from lowbit_rs.files.model_config import NATIVE
from lowbit_rs.files.safetensors_format import brief
from lowbit_rs.integrations.checkpoints.convert import load_weight
from lowbit_rs.integrations.checkpoints.registry import foreign_weights, product_options
from lowbit_rs.integrations.checkpoints.source import TensorSource
from lowbit_rs.integrations.transformers.stored import in_memory
from lowbit_rs.packed import dtype_name, state_key

#: Files of a repository that are downloaded: weights, what describes them, and tokenizers.
_DOWNLOADED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")

#: Names that old files have and models of today do not: buffers that are computed.
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids|masked_bias|attn\.bias)$")


def from_pretrained(
    path_or_id: str | os.PathLike[str],
    *,
    model_class: Any = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
    revision: str | None = None,
    **options: Any,
) -> Any:
    """A transformers model of a packed checkpoint: native, bitsandbytes, GPTQ, AWQ or compressed-tensors.

    Quantized linear layers become QuantLinear (embeddings QuantEmbedding, experts QuantExperts) with the checkpoint's
    own codes and scales; the library that wrote it is not needed. transformers loads the model, renaming and stacking
    tensors as it does, and no float weight of a quantized layer is ever made. It comes in eval mode, and is what
    AutoModel.from_pretrained gives of a native directory: ``save_pretrained`` writes one.

    Args:
        path_or_id: a model directory, or the name of a repository on the Hugging Face hub, which is downloaded.
        model_class: a class of transformers; by default the one that config.json names under ``architectures``.
        dtype: of all that is not quantized, by default the one that config.json names.
        device: where the model goes, by default the CPU.
        revision: branch, tag or commit of the repository.
        options: go to ``from_pretrained`` of the class, as ``attn_implementation="sdpa"``.

    Raises:
        InvalidArgument: where the checkpoint is not quantized, is malformed, or does not fit the model.
        Unsupported: for a layout that is not served, and a model that transformers does not have.
    """
    if dtype is not None:
        dtype_name(dtype)
    path = _local(path_or_id, revision)
    checkpoint = open_checkpoint(path)
    config = _config(path)
    kind = model_class or _class_of(config)
    config.quantization_config = _quantization(checkpoint)
    how = {**options, "config": config, "dtype": dtype or "auto", "output_loading_info": True}
    if checkpoint.is_quantized:
        model, found = kind.from_pretrained(path, **how)
        zeros: frozenset[str] = frozenset()
    else:
        state, described, zeros = _foreign(checkpoint)
        with in_memory(described):
            model, found = kind.from_pretrained(None, state_dict=state, **how)
    _check_names(str(path), found, zeros)
    if (path / "generation_config.json").exists() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return model.eval() if device is None else model.eval().to(device)


def _local(path_or_id: str | os.PathLike[str], revision: str | None) -> Path:
    """The directory of a checkpoint, downloaded where there is none of this name."""
    path = Path(path_or_id)
    if path.is_dir():
        return path
    name = os.fspath(path_or_id)
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name in (".", ".."):
        raise invalid("path_or_id", name, "a model directory, or the name of a repository as owner/name")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, allow_patterns=list(_DOWNLOADED)))


def _config(path: Path) -> Any:
    """The config of the model, without its quantization, which transformers would look for its own libraries for."""
    if not (path / "config.json").exists():
        raise invalid(str(path), "no config.json", "a model directory with one")
    config = transformers.AutoConfig.from_pretrained(path)
    for part in (config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", ()))):
        for key in ("quantization_config", "compression_config"):
            if getattr(part, key, None) is not None:
                delattr(part, key)
    return config


def _class_of(config: Any) -> Any:
    """The class that a config names."""
    names = config.architectures or []
    found = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    if found is None:
        reason = f"transformers {transformers.__version__} has no such model; pass model_class="
        raise unsupported(f"architectures {brief(names)} in config.json", reason)
    return found


def _quantization(checkpoint: Checkpoint) -> dict[str, Any]:
    """The ``quantization_config`` of a native checkpoint, as far as it has one; of another, how it is multiplied."""
    if not checkpoint.is_quantized:
        return {**NATIVE, **product_options(checkpoint)}
    said = checkpoint.config.get("quantization_config")
    return dict(said) if isinstance(said, dict) else dict(NATIVE)


def _foreign(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, QuantizedTensor], frozenset[str]]:
    """The tensors of a checkpoint of another library with its weights packed, how these are, and names of zero biases.

    AutoGPTQ gives a bias of zeros to layers that have none.
    """
    with TensorSource(checkpoint) as source:
        _, weights = foreign_weights(source)
        described = {weight.tensor.name: weight.tensor for weight in weights}
        state: dict[str, Tensor] = {}
        for weight in weights:
            parts = load_weight(weight).tensors()
            state |= {state_key(weight.tensor.name, part): tensor for part, tensor in parts.items()}
        consumed = {part for weight in weights for part in weight.parts}
        state |= {name: source.read(name) for name in source.infos if name not in consumed}
    biases = (f"{name.removesuffix('.weight')}.bias" for name in described)
    return state, described, frozenset(name for name in biases if name in state and not state[name].any())


def _check_names(where: str, found: Mapping[str, Any], zeros: frozenset[str]) -> None:
    """Raises InvalidArgument unless the checkpoint has the tensors of the model and no others that count."""
    missing = sorted(found["missing_keys"])
    unexpected = sorted(name for name in found["unexpected_keys"] if name not in zeros and not _COMPUTED.search(name))
    if missing or unexpected:
        got = f"the names {brief(unexpected)} and not {brief(missing)}"
        raise invalid(where, got, "the names of the model's parameters")


__all__ = ["from_pretrained"]
