"""The settings that the demo compares, each with the arguments of lowbit_rs.quantize_model that make it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lowbit_rs import codebooks
from lowbit_rs.errors import invalid
from lowbit_rs.nn import QuantLinear, quantize_model

_GRID = (
    "The file of this model is in Q4_1: its weights are 16 evenly spaced values in blocks of 32 to begin with, the "
    "very thing that this format stores. It does not lose as little with other models."
)


@dataclass(frozen=True)
class Setting:
    """A way to store the linear layers; the original is one, too."""

    #: What ``--formats`` takes.
    name: str
    #: What tables and pictures say.
    label: str
    #: Arguments of :func:`lowbit_rs.quantize_model`, without the codebook; None leaves the layers as they are.
    options: Mapping[str, Any] | None
    #: In place of the table of a format: the block-optimal one, or one fitted to each layer's weight.
    codebook: Literal["block_optimal", "fit"] | None = None
    #: Of activations, and of everything that is not quantized.
    dtype: torch.dtype = torch.bfloat16
    #: What a reader must know of the figures.
    note: str | None = None

    def quantize(self, model: nn.Module) -> float:
        """Quantize the linear layers of ``model`` in place; returns their bits a weight, scales included."""
        if self.options is None:
            return 8.0 * self.dtype.itemsize
        if self.codebook == "fit":
            _fit_each(model, self.options)
        else:
            codebook = _block_optimal(self.options) if self.codebook else None
            quantize_model(model, codebook=codebook, progress=False, **self.options)
        packed = [module.packed for module in model.modules() if isinstance(module, QuantLinear)]
        return 8 * sum(weight.nbytes for weight in packed) / sum(weight.shape.numel() for weight in packed)


def _block_optimal(options: Mapping[str, Any]) -> codebooks.Table:
    return codebooks.block_optimal(options["block_size"], signed=options["signed_absmax"])


def _fit_each(model: nn.Module, options: Mapping[str, Any]) -> None:
    """What quantize_model does by default, with a codebook of its own for each layer."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            codebook = codebooks.fit(module.weight, block_size=options["block_size"], signed=options["signed_absmax"])
            model.set_submodule(name, QuantLinear.from_linear(module, codebook=codebook, **options))


_DOUBLE_QUANT = {"double_quant": True}
_SIGNED = {"double_quant": True, "signed_absmax": True}

ORIGINALS = (
    Setting("fp32", "fp32 original", None, dtype=torch.float32),
    Setting("bf16", "bf16 original", None),
)

SETTINGS = (
    Setting("nf4", "NF4, block 64", {"format": "nf4"}),
    Setting("nf4-dq", "NF4, block 64, DQ", {"format": "nf4", **_DOUBLE_QUANT}),
    Setting("nf4-16-dq", "NF4, block 16, DQ", {"format": "nf4", "block_size": 16, **_DOUBLE_QUANT}),
    Setting("bof4s-16-dq", "BOF4-S, block 16, DQ", {"block_size": 16, **_SIGNED}, codebook="block_optimal"),
    Setting("fit-32-dq", "fitted, block 32, DQ", {"block_size": 32, **_SIGNED}, codebook="fit"),
    Setting("fp4", "FP4, block 64", {"format": "fp4"}),
    Setting("int4", "INT4, block 64", {"format": "int4"}),
    Setting(
        "uint4", "UINT4, block 32", {"format": "uint4", "block_size": 32, "scale_dtype": torch.float16}, note=_GRID
    ),
    Setting("int8", "INT8, rows", {"format": "int8", "block_size": "row"}),
)

#: What the words of the labels mean.
LEGEND = (
    "block: weights that share a scale. DQ: double quantization, scales in 8 bits; else in fp32, of UINT4 in fp16. "
    "BOF4-S: the block-optimal codebook, with signed scales (arXiv 2505.06653); fitted: a codebook for each layer, "
    "which errs least on its weights, with signed scales"
)


def select(names: str | None) -> list[Setting]:
    """The settings of a comma-separated list of names, in the order of the table; all of them for None.

    Raises InvalidArgument for a name that there is not.
    """
    if names is None:
        return list(SETTINGS)
    wanted = {name.strip() for name in names.split(",")}
    known = {setting.name for setting in SETTINGS}
    if not wanted <= known:
        raise invalid("formats", repr(names), f"a comma-separated list of {', '.join(s.name for s in SETTINGS)}")
    return [setting for setting in SETTINGS if setting.name in wanted]
