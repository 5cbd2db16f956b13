"""PEFT: LoRA layers on packed weights that can be merged into them and taken out again.

Importing this module makes ``get_peft_model`` and ``add_adapter`` use them. ``import lowbit_rs`` sees to that
(``lowbit_rs._post_import``). Forward and training are PEFT's own: a packed layer is an ``nn.Linear`` to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lowbit_rs.errors import LowbitError
from lowbit_rs.nn import QuantLinear
from lowbit_rs.packed import PackedWeight, state_key


class LoraQuantLinear(LoraLinear):
    """LoRA, DoRA and the other variants of PEFT's LoRA layer, on a QuantLinear.

    Merging dequantizes the weight to float32, adds the adapter, and packs the sum as the weight was packed: the merged
    weight differs from the sum by a rounding to the format. Unmerging brings the original codes back, to the bit; until
    then a merged layer keeps them, too.
    """

    _unmerged: tuple[PackedWeight, torch.Tensor | None] | None = None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters into the packed weight. Arguments as in PEFT."""
        if not isinstance(self.get_base_layer(), QuantLinear):  # the model has been dequantized
            super().merge(safe_merge, adapter_names)
            return
        base = _base_of(self)
        original = base.packed, None if base.bias is None else base.bias.detach().clone()
        merged_before = list(self.merged_adapters)
        with self._float_base() as layer:
            super().merge(safe_merge, adapter_names)
        if self.merged_adapters == merged_before:
            return
        try:
            packed = base.pack_like(layer.weight)
        except LowbitError:  # an adapter that is not finite: the layer is as it was
            self.merged_adapters[:] = merged_before
            raise
        if self._unmerged is None:
            self._unmerged = original
        _set(base, packed, layer.bias)

    def unmerge(self) -> None:
        """Takes the merged adapters out again."""
        if not isinstance(self.get_base_layer(), QuantLinear):
            super().unmerge()
            return
        with self._float_base():
            super().unmerge()
        if self._unmerged is not None:
            _set(_base_of(self), *self._unmerged)
            self._unmerged = None

    @contextmanager
    def _float_base(self) -> Iterator[nn.Linear]:
        """Within, the base layer is a float32 nn.Linear with the dequantized weight, as PEFT's arithmetic expects."""
        packed = self.base_layer
        self.base_layer = _base_of(self).to_linear(torch.float32)
        try:
            yield self.base_layer
        finally:
            self.base_layer = packed


def _base_of(layer: BaseTunerLayer) -> QuantLinear:
    base = layer.get_base_layer()
    assert isinstance(base, QuantLinear)
    return base


@torch.no_grad()
def _set(layer: QuantLinear, packed: PackedWeight, bias: torch.Tensor | None) -> None:
    """Puts a weight of the same format, and a bias, into the parameters of a layer; these stay the same objects."""
    for field, tensor in packed.tensors().items():
        parameter = layer.get_parameter(state_key("weight", field))
        parameter.data = tensor.to(parameter.device, copy=True)
    if bias is not None:
        layer.bias.copy_(bias)
    layer.rejoin()


_create_new_module: Any = LoraModel._create_new_module


def _create_module(lora_config: Any, adapter_name: str, target: nn.Module, **keywords: Any) -> nn.Module:
    """PEFT's choice of a LoRA layer for ``target``, with ours on top of its list where the layer is a packed one."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, QuantLinear):
        lora_config._register_custom_module({QuantLinear: LoraQuantLinear})
    new: nn.Module = _create_new_module(lora_config, adapter_name, target, **keywords)
    return new


LoraModel._create_new_module = staticmethod(_create_module)  # type: ignore[method-assign]
