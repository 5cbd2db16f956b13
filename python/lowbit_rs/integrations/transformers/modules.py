"""Which modules of a transformers model are packed, and what takes their place before weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer

from lowbit_rs.files.metadata import QuantizedTensor
from lowbit_rs.files.safetensors_format import torch_dtype
from lowbit_rs.nn import QuantEmbedding, QuantExperts, QuantLinear, Report
from lowbit_rs.nn.experts import matrices, stack_names
from lowbit_rs.nn.model import PACKED_MODULES, choose, matches, replace_module, to_float
from lowbit_rs.packed import DTYPES, PackedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lowbit_rs.integrations.transformers.config import LowbitConfig


class QuantConv1D(QuantLinear):
    """A packed layer in the place of transformers' Conv1D, which GPT-2 has: a linear layer with a transposed weight.

    The packed weight is [outputs, inputs], as that of every QuantLinear.
    """

    def to_conv1d(self, dtype: torch.dtype | None = None) -> Conv1D:
        """A Conv1D with the dequantized weight [inputs, outputs] and a copy of the bias."""
        weight = self.dequantize(dtype).t().contiguous()
        with torch.device("meta"):
            layer: Conv1D = Conv1D(self.out_features, self.in_features)
        layer.weight = nn.Parameter(weight)
        assert self.bias is not None
        layer.bias = nn.Parameter(self.bias.detach().to(weight.dtype, copy=True))
        layer.train(self.training)
        return layer


def choose_modules(model: PreTrainedModel, config: LowbitConfig, report: Report) -> list[str]:
    """Names of the modules to pack while loading; the reasons for leaving the others go into ``report``."""
    skip = _default_skips(model) if config.skip_modules is None else config.skip_modules
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    tied = {name.removesuffix(".weight") for name in tied}
    names = choose(model, sorted(skip), config.embeddings, report)
    for name, module in model.named_modules():
        if not isinstance(module, Conv1D):
            continue
        matched = next((pattern for pattern in skip if matches(name, pattern)), None)
        if matched is None and module.weight.dtype in DTYPES.values():
            names.append(name)
        else:
            report.skipped[name] = f"matches skip={matched!r}" if matched else f"its weight is {module.weight.dtype}"
    report.skipped |= dict.fromkeys(tied.intersection(names), "its weight is tied to another")
    return [name for name in names if name not in tied]


def _default_skips(model: PreTrainedModel) -> list[str]:
    """The output head, the last layer, and what the model asks to have in fp32."""
    kept_in_fp32 = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    names = HfQuantizer.get_modules_to_not_convert(model, None, kept_in_fp32)
    return [name.removesuffix(".bias") for name in names]  # of the last layer, transformers gives a parameter


def weight_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """The float weights of a module that can be packed: their shapes, rows as outputs, by the names of parameters."""
    if isinstance(module, Conv1D):
        return {"weight": module.weight.shape[::-1]}
    if isinstance(module, nn.Linear | nn.Embedding):
        return {"weight": module.weight.shape}
    return {key: matrices(module, module.get_parameter(key)).shape for key in stack_names(module)}


def place(
    model: nn.Module,
    name: str,
    weights: Mapping[str, QuantizedTensor],
    config: LowbitConfig,
) -> nn.Module:
    """Puts a packed module, empty and on the meta device, where ``model`` has the float one ``name``; returns it.

    ``weights`` describes what each parameter of ``weight_shapes`` is packed as, ``config`` how activations are taken.
    """
    module = model.get_submodule(name)
    packed = {key: _empty(weight, module.get_parameter(key).dtype) for key, weight in weights.items()}
    compute_dtype = config.compute_dtype_of(name)
    new: nn.Module
    if isinstance(module, nn.Embedding):
        new = QuantEmbedding.from_packed(packed["weight"], module.padding_idx)
    elif isinstance(module, nn.Linear | Conv1D):
        kind = QuantConv1D if isinstance(module, Conv1D) else QuantLinear
        bias = module._parameters.get("bias")
        new = kind.from_packed(
            packed["weight"],
            bias,
            compute_dtype=compute_dtype,
            activation=config.activation_of(name),
            threshold=config.threshold_of(name),
        )
    else:
        new = QuantExperts.from_packed(
            module, packed, compute_dtype=compute_dtype, activation=config.activation_of(name)
        )
    replace_module(model, module, new.train(module.training))
    return new


def _empty(weight: QuantizedTensor, dtype: torch.dtype) -> PackedWeight:
    tensors = {
        field: torch.empty(part.shape, dtype=torch_dtype(part.dtype), device="meta")
        for field, part in weight.parts().items()
    }
    return PackedWeight.from_tensors(weight.spec, weight.shape, dtype, tensors)


def packed_weights(module: nn.Module) -> dict[str, PackedWeight]:
    """The packed weights of a module by the names of its parameters; none for a float module."""
    if isinstance(module, QuantExperts):
        return module.stacks
    return {"weight": module.packed} if isinstance(module, QuantLinear | QuantEmbedding) else {}


def weight_names(module: nn.Module) -> tuple[str, ...]:
    """The parameters of a packed module that hold codes."""
    if isinstance(module, QuantExperts):
        return tuple(module._stacks)
    return ("weight",) if isinstance(module, PACKED_MODULES) else ()


def rows_as_outputs(module: nn.Module, weight: Tensor) -> Tensor:
    """The float weight of a packed module as it is packed, each row an output: a view of the checkpoint's tensor."""
    if isinstance(module, QuantConv1D):
        return weight.t()
    return matrices(module, weight) if isinstance(module, QuantExperts) else weight


def unpack_modules(model: nn.Module, dtype: torch.dtype) -> None:
    """Replaces every packed module by the float one that it stands for, in ``dtype``, one by one."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantConv1D):
            replace_module(model, module, module.to_conv1d(dtype))
        elif isinstance(module, PACKED_MODULES):
            replace_module(model, model.get_submodule(name), to_float(module, dtype))
