"""Linear layers whose weights are stored in 4 or 8 bits, and multiplied with as they are.

>>> import torch, lowbit_rs
>>> model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
>>> report = lowbit_rs.quantize_model(model, "nf4", progress=False)
>>> model(torch.randn(3, 256)).shape
torch.Size([3, 10])
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lowbit_rs import codebooks, nn
from lowbit_rs._native import __version__
from lowbit_rs._post_import import import_after
from lowbit_rs.errors import CudaError, InvalidArgument, LowbitError, Unsupported
from lowbit_rs.functional import linear, quantize
from lowbit_rs.nn import QuantEmbedding, QuantLinear, Report, dequantize_model, fuse_model, quantize_model
from lowbit_rs.packed import PackedWeight

__all__ = [
    "CudaError",
    "InvalidArgument",
    "LowbitError",
    "PackedWeight",
    "QuantEmbedding",
    "QuantLinear",
    "Report",
    "Unsupported",
    "__version__",
    "codebooks",
    "dequantize_model",
    "fuse_model",
    "linear",
    "nn",
    "quantize",
    "quantize_model",
]

#: Public names of modules that need more than this package does: imported when asked for, and not by `import *`.
_LATER = {
    "LowbitConfig": "lowbit_rs.integrations.transformers",
    "from_pretrained": "lowbit_rs.integrations.pretrained",
}

# Not imports, so that `import lowbit_rs` stays light: these modules follow once their libraries are there.
import_after("transformers.quantizers.auto", "lowbit_rs.integrations.transformers")
import_after("peft.tuners.lora.model", "lowbit_rs.integrations.peft")


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
