"""The layouts that are read, by the ``quant_method`` that config.json names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lowbit_rs.errors import invalid, unsupported
from lowbit_rs.files.checkpoint import Checkpoint
from lowbit_rs.files.safetensors_format import brief

from . import awq, bitsandbytes, compressed_tensors, gptq
from .source import ForeignWeight, Quantization, TensorSource

#: Gives the quantized weights of a checkpoint; refuses by name what it does not serve.
Read = Callable[[TensorSource, Quantization], Iterator[ForeignWeight]]

LAYOUTS: Mapping[str, Read] = {
    "bitsandbytes": bitsandbytes.read,
    "gptq": gptq.read,
    "awq": awq.read,
    "compressed-tensors": compressed_tensors.read,
}

#: Other names of these methods.
_ALIASES = {"bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes"}

#: Files in which libraries wrote their options before config.json had a place for them, and the methods they mean.
OPTION_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def foreign_weights(source: TensorSource) -> tuple[str, list[ForeignWeight]]:
    """The method that quantized a checkpoint, and its weights.

    Raises:
        InvalidArgument: where the checkpoint is not quantized, is native already, or is malformed.
        Unsupported: for a method, or a variant of one, that is not served.
    """
    checkpoint = source.checkpoint
    if checkpoint.is_quantized:
        raise invalid("source", f"{checkpoint.path}, which holds native weights", "a checkpoint of another library")
    method, quantization = _method(checkpoint)
    read = LAYOUTS.get(method)
    if read is None:
        raise unsupported(f"{checkpoint.path}: quant_method {brief(method)}", f"served are {', '.join(LAYOUTS)}")
    weights = list(read(source, quantization))
    if not weights:
        raise invalid("source", f"{checkpoint.path}, with no weight that {method} packed", "quantized weights")
    return method, weights


def product_options(checkpoint: Checkpoint) -> dict[str, Any]:
    """How the weights of another library's checkpoint are multiplied, as options of a LowbitConfig."""
    method, quantization = _method(checkpoint)
    return bitsandbytes.products(quantization) if method == "bitsandbytes" else {}


def _method(checkpoint: Checkpoint) -> tuple[str, Quantization]:
    """The quantization method of a checkpoint and its options."""
    config = checkpoint.config.get("quantization_config", checkpoint.config.get("compression_config"))
    if isinstance(config, dict):
        name = str(config.get("quant_method"))
        return _ALIASES.get(name, name), Quantization(config)
    for file, method in OPTION_FILES.items():
        if Path(file) in checkpoint.others:
            return method, Quantization(_options(checkpoint.path / file))
    scheme = checkpoint.foreign_scheme()
    if scheme is None:
        raise invalid("source", f"{checkpoint.path}, which is not quantized", "a quantized checkpoint")
    if not scheme.startswith("bitsandbytes"):  # which describes itself in its tensors
        got = f"{checkpoint.path}, without quantization_config, quantized by {scheme}"
        raise invalid("source", got, "a model directory whose config.json has quantization_config")
    return "bitsandbytes", Quantization()


def _options(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise invalid(str(path), str(error), "a JSON object") from None
    if not isinstance(content, dict):
        raise invalid(str(path), brief(content), "a JSON object")
    return content
