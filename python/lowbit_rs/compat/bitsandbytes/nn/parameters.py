"""Params4bit and Int8Params: parameters that are quantized when they are moved to a device."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_rs.compat.bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit
from lowbit_rs.compat.bitsandbytes.state import QuantState


def _target(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.device | None, bool]:
    """Device and non_blocking of the arguments of ``Tensor.to``."""
    device, _dtype, non_blocking, _format = torch._C._nn._parse_to(*args, **kwargs)
    return device, non_blocking


def _rebuild(
    kind: type[_DevicelyQuantized], data: Tensor, requires_grad: bool, attributes: dict[str, Any]
) -> _DevicelyQuantized:
    parameter = kind(data, requires_grad)
    parameter.__dict__.update(attributes)
    return parameter


class _DevicelyQuantized(nn.Parameter):
    """What both have in common: copies and pickles keep attributes; codes never change their dtype."""

    @property
    def is_packed(self) -> bool:
        """Whether the data is codes by now."""
        raise NotImplementedError

    def _quantize(self, device: torch.device) -> Any:
        raise NotImplementedError

    def _moved(self, device: torch.device | None, non_blocking: bool) -> Any:
        """A parameter with the codes, and all that belongs to them, on a device."""
        raise NotImplementedError

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As Tensor.to; the first move to a device, the present one included, quantizes in place."""
        device, non_blocking = _target(args, kwargs)
        if self.is_packed:
            return self._moved(device, non_blocking)
        if device is None or device.type == "meta":
            return _rebuild(type(self), self.data.to(*args, **kwargs), self.requires_grad, dict(self.__dict__))
        return self._quantize(device)

    def cpu(self) -> Any:  # type: ignore[override]
        """``to("cpu")``."""
        return self.to("cpu")

    def cuda(self, device: int | torch.device | str | None = None, non_blocking: bool = False) -> Any:  # type: ignore[override]
        """``to("cuda")``."""
        return self.to("cuda" if device is None else device, non_blocking=non_blocking)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        attributes = copy.deepcopy(dict(self.__dict__), memo)
        copied = _rebuild(type(self), self.data.clone(), self.requires_grad, attributes)
        memo[id(self)] = copied
        return copied

    def __copy__(self) -> Any:
        return _rebuild(type(self), self.data, self.requires_grad, dict(self.__dict__))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self), self.data, self.requires_grad, dict(self.__dict__))


class Params4bit(_DevicelyQuantized):
    """A weight in NF4 or FP4: floats until it is moved to a device, then codes [ceil(n / 2), 1] and their state."""

    quant_state: QuantState | None
    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_storage: torch.dtype
    bnb_quantized: bool

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: nn.Module | None = None,  # noqa: ARG004  # layers here look at their weight
        bnb_quantized: bool = False,
        **kwargs: Any,  # noqa: ARG004  # as there: what accelerate passes
    ) -> Params4bit:
        """The parameter with these options."""
        data = torch.empty(0) if data is None else data
        self: Params4bit = torch.Tensor._make_subclass(cls, data, requires_grad)
        self.quant_state = quant_state
        self.blocksize = 64 if blocksize is None else blocksize
        self.compress_statistics = bool(compress_statistics)
        self.quant_type = quant_type
        self.quant_storage = quant_storage
        self.bnb_quantized = bnb_quantized
        return self

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: dict[str, Any],
        requires_grad: bool = False,
        device: torch.device | str | int = "cuda",
        module: nn.Module | None = None,  # noqa: ARG003
        **kwargs: Any,  # noqa: ARG003
    ) -> Params4bit:
        """A quantized parameter of codes and the entries of a checkpoint that belong to them."""
        target = torch.device(device)
        state = QuantState.from_dict(dict(quantized_stats), target)
        return cls(
            data.to(target),
            requires_grad,
            state,
            state.blocksize,
            state.nested,
            state.quant_type or "fp4",
            data.dtype,
            bnb_quantized=True,
        )

    @property
    def is_packed(self) -> bool:
        """Whether the data is codes by now."""
        return self.bnb_quantized

    def _quantize(self, device: torch.device) -> Params4bit:
        self.data, self.quant_state = quantize_4bit(
            self.data.to(device),
            blocksize=self.blocksize,
            compress_statistics=self.compress_statistics,
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        self.bnb_quantized = True
        return self

    def _moved(self, device: torch.device | None, non_blocking: bool) -> Params4bit:
        if self.quant_state is not None:
            self.quant_state.to(device)  # in place, since Module.to keeps this parameter and takes the data alone
        data = self.data if device is None else self.data.to(device, non_blocking=non_blocking)
        moved: Params4bit = _rebuild(type(self), data, self.requires_grad, dict(self.__dict__))  # type: ignore[assignment]
        return moved


class Int8Params(_DevicelyQuantized):
    """A weight in 8 bits by row: floats until it is moved to a device, then int8 codes with maxima ``SCB``."""

    SCB: Tensor | None
    has_fp16_weights: bool

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = True,
        has_fp16_weights: bool = False,
        CB: Tensor | None = None,  # noqa: ARG004  # the data itself
        SCB: Tensor | None = None,
        **kwargs: Any,  # noqa: ARG004  # as there: what accelerate passes
    ) -> Int8Params:
        """The parameter with these options."""
        data = torch.empty(0) if data is None else data
        self: Int8Params = torch.Tensor._make_subclass(cls, data, requires_grad and data.is_floating_point())
        self.SCB = SCB
        self.has_fp16_weights = has_fp16_weights
        return self

    @property
    def is_packed(self) -> bool:
        """Whether the data is codes by now."""
        return self.data.dtype == torch.int8

    @property
    def CB(self) -> Tensor | None:  # noqa: N802  # bitsandbytes' name
        """The codes, int8 [N, K], once there are any."""
        return self.data if self.is_packed else None

    def _quantize(self, device: torch.device) -> Int8Params:
        # In float16, as bitsandbytes does.
        self.requires_grad = False
        self.data, self.SCB, _ = int8_vectorwise_quant(self.data.to(device, torch.float16))
        return self

    def _moved(self, device: torch.device | None, non_blocking: bool) -> Int8Params:
        if device is not None and self.SCB is not None:
            self.SCB = self.SCB.to(device)  # in place, since Module.to keeps this parameter and takes the data alone
        data = self.data if device is None else self.data.to(device, non_blocking=non_blocking)
        moved: Int8Params = _rebuild(type(self), data, self.requires_grad, dict(self.__dict__))  # type: ignore[assignment]
        return moved
