"""QuantLinear: torch.nn.Linear with a packed weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from lowbit_rs._backends import linear_call
from lowbit_rs._ops import THRESHOLD, borrow, check_activation, check_threshold
from lowbit_rs.errors import invalid, unsupported
from lowbit_rs.functional import CodebookLike, packed_linear, quantize
from lowbit_rs.nn._base import PackedModule, empty_packed
from lowbit_rs.packed import BlockSize, PackedWeight, describe, dtype_name

if TYPE_CHECKING:
    from lowbit_rs.nn.fusion import FusedGroup


class QuantLinear(PackedModule, nn.Linear):
    """``y = x @ W.T + bias`` with W [out_features, in_features] stored in 4 or 8 bits and never wholly decoded.

    Takes x [..., in_features] in float32, float16 or bfloat16 and gives [..., out_features] in the same dtype; with
    ``compute_dtype``, x is rounded to that dtype first, with ``activation`` "int8" or "auto" to 8 bits where that is
    faster, but for columns of outliers, which reach ``threshold`` (see :func:`lowbit_rs.linear`). Sums are fp32 in
    any case. Gradients flow to x, and to the bias
    if it is made to require one; the weight is frozen.

    The constructor makes a layer of zero weights, to be loaded; a float ``weight`` in a state_dict is quantized on the
    way in. :meth:`from_linear` packs an existing layer. Options are those of :func:`lowbit_rs.quantize`; ``dtype`` is
    that of the bias and of :meth:`dequantize`. ``permuted`` makes room for a permutation of the columns, as weights
    from elsewhere may have one (PackedWeight): each call then copies x once, in that order.
    """

    compute_dtype: torch.dtype | None
    activation: str
    threshold: float | None
    #: The layers that this one is multiplied with in one go, if any, and its place among them: see fuse_model.
    fused_group: FusedGroup | None = None
    fused_place: int = 0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        format: str = "nf4",
        block_size: BlockSize = 64,
        double_quant: bool = False,
        codebook: CodebookLike | None = None,
        compute_dtype: torch.dtype | None = None,
        activation: str = "none",
        threshold: float | None = THRESHOLD,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        scale_dtype: torch.dtype | None = None,
        block_order: str = "row",
        signed_absmax: bool = False,
        permuted: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        shape = [_size("out_features", out_features), _size("in_features", in_features)]
        packed = empty_packed(
            shape,
            format,
            block_size,
            double_quant,
            codebook,
            scale_dtype,
            block_order,
            signed_absmax,
            dtype,
            device,
            permuted,
        )
        addend = torch.zeros(out_features, dtype=packed.dtype, device=packed.device) if bias else None
        self._fill(packed, addend, compute_dtype, activation, threshold)

    def _fill(
        self,
        packed: PackedWeight,
        bias: Tensor | None,
        compute_dtype: torch.dtype | None,
        activation: str,
        threshold: float | None,
    ) -> None:
        if compute_dtype is not None:
            dtype_name(compute_dtype, "compute_dtype")
        check_activation(activation)
        check_threshold(threshold)
        self.out_features, self.in_features = packed.shape
        self.compute_dtype = compute_dtype
        self.activation = activation
        self.threshold = threshold
        self._hold(packed)
        self._call = linear_call(self._operand_keys)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        format: str = "nf4",
        block_size: BlockSize = 64,
        double_quant: bool = False,
        codebook: CodebookLike | None = None,
        nonfinite: str = "error",
        *,
        compute_dtype: torch.dtype | None = None,
        activation: str = "none",
        threshold: float | None = THRESHOLD,
        scale_dtype: torch.dtype | None = None,
        block_order: str = "row",
        signed_absmax: bool = False,
    ) -> QuantLinear:
        """A layer with the weight of ``linear``, packed, and a copy of its bias. Options as in lowbit_rs.quantize.

        Raises InvalidArgument for what is no nn.Linear, for a weight without values (meta device), and as quantize.
        """
        if not isinstance(linear, nn.Linear) or isinstance(linear, QuantLinear):
            raise invalid("linear", type(linear).__name__, "a torch.nn.Linear")
        packed = quantize(
            linear.weight,
            format,
            block_size,
            double_quant,
            codebook,
            nonfinite,
            scale_dtype=scale_dtype,
            block_order=block_order,
            signed_absmax=signed_absmax,
        )
        bias = None if linear.bias is None else linear.bias.detach().clone()
        layer = cls.from_packed(packed, bias, compute_dtype=compute_dtype, activation=activation, threshold=threshold)
        return layer.train(linear.training)

    @classmethod
    def from_packed(
        cls,
        packed: PackedWeight,
        bias: Tensor | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
        activation: str = "none",
        threshold: float | None = THRESHOLD,
    ) -> QuantLinear:
        """A layer whose parameters share the tensors of ``packed`` [N, K] and ``bias`` [N]."""
        if len(packed.shape) != 2:
            raise unsupported(f"packed: shape {list(packed.shape)}", "a layer holds one matrix, so index a stack first")
        if bias is not None and tuple(bias.shape) != (packed.shape[0],):
            raise invalid("bias", f"shape {list(bias.shape)}", f"[{packed.shape[0]}]")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._fill(packed, None if bias is None else bias.detach(), compute_dtype, activation, threshold)
        return layer

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A torch.nn.Linear with the dequantized weight and a copy of the bias, in ``dtype`` or that of the layer."""
        weight = self.dequantize(dtype)
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(weight.dtype, copy=True))
        return linear.train(self.training)

    def reset_parameters(self) -> None:
        """Sets the weight and the bias to zero: a packed layer is there to be loaded, not to be trained from noise."""
        super().reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """``input @ W.T + bias`` for input [..., in_features]."""
        if not is_compiling():
            if self.fused_group is not None:
                part = self.fused_group.part(self.fused_place, self, input)
                if part is not None:
                    return part
            result = self._call.run(self, self.__dict__, input)
            if result is not None:
                return result
        bias, permutation = self._parameters["bias"], self._parameters["weight_permutation"]
        how = self.compute_dtype, permutation, (self.activation, self.threshold or 0.0)
        return packed_linear(input, self._tensors(), self._shape, self._scheme, bias, *how)

    def _view(self) -> Any:
        """A view of the weight, as the backend of its device makes it."""
        return borrow(self._tensors(), self._shape, self._scheme)[1]

    def rejoin(self) -> None:
        """Puts the weight beside those that it is multiplied with, where it has been moved or replaced."""
        if self.fused_group is not None:
            self.fused_group.join()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.rejoin()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any], strict: bool, *lists: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        self.rejoin()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As in torch; and a copy of a fused layer enters the copy of its group."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.fused_group is not None:
            self.fused_group.enter(self.fused_place, self)

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        compute = "" if self.compute_dtype is None else f", compute_dtype={self.compute_dtype}"
        permuted = "" if self.weight_permutation is None else ", permuted"
        fused = "" if self.fused_group is None else ", fused"
        return f"{nn.Linear.extra_repr(self)}, {describe(self.spec)}{permuted}{compute}{self._rounding()}{fused}"

    def _rounding(self) -> str:
        """How activations are rounded, in words."""
        if self.activation == "none":
            return ""
        by_rows = self.spec.format == "int8" and self.spec.block_size == "row"
        threshold = f", threshold={self.threshold}" if by_rows else ""
        choice = f" ({self._choice()})" if self.activation == "auto" else ""
        return f", activation={self.activation}{choice}{threshold}"

    def _choice(self) -> str:
        """What "auto" chooses for activations in the dtype of the layer, on its device."""
        if self.weight.is_meta:
            return "by device"
        backend, view = borrow(self._tensors(), self._shape, self._scheme)
        tokens = backend.rounded_from(view, self.activation, self.compute_dtype or self.dtype)
        return "floats" if tokens is None else f"int8 from {tokens} tokens"


def _size(argument: str, value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise invalid(argument, repr(value), "a non-negative integer")
    return value
