"""RMSNorm and LayerNorm in one pass over memory, with the addition of a residual in the same pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from lowbit_rs._backends import backend_of
from lowbit_rs._norm_ops import NormKind, check_norm
from lowbit_rs.errors import invalid
from lowbit_rs.functional import is_unwatched
from lowbit_rs.nn.rounded_rows import Wish, note_origin

#: What torch adds where RMSNorm has eps=None, for every dtype that is computed in fp32.
_DEFAULT_EPS = torch.finfo(torch.float32).eps


def normalize(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, kind: NormKind
) -> tuple[Tensor, Tensor | None]:
    """The rows of x [..., K], or of ``x + residual``, normalized as ``kind`` says, and that sum where there is one.

    All are of one dtype: float32, float16 or bfloat16, with sums in fp32. ``weight`` and ``bias`` [K] may have another
    of these. Raises InvalidArgument for shapes, dtypes and devices that do not go together.
    """
    if not torch.compiler.is_compiling() and _is_unwatched(x, residual, weight, bias):
        check_norm(x, residual, weight, bias)
        return backend_of(x.device).norm(x, residual, weight, bias, kind)
    if residual is None:
        return torch.ops.lowbit_rs.norm.default(x, weight, bias, *kind), None
    y, total = torch.ops.lowbit_rs.norm_residual.default(x, residual, weight, bias, *kind)
    return y, total


def _is_unwatched(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> bool:
    return is_unwatched(x, weight) and is_unwatched(x if residual is None else residual, bias)


class _Norm(nn.Module):
    """What both norms have in common: how their forward runs. Torch's classes beside it bring the parameters."""

    normalized_shape: tuple[int, ...]
    eps: Any  # float | None; torch's two classes differ in whether these are optional
    weight: Any  # Tensor | None
    unit_offset = False
    cast_before_weight = False
    #: What the layers behind asked for with their last products.
    wish: Wish | None = None
    #: Whether autocast on CUDA makes x float32, as it does with torch's modules of these names.
    casts_under_autocast: bool

    @property
    def kind(self) -> NormKind:
        """What the kernels are told."""
        eps = _DEFAULT_EPS if self.eps is None else self.eps
        return NormKind(eps, isinstance(self, nn.LayerNorm), self.unit_offset, self.cast_before_weight)

    @overload
    def forward(self, x: Tensor) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The normalized rows of ``x``; with ``residual``, those of ``x + residual``, and that sum beside them."""
        if self.casts_under_autocast and x.is_cuda and torch.is_autocast_enabled("cuda"):
            x, residual = x.float(), None if residual is None else residual.float()
        shape, dims = x.shape, len(self.normalized_shape)
        weight, bias = self.weight, getattr(self, "bias", None)
        if (dims != 1 or weight is None) and tuple(shape[-dims:]) != tuple(self.normalized_shape):
            raise invalid("x", f"shape {list(shape)}", f"[..., {', '.join(map(str, self.normalized_shape))}]")
        if dims != 1:
            rows = (*shape[:-dims], math.prod(self.normalized_shape))
            x, residual = x.reshape(rows), None if residual is None else residual.reshape(rows)
            weight, bias = (None if part is None else part.flatten() for part in (weight, bias))
        y, total = self._rounded(x, residual, weight, bias) or self._normalized(x, residual, weight, bias)
        if dims != 1:
            y, total = y.view(shape), None if total is None else total.view(shape)
        return y if total is None else (y, total)

    def _rounded(
        self, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None] | None:
        """``_normalized``, with a note for layers behind it that round the result; None where it is as good without."""
        if torch.compiler.is_compiling() or x.dim() == 0 or not _is_unwatched(x, residual, weight, bias):
            return None
        backend, wish = backend_of(x.device), self.wish
        if x.numel() <= backend.MAX_JOINED_TOKENS * x.shape[-1] or self._multiplies_apart(x, weight):
            return None
        check_norm(x, residual, weight, bias)
        if wish is None or x.numel() < wish.least_tokens * x.shape[-1]:
            y, total = backend.norm(x, residual, weight, bias, self.kind)
            note_origin(y, self, None, None)
            return y, total
        self.wish = None
        made = backend.norm_rounded(x, residual, weight, bias, self.kind, wish.threshold)
        if made is None:
            return None
        y, total, rows = made
        note_origin(y, self, wish.threshold, rows)
        return y, total

    def _multiplies_apart(self, x: Tensor, weight: Tensor | None) -> bool:
        """Whether the product with the weight is torch's own, with its promotion of dtypes: Llama's beside float32."""
        return weight is not None and self.cast_before_weight and weight.dtype != x.dtype

    def _normalized(
        self, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if weight is not None and self._multiplies_apart(x, weight):
            y, total = normalize(x, residual, None, None, self.kind)
            return weight * y, total
        return normalize(x, residual, weight, bias, self.kind)

    def reset_parameters(self) -> None:
        """Sets factors to one and addends to zero."""
        super().reset_parameters()  # type: ignore[misc]  # of torch's class beside this one
        if self.unit_offset and self.weight is not None:
            nn.init.zeros_(self.weight)

    def extra_repr(self) -> str:
        """As torch has it, and the options that it lacks."""
        options = [name for name in ("unit_offset", "cast_before_weight") if getattr(self, name)]
        return ", ".join([super().extra_repr(), *(f"{name}=True" for name in options)])


def _size(shape: int | Sequence[int]) -> torch.Size:
    return torch.Size([shape] if isinstance(shape, int) else shape)


class RMSNorm(_Norm, nn.RMSNorm):
    """``torch.nn.RMSNorm`` in one pass over memory: ``x / sqrt(mean(x^2) + eps) * weight``.

    ``forward(x)`` takes float32, float16 or bfloat16 [..., K] and gives the same dtype; sums are fp32, with one
    rounding at the end. ``forward(x, residual)`` gives the normalized ``x + residual``, and that sum. Both are
    differentiable.

    - ``normalized_shape``, ``eps``, ``elementwise_affine``, ``device``, ``dtype``: as in torch; ``eps=None`` is that of
      float32;
    - ``unit_offset``: the factor is ``1 + weight``, and the weight starts at zero (Gemma);
    - ``cast_before_weight``: the normalized x is rounded to its dtype before it is multiplied by the weight, in the
      dtype that torch promotes the two to (Llama, Qwen, Mistral).

    Raises InvalidArgument for other dtypes, and for shapes and devices that do not go together.
    """

    casts_under_autocast = torch._C._dispatch_has_kernel_for_dispatch_key("aten::rms_norm", "AutocastCUDA")

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        unit_offset: bool = False,
        cast_before_weight: bool = False,
    ) -> None:
        self.__dict__.update(
            unit_offset=unit_offset, cast_before_weight=cast_before_weight
        )  # before parameters are set
        super().__init__(_size(normalized_shape), eps, elementwise_affine, device, dtype)


class LayerNorm(_Norm, nn.LayerNorm):
    """``torch.nn.LayerNorm`` in one pass: ``(x - mean) / sqrt(var + eps) * weight + bias``, var being the biased one.

    ``forward(x)``, ``forward(x, residual)``, ``unit_offset`` and errors are as in :class:`RMSNorm`, the other arguments
    as in torch.
    """

    casts_under_autocast = True

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        unit_offset: bool = False,
    ) -> None:
        self.__dict__.update(unit_offset=unit_offset)  # before parameters are set
        super().__init__(_size(normalized_shape), eps, elementwise_affine, bias, device, dtype)


def from_parts(kind: NormKind, weight: nn.Parameter, bias: nn.Parameter | None, shape: Any = None) -> _Norm:
    """The module of ``kind`` that holds these parameters themselves; ``shape`` is that of a row if it is not theirs."""
    shape = weight.shape if shape is None else shape
    new: _Norm
    if kind.centered:
        new = LayerNorm(shape, kind.eps, bias=bias is not None, device="meta", unit_offset=kind.unit_offset)
        new.register_parameter("bias", bias)
    else:
        options: dict[str, Any] = {"unit_offset": kind.unit_offset, "cast_before_weight": kind.cast_before_weight}
        new = RMSNorm(shape, kind.eps, device="meta", **options)
    new.register_parameter("weight", weight)
    return new
