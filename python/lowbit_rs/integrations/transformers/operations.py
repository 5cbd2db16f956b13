"""The step of transformers' weight loading that packs: what converters of checkpoints call an operation.

Apart from the quantizer because ``core_model_loading`` is being imported itself when that is registered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps

if TYPE_CHECKING:
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
