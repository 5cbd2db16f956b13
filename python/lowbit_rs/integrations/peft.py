"""PEFT: LoRA layers on packed weights that can be merged into them and taken out again.

Importing this module makes ``get_peft_model`` and ``add_adapter`` use them. ``import lowbit_rs`` sees to that
(``lowbit_rs._post_import``). On linear layers, forward and training are PEFT's own: a packed layer is an ``nn.Linear``
to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from lowbit_rs.errors import LowbitError, unsupported
from lowbit_rs.nn import QuantExperts, QuantLinear
from lowbit_rs.nn._base import pack_like
from lowbit_rs.nn.model import PACKED_MODULES
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
        _set(base, "weight", packed)
        if layer.bias is not None:
            base.bias.data.copy_(layer.bias)

    def unmerge(self) -> None:
        """Takes the merged adapters out again."""
        if not isinstance(self.get_base_layer(), QuantLinear):
            super().unmerge()
            return
        with self._float_base():
            super().unmerge()
        if self._unmerged is not None:
            packed, bias = self._unmerged
            _set(_base_of(self), "weight", packed)
            if bias is not None:
                _base_of(self).bias.data.copy_(bias)
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


class LoraQuantExperts(ParamWrapper):
    """LoRA on a stack of QuantExperts, which ``target_parameters`` names.

    PEFT adds the product of an adapter to the weight; here it is applied to the tokens of each expert, and the packed
    weight stays as it is. Merging and unmerging are those of LoraQuantLinear.
    """

    _unmerged: PackedWeight | None = None

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:  # noqa: ARG002
        self.num_experts, outputs, inputs = self._stack().shape
        self._param_ndim = 3
        # PEFT has them change places unless the module's own parameters are [experts, inputs, outputs].
        return (inputs, outputs) if self.get_base_layer().is_transposed else (outputs, inputs)

    def _stack(self) -> PackedWeight:
        experts = self.get_base_layer()
        assert isinstance(experts, QuantExperts)
        return experts.stacks[self.parameter_name]

    def _factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A [experts, r, inputs], B [experts, outputs, r] and the factor of their product."""
        a, b = self.lora_A[adapter].get_parameter("weight"), self.lora_B[adapter].get_parameter("weight")
        ups = b.reshape(b.shape[0], -1, self.num_experts).permute(2, 0, 1)
        return a.reshape(self.num_experts, -1, a.shape[-1]), ups, self.scaling[adapter]

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        experts = self.get_base_layer()
        if not isinstance(experts, QuantExperts):  # the model has been dequantized
            with super()._activate_lora(active_adapters):
                yield
            return
        active = [adapter for adapter in active_adapters if adapter in self.lora_A]
        experts.adapters[self.parameter_name] = [self._factors(adapter) for adapter in active]
        try:
            yield
        finally:
            del experts.adapters[self.parameter_name]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters into the packed stack. Arguments as in PEFT; what is not finite is refused in any case."""
        experts = self.get_base_layer()
        if not isinstance(experts, QuantExperts):
            super().merge(safe_merge, adapter_names)
            return
        adapters = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not adapters:
            return
        original = self._stack()
        weight = original.dequantize(torch.float32)
        for a, b, factor in map(self._factors, adapters):
            weight += factor * (b.float() @ a.float())
        packed = pack_like(weight, original)
        if self._unmerged is None:
            copies = {field: tensor.clone() for field, tensor in original.tensors().items()}
            self._unmerged = PackedWeight.from_tensors(original.spec, original.shape, original.dtype, copies)
        _set(experts, self.parameter_name, packed)
        self.merged_adapters.extend(adapters)

    def unmerge(self) -> None:
        """Takes the merged adapters out again."""
        experts = self.get_base_layer()
        if not isinstance(experts, QuantExperts) or self._unmerged is None:
            super().unmerge()
            return
        _set(experts, self.parameter_name, self._unmerged)
        self._unmerged = None
        self.merged_adapters.clear()


# PEFT tells by the name of the class that a module holds another one for the sake of a parameter.
LoraQuantExperts.__name__ = ParamWrapper.__name__


@torch.no_grad()
def _set(module: nn.Module, name: str, packed: PackedWeight) -> None:
    """Puts a weight of the same format into the parameters of a module; these stay the same objects."""
    for field, tensor in packed.tensors().items():
        parameter = module.get_parameter(state_key(name, field))
        parameter.data = tensor.to(parameter.device, copy=True)
    if isinstance(module, QuantLinear):
        module.rejoin()


_create_new_module: Any = LoraModel._create_new_module


def _create_module(lora_config: Any, adapter_name: str, target: nn.Module, **keywords: Any) -> nn.Module:
    """PEFT's choice of a LoRA layer for ``target``, or ours where the layer, or the parameter, is a packed one."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    parameter = keywords.get("parameter_name")
    if parameter is not None and isinstance(base, PACKED_MODULES):
        if not isinstance(base, QuantExperts) or parameter not in base.stacks:
            reason = "it is packed, or beside a packed one: name the layer in target_modules, or a stack of experts"
            raise unsupported(f"target_parameters with {parameter} of a {type(base).__name__}", reason)
        return LoraQuantExperts(target, adapter_name, config=lora_config, **keywords)
    if isinstance(base, QuantLinear):
        lora_config._register_custom_module({QuantLinear: LoraQuantLinear})
    new: nn.Module = _create_new_module(lora_config, adapter_name, target, **keywords)
    return new


LoraModel._create_new_module = staticmethod(_create_module)  # type: ignore[method-assign]
