"""What config.json of a model directory says of the quantization of its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .metadata import FORMAT_VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping

#: The method by which transformers finds this package.
QUANT_METHOD = "lowbit"

#: ``quantization_config`` of a directory with native weights: how each one is stored, the headers of its files say.
NATIVE: Mapping[str, Any] = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION}

_FILE = Path("config.json")

#: Keys under which libraries describe a quantization, the usual one first.
_KEYS = ("quantization_config", "compression_config")

#: Keys of which a config.json of transformers has one at least.
_READ = ("model_type", "architectures", *_KEYS)


def rewritten_config(config: Mapping[str, Any], quantization: Mapping[str, Any] | None) -> dict[Path, bytes]:
    """config.json with ``quantization`` in the place of what it says, or without any; nothing where it stays as it is.

    Where config.json is missing, or is not one that transformers reads, it is left alone.
    """
    new = {key: value for key, value in config.items() if key not in _KEYS}
    if quantization is not None and any(config.get(key) for key in _READ):
        new[_KEYS[0]] = dict(quantization)
    if new == config:
        return {}
    return {_FILE: (json.dumps(new, indent=2, ensure_ascii=False) + "\n").encode()}
