"""The checkpoints of tests/data/foreign, which other libraries packed: see tests/data/derive_foreign.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

FOREIGN = Path(__file__).parent / "data" / "foreign"

#: What each of them decodes to, by the library's own dequantization: [N, K] by case.
EXPECTED = load_file(FOREIGN / "expected.safetensors")


def case(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a case, all of a module ``layer``, and its ``quantization_config``."""
    path = FOREIGN / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        config: dict[str, Any] = json.loads(file.metadata()["quantization_config"])
    return load_file(path), config


def write_directory(path: Path, tensors: dict[str, Tensor], quantization: dict[str, Any] | None, **config: Any) -> Path:
    """A model directory with one safetensors file."""
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    if quantization is not None:
        config["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def write_case(path: Path, name: str, **config: Any) -> Path:
    """A case as a model directory."""
    tensors, quantization = case(name)
    return write_directory(path, tensors, quantization, **config)
