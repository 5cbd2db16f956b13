"""from_pretrained: a transformers model of a packed checkpoint, native or of another library."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lowbit_rs.errors import invalid, unsupported
from lowbit_rs.files import load_packed
from lowbit_rs.files.checkpoint import Checkpoint, open_checkpoint
from lowbit_rs.files.safetensors_format import brief
from lowbit_rs.files.state import load_weights
from lowbit_rs.integrations.checkpoints.convert import load_weight
from lowbit_rs.integrations.checkpoints.registry import foreign_weights, product_options
from lowbit_rs.integrations.checkpoints.source import TensorSource
from lowbit_rs.integrations.transformers import LowbitConfig, LowbitQuantizer
from lowbit_rs.nn import QuantLinear
from lowbit_rs.nn._base import PackedModule
from lowbit_rs.packed import PackedWeight, dtype_name

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

    Quantized linear layers become QuantLinear (embeddings QuantEmbedding) with the checkpoint's own codes and scales;
    the library that wrote it is not needed. The model is built without memory for its weights and filled with one
    tensor after the other, so that no float weight of a quantized layer is ever made. It comes in eval mode, and is
    what AutoModel.from_pretrained gives of a native directory: ``save_pretrained`` writes one.

    Args:
        path_or_id: a model directory, or the name of a repository on the Hugging Face hub, which is downloaded.
        model_class: a class of transformers; by default the one that config.json names under ``architectures``.
        dtype: of all that is not quantized, by default the one that config.json names.
        device: where the model goes, by default the CPU.
        revision: branch, tag or commit of the repository.
        options: go to the class, as ``attn_implementation="sdpa"``.

    Raises:
        InvalidArgument: where the checkpoint is not quantized, is malformed, or does not fit the model.
        Unsupported: for a layout that is not served, a quantized weight in a module that is no nn.Linear, and a model
            that transformers does not have.
    """
    if dtype is not None:
        dtype_name(dtype)
    path = _local(path_or_id, revision)
    checkpoint = open_checkpoint(path)
    config = _config(path)
    chosen = dtype or _config_dtype(config)
    if chosen is not None:
        options = {**options, "dtype": chosen}
    with _parameters_on_meta():
        model = (model_class or _class_of(config))._from_config(config, **options)
    weights = load_packed(path) if checkpoint.is_quantized else _foreign(checkpoint)
    load_weights(model, _fitting(model, weights, chosen), str(path))
    _hand_over(model, _quantization(checkpoint), chosen)
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


def _quantization(checkpoint: Checkpoint) -> LowbitConfig:
    """The options that a native checkpoint was packed with, as far as it says; of another, how it is multiplied."""
    said = checkpoint.config.get("quantization_config")
    said = dict(said) if isinstance(said, dict) else {}
    if not checkpoint.is_quantized:
        said = product_options(checkpoint)
    config: LowbitConfig = LowbitConfig.from_dict(said)
    return config


def _hand_over(model: Any, quantization: LowbitConfig, dtype: torch.dtype | None) -> None:
    """Tells packed modules what their tensors do not show, and transformers that the model is a packed one."""
    for name, module in model.named_modules():
        if isinstance(module, PackedModule) and dtype is not None:
            module.dtype = dtype  # no cast touches its parameters, so that it is to be told
        if isinstance(module, QuantLinear):
            module.compute_dtype = quantization.compute_dtype_of(name)
            module.activation = quantization.activation_of(name)
            module.threshold = quantization.threshold_of(name)
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    model.hf_quantizer = LowbitQuantizer(quantization, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, quantization.quant_method
    model.hf_quantizer.postprocess_model(model)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made in this block have parameters without memory; buffers, which no file has, are real."""
    register: Callable[..., None] = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _foreign(checkpoint: Checkpoint) -> dict[str, PackedWeight | Tensor]:
    """The weights of a checkpoint of another library, packed, and all other tensors."""
    with TensorSource(checkpoint) as source:
        _, weights = foreign_weights(source)
        loaded: dict[str, PackedWeight | Tensor] = {weight.tensor.name: load_weight(weight) for weight in weights}
        consumed = {part for weight in weights for part in weight.parts}
        return loaded | {name: source.read(name) for name in source.infos if name not in consumed}


def _fitting(
    model: Any, weights: Mapping[str, PackedWeight | Tensor], dtype: torch.dtype | None
) -> dict[str, PackedWeight | Tensor]:
    """The weights in the dtype of the model, without those that models of today have not."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    names |= {name for name, _ in model.named_buffers()}
    patterns = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    fitting = {}
    for name, weight in weights.items():
        if isinstance(weight, Tensor):
            ignored = _COMPUTED.search(name) or any(pattern.search(name) for pattern in patterns)
            if name not in names and (ignored or _is_zero_bias(name, weight, weights)):
                continue
            if dtype is not None and weight.is_floating_point():
                weight = weight.to(_dtype_of(model, name, dtype))
        fitting[name] = weight
    return fitting


def _is_zero_bias(name: str, tensor: Tensor, weights: Mapping[str, PackedWeight | Tensor]) -> bool:
    """Whether a tensor is the bias of zeros that AutoGPTQ gives to layers that have none."""
    beside = weights.get(f"{name.removesuffix('.bias')}.weight")
    return name.endswith(".bias") and isinstance(beside, PackedWeight) and not bool(tensor.any())


def _dtype_of(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter in a model of ``dtype``: some stay float32, others in float16 models alone."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return dtype if kept.isdisjoint(name.split(".")) else torch.float32


def _config_dtype(config: Any) -> torch.dtype | None:
    dtype = getattr(config, "dtype", None)
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


__all__ = ["from_pretrained"]
