"""bitsandbytes' linear layers, made of a weight [N, K] and ready for inference on the CPU or a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class MissingError(Exception):
    """Something to compare with that cannot run here; the message says why."""


def bitsandbytes() -> Any:
    """The module, without its warnings at every call. Raises MissingError where it is not installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError as error:
        raise MissingError('bitsandbytes is not installed: pip install "lowbit-rs[bench]"') from error
    return bitsandbytes


def four_bit(
    weight: Tensor,
    quant_type: str,
    double_quant: bool = False,
    compute_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> nn.Module:
    """Linear4bit with block size 64, computing in ``compute_dtype``, by default that of ``weight``.

    In evaluation mode, which its fused CPU kernel asks for.
    """
    parts = bitsandbytes().nn
    layer = parts.Linear4bit(
        weight.shape[1],
        weight.shape[0],
        bias=False,
        compute_dtype=compute_dtype or weight.dtype,
        compress_statistics=double_quant,
        quant_type=quant_type,
        device="meta",
    )
    options = {"compress_statistics": double_quant, "quant_type": quant_type}
    layer.weight = parts.Params4bit(weight.detach().to("cpu"), requires_grad=False, **options)
    return layer.to(device).eval()  # type: ignore[no-any-return]  # moving a layer to its device quantizes it


def eight_bit(weight: Tensor, threshold: float, device: str = "cpu") -> nn.Module:
    """Linear8bitLt; columns of x with a value of ``threshold`` or more are multiplied in 16 bits, with 0 none is."""
    parts = bitsandbytes().nn
    layer = parts.Linear8bitLt(
        weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False, threshold=threshold, device="meta"
    )
    layer.weight = parts.Int8Params(weight.detach().to("cpu"), requires_grad=False, has_fp16_weights=False)
    return layer.to(device).eval()  # type: ignore[no-any-return]  # moving a layer to its device quantizes it


def replace_layers(model: nn.Module, make: Callable[[Tensor], nn.Module]) -> None:
    """Puts what ``make`` gives for a weight in the place of every linear layer but the last."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    for name in names:
        parent, _, child = name.rpartition(".")
        layer: Any = model.get_submodule(name)
        setattr(model.get_submodule(parent), child, make(layer.weight.data))


def path_taken(layer: Any) -> str:
    """Which CPU implementation a layer has taken: the fused one works on a weight that the first call repacks."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return "int8"
    repacked = getattr(state, "packing_format_for_cpu", False)
    return "fused AVX512-BF16" if repacked else "dequantize, then F.linear"


def stored_parts(layer: Any) -> list[Tensor]:
    """The tensors that store a layer's weight: the codes, which are a parameter, then the scales, which are none."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        first_call_done = layer.weight.SCB is None  # it moves the scales
        return [layer.weight.data, layer.state.SCB if first_call_done else layer.weight.SCB]
    nested = [state.state2.absmax, state.offset] if state.nested else []
    return [layer.weight.data, state.absmax, *nested]
