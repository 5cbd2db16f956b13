"""Steps of transformers' weight loading, which converters of checkpoints call operations: packing, and stacking.

Apart from the quantizer because ``core_model_loading`` is being imported itself when that is registered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from lowbit_rs.packed import FIELDS, PackedWeight, field_dtypes, stacked, state_key

if TYPE_CHECKING:
    from lowbit_rs.files.metadata import QuantizedTensor
    from lowbit_rs.integrations.transformers.quantizer import LowbitQuantizer


class PackWeights(ConversionOps):
    """Float weights, by their full names, become the parameters of packed ones; everything else passes."""

    def __init__(self, quantizer: LowbitQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],  # noqa: ARG002
        target_patterns: list[str],  # noqa: ARG002
        **kwargs: Any,
    ) -> dict[str, list[Tensor]]:
        """The packed parameters of the tensors in ``input_dict``, each alone or in a list of one."""
        model = kwargs["model"]
        converted: dict[str, list[Tensor]] = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if self.quantizer.param_needs_quantization(model, name):
                converted |= {path: [part] for path, part in self.quantizer.pack(model, name, tensor).items()}
            else:
                converted[name] = [tensor]
        return converted


#: What the matrices of a stack may have, the longest names first: transformers 5.17 takes the first one
#: that a key begins with.
_PARTS = sorted((field for field in FIELDS if field != "permutation"), key=lambda field: -len(state_key("", field)))


class StackWeights(ConversionOps):
    """Packed matrices become one packed weight, as a converter of transformers makes one of float matrices."""

    def __init__(self, quantizer: LowbitQuantizer, converter: WeightConverter) -> None:
        self.hf_quantizer = quantizer  # the name by which transformers knows not to cast what it reads
        self.converter = converter

    def __deepcopy__(self, memo: dict[int, Any]) -> StackWeights:
        return self  # a converter is copied for every stack, and this has nothing of one

    @classmethod
    def within(cls, quantizer: LowbitQuantizer, converter: WeightConverter) -> WeightConverter:
        """The converter, collecting all parts of packed matrices."""
        sources = [state_key(source, part) for source in converter._original_source_patterns for part in _PARTS]
        targets = list(converter._original_target_patterns)
        new = WeightConverter(sources, targets, [cls(quantizer, converter)], force_cpu=converter.force_cpu)
        new.scope_prefix, new.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
        return new

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, list[Tensor]]:
        """The parts of the stack that ``full_layer_name`` is; where the file has floats, what the converter makes."""
        stack = self.hf_quantizer.stacks.get(kwargs["full_layer_name"])
        if stack is None:
            result = input_dict
            for operation in self.converter.operations:
                result = operation.convert(result, self.converter.source_patterns, target_patterns, **kwargs)
            return result
        piece, whole = stack
        sources = [source_patterns[at : at + len(_PARTS)] for at in range(0, len(source_patterns), len(_PARTS))]
        count = len(input_dict[sources[0][_PARTS.index("data")]])
        matrices = [_matrix(piece, input_dict, source, index) for index in range(count) for source in sources]
        parts = stacked(matrices, whole.shape).tensors()
        return {state_key(target_patterns[0], field): [part] for field, part in parts.items()}


def _matrix(piece: QuantizedTensor, tensors: dict[str, list[Tensor]], names: list[str], index: int) -> PackedWeight:
    """Matrix ``index`` of those that one source of a converter stands for."""
    wanted = field_dtypes(piece.spec)
    parts = {part: tensors[name][index] for part, name in zip(_PARTS, names, strict=True) if part in wanted}
    rows = parts["data"].shape[0]
    return PackedWeight.from_tensors(piece.spec, torch.Size([rows, piece.shape[-1]]), piece.dtype, parts)
