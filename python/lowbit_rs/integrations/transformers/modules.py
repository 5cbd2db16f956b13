"""Which modules of a transformers model are packed, and what takes their place before weights are loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer

from lowbit_rs.nn import QuantEmbedding, QuantExperts, QuantLinear, Report
from lowbit_rs.nn.experts import matrices, stack_names
from lowbit_rs.nn.model import PACKED_MODULES, choose, matches, replace_module, to_float
from lowbit_rs.packed import DTYPES, PackedWeight, state_key, storage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lowbit_rs.files.recipe import Recipe
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


def packed_modules(model: PreTrainedModel, patterns: Iterable[str]) -> list[str]:
    """Names of the modules that are packed in a checkpoint, which lists them as ``summarize`` does.

    The checkpoint may be of the model with a head and the model be the one without, or the reverse.
    """
    patterns = tuple(patterns)
    prefix = f"{model.base_model_prefix}."
    kinds = (nn.Linear, nn.Embedding, Conv1D)
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, kinds) or stack_names(module))
        and any(_listed(known, patterns) for known in (name, prefix + name, name.removeprefix(prefix)))
    ]


def summarize(model: nn.Module) -> list[str]:
    """The packed modules of a model as patterns, in which a number of a name is ``*``.

    Where a pattern would mean a module that is not packed, the names stand for themselves.
    """
    packed = {name for name, module in model.named_modules() if isinstance(module, PACKED_MODULES)}
    others = [name for name, _ in model.named_modules() if name not in packed]
    patterns: dict[str, list[str]] = {}
    for name in sorted(packed):
        patterns.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(name)
    summary = []
    for pattern, names in patterns.items():
        summary += names if any(_listed(name, [pattern]) for name in others) else [pattern]
    return summary


def _listed(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns is the name, numbers standing for ``*``."""
    return any(
        pattern == name or re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name) is not None
        for pattern in patterns
    )


def place(model: nn.Module, name: str, recipe: Recipe, compute_dtype: torch.dtype | None) -> nn.Module:
    """Puts an empty packed module on the meta device where ``model`` has the float one ``name``, and returns it."""
    module = model.get_submodule(name)
    stacks = stack_names(module)
    new: nn.Module
    if stacks:
        shapes = {key: matrices(module, module.get_parameter(key)).shape for key in stacks}
        packed = {key: _empty(recipe, shape, module.get_parameter(key).dtype) for key, shape in shapes.items()}
        new = QuantExperts.from_packed(module, packed, compute_dtype=compute_dtype)
    else:
        weight = module.get_parameter("weight")
        shape = weight.shape[::-1] if isinstance(module, Conv1D) else weight.shape
        empty = _empty(recipe, shape, weight.dtype)
        if isinstance(module, nn.Embedding):
            new = QuantEmbedding.from_packed(empty, module.padding_idx)
        else:
            kind = QuantConv1D if isinstance(module, Conv1D) else QuantLinear
            new = kind.from_packed(empty, module._parameters.get("bias"), compute_dtype=compute_dtype)
    replace_module(model, module, new.train(module.training))
    return new


def _empty(recipe: Recipe, shape: torch.Size, dtype: torch.dtype) -> PackedWeight:
    sizes = storage(recipe.spec, shape, recipe.codebook_length)
    tensors = {field: torch.empty(size, dtype=kind, device="meta") for field, (size, kind) in sizes.items()}
    return PackedWeight.from_tensors(recipe.spec, shape, dtype, tensors)


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


def set_packed(module: nn.Module, key: str, packed: PackedWeight) -> None:
    """Makes ``packed`` the weight ``key`` of a packed module."""
    for field, tensor in packed.tensors().items():
        module.register_parameter(state_key(key, field), nn.Parameter(tensor, requires_grad=False))


def unpack_modules(model: nn.Module, dtype: torch.dtype) -> None:
    """Replaces every packed module by the float one that it stands for, in ``dtype``, one by one."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantConv1D):
            replace_module(model, module, module.to_conv1d(dtype))
        elif isinstance(module, PACKED_MODULES):
            replace_module(model, model.get_submodule(name), to_float(module, dtype))
