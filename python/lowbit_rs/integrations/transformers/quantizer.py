"""LowbitQuantizer: what transformers asks while it loads, saves and moves a model with packed weights.

``from_pretrained`` builds the model on the meta device and calls, in this order, ``validate_environment``,
``preprocess_model`` (here packed modules take their places), ``param_element_size`` and ``adjust_max_memory`` for an
automatic device map, then for each tensor ``param_needs_quantization`` and the operation of ``get_quantize_ops``, and
at last ``postprocess_model``.
"""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from lowbit_rs.errors import InvalidArgument, invalid, unsupported
from lowbit_rs.files.metadata import QuantizedTensor, encode_metadata
from lowbit_rs.integrations.transformers import card, modules
from lowbit_rs.integrations.transformers.stored import StoredWeights, stored_weights
from lowbit_rs.nn import QuantExperts, Report, ReportRow, fuse_model
from lowbit_rs.nn.model import PACKED_MODULES, swap_norms
from lowbit_rs.packed import describe, state_key

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from lowbit_rs.integrations.transformers.config import LowbitConfig

#: Methods of a model that count or describe parameters, by which its packed ones would be misunderstood.
_OVERRIDES = ("num_parameters", "_upload_modified_files")


@register_quantizer("lowbit")
class LowbitQuantizer(HfQuantizer):
    """The quantizer of ``LowbitConfig``.

    Attributes:
        report: the modules that were packed while loading, and those that were not, with the reason.
    """

    quantization_config: LowbitConfig

    def __init__(self, quantization_config: LowbitConfig, **kwargs: Any) -> None:
        # A copy: it stays the model's own, whatever the caller does with his.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self.report = Report()
        #: Of each parameter that is to be packed: bytes of its codes, and of its float values.
        self._sizes: dict[str, tuple[int, int]] = {}
        #: As in StoredWeights: packed weights that are put together while loading.
        self.stacks: dict[str, tuple[QuantizedTensor, QuantizedTensor]] = {}

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Raises Unsupported for a device map that cannot be served."""
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            raise unsupported(
                "device_map with modules on disk",
                "they would stay float there. Save the packed model first (save_pretrained), and load that",
            )

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        stored = stored_weights(model, checkpoint_files) if self.pre_quantized else StoredWeights()
        self.stacks = stored.stacks
        plans = stored.weights or self._plans(model)
        for name, weights in plans.items():
            source = model.get_submodule(name)
            module = modules.place(model, name, weights, self.quantization_config)
            if self.pre_quantized:
                module._is_hf_initialized = True  # type: ignore[assignment]  # it has nothing to be initialized
            else:
                self._await_floats(name, source, module)
        if self.quantization_config.fuse_norms:
            # Before accelerate puts hooks in the place of forwards. Trials of norms need no values but their own.
            with torch.device("cpu"):
                self.report.fused_norms += swap_norms(model, self.quantization_config.skip_modules or (), self.report)
        if not plans:
            warnings.warn(_nothing_packed(model, self.report), stacklevel=2)
        self._warn_of_stacks()

    def _plans(self, model: PreTrainedModel) -> dict[str, dict[str, QuantizedTensor]]:
        """What the config asks for: by module and parameter, how it is packed."""
        plans = {}
        for name in modules.choose_modules(model, self.quantization_config, self.report):
            recipe, module = self.quantization_config.recipe(name), model.get_submodule(name)
            plans[name] = {
                key: QuantizedTensor(key, recipe.spec, shape, module.get_parameter(key).dtype, recipe.codebook_length)
                for key, shape in modules.weight_shapes(module).items()
            }
            self.report.scheme = self.report.scheme or describe(recipe.spec)
        return plans

    def _await_floats(self, name: str, source: nn.Module, module: nn.Module) -> None:
        """Registers float weights on the meta device: transformers casts what it reads to the dtype that it finds."""
        for key, packed in modules.packed_weights(module).items():
            weight = source.get_parameter(key)
            self._sizes[f"{name}.{key}"] = packed.data.nbytes, weight.nbytes
            row = ReportRow(
                name if key == "weight" else f"{name}.{key}", tuple(packed.shape), weight.nbytes, packed.nbytes
            )
            self.report.rows.append(row)
            module.register_parameter(key, nn.Parameter(weight.detach(), requires_grad=False))

    def _warn_of_stacks(self) -> None:
        left = [name for name, reason in self.report.skipped.items() if reason.startswith("stacked matrices")]
        if left:
            warnings.warn(f"{len(left)} stacks of experts stay in floating point, as {left[0]}", stacklevel=2)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:  # noqa: ARG002
        """Whether a tensor of the checkpoint is a float weight that is to be packed."""
        if self.pre_quantized:
            return False
        module, key = get_module_from_name(model, param_name)
        return key in modules.weight_names(module)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes that an element of a parameter takes once it is loaded."""
        if param_name in self._sizes and param.is_floating_point():
            return self._sizes[param_name][0] / max(1, param.numel())
        size: float = super().param_element_size(model, param_name, param)
        return size

    def adjust_max_memory(self, max_memory: dict[str, int | str]) -> dict[str, int | str]:
        """While packing, the largest float weight needs room beside the packed ones."""
        room = max((floats for _, floats in self._sizes.values()), default=0)
        return {
            device: size if device == "disk" or isinstance(size, str) else max(0, size - room)
            for device, size in max_memory.items()
        }

    def get_quantize_ops(self) -> Any:
        """What packs a float weight of the checkpoint."""
        from lowbit_rs.integrations.transformers.operations import PackWeights

        return PackWeights(self)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:  # noqa: ARG002
        """The model's converters, taking packed matrices where the checkpoint has them."""
        from transformers.core_model_loading import WeightConverter

        from lowbit_rs.integrations.transformers.operations import StackWeights

        if not self.stacks:
            return weight_conversions
        return [
            StackWeights.within(self, step) if isinstance(step, WeightConverter) else step
            for step in weight_conversions
        ]

    def pack(self, model: nn.Module, name: str, tensor: Tensor) -> dict[str, nn.Parameter]:
        """The parameters of the packed weight ``name``, whose float values are ``tensor``, by their names."""
        module_name, _, key = name.rpartition(".")
        weight = modules.rows_as_outputs(model.get_submodule(module_name), tensor)
        try:
            packed = self.quantization_config.recipe(module_name).pack(weight)
        except InvalidArgument as error:
            raise InvalidArgument(f"{name}: {error}") from error
        return {
            f"{module_name}.{state_key(key, field)}": nn.Parameter(part, requires_grad=False)
            for field, part in packed.tensors().items()
        }

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        for name, module in _packed(model):
            for key in modules.weight_names(module):
                if module.get_parameter(key).is_floating_point():
                    self._pack_late(model, name, module, key)
                _freeze(name, module, key)
        if self.quantization_config.fuse:
            self.report.fusion = fuse_model(model)
        # Saving writes the parameters as they are; undoing conversions of float tensors would tear them apart.
        model._weight_conversions = []
        # Partial functions and no methods: these can be copied and pickled with the model.
        model.num_parameters = partial(_num_parameters, model)
        model._upload_modified_files = partial(card.upload_with_note, model)
        model.add_model_tags("lowbit")
        # Read by PEFT's prepare_model_for_kbit_training alone, which turns on checkpointing only for flags it knows.
        model.hqq_quantized = True
        return model

    def _pack_late(self, model: nn.Module, name: str, module: nn.Module, key: str) -> None:
        """Packs a float weight that did not come through ``get_quantize_ops``: one that was not in the checkpoint."""
        weight = module.get_parameter(key)
        if isinstance(module, QuantExperts) and not getattr(weight, "_is_hf_initialized", False):
            nn.init.normal_(weight, std=getattr(model.config, "initializer_range", 0.02))  # linear layers have been
        for path, parameter in self.pack(model, f"{name}.{key}", weight.detach()).items():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
            module.register_parameter(path.rpartition(".")[2], parameter)

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        named = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a name in a config that has been saved
        before = model.dtype
        modules.unpack_modules(model, before if named is None else named)
        if named not in (None, before):  # what was not packed has the dtype of the model, or is kept in float32
            model.to(named)
        for name in (*_OVERRIDES, "hqq_quantized"):
            model.__dict__.pop(name, None)
        model.model_tags = [tag for tag in model.model_tags or [] if tag != "lowbit"]
        model.config._is_quantized = False
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """No state_dict but the model's own, and the metadata of its files: how each weight is stored."""
        described = [
            QuantizedTensor.of(f"{name}.{key}", packed)
            for name, module in _packed(model)
            for key, packed in modules.packed_weights(module).items()
        ]
        return None, encode_metadata(None, described)

    def is_serializable(self) -> bool:
        """Packed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on packed layers can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Packed layers compile without graph breaks."""
        return True


def _packed(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PACKED_MODULES))


def _freeze(name: str, module: nn.Module, key: str) -> None:
    """Takes gradients off the parameters of a packed weight; refuses it where one of them was not loaded."""
    for field in modules.packed_weights(module)[key].tensors():
        path = state_key(key, field)
        parameter = module.get_parameter(path)
        if not parameter.is_meta and not getattr(parameter, "_is_hf_initialized", False):  # on meta where offloaded
            raise invalid("checkpoint", f"no tensor for {name}.{path}", "one, as the weight is packed")
        parameter.requires_grad_(False)


def _num_parameters(model: PreTrainedModel, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """The number of parameters, each packed weight counting as many as it stands for, and its scales none."""
    excluded = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    excluded = excluded if exclude_embeddings else set()
    count, inside = 0, set()
    for name, module in _packed(model):
        for key, packed in modules.packed_weights(module).items():
            if not only_trainable and f"{name}.{key}" not in excluded:
                count += packed.shape.numel()
            inside |= {f"{name}.{state_key(key, field)}" for field in packed.tensors()}
    return count + sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if name not in inside | excluded and (parameter.requires_grad or not only_trainable)
    )


def _nothing_packed(model: PreTrainedModel, report: Report) -> str:
    reasons = "".join(f"\n  {name}: {reason}" for name, reason in report.skipped.items())
    return f"quantization_config: {type(model).__name__} has no layer that is packed{reasons}"
