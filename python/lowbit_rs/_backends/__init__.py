"""The devices on which packed weights are made and used.

A backend turns tensors into pointers and calls the native kernels. It takes tensors of its own device, checks what
memory safety asks for, and returns new tensors; shapes of arguments that belong together are checked by its callers.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lowbit_rs._backends import cpu, cuda
from lowbit_rs._native import LinearCall, Spec, has_cuda_kernels
from lowbit_rs.errors import unsupported

#: A device's view of a weight.
View = TypeVar("View")


class SharedRows(Protocol):
    """Activations that were rounded once for several products."""

    def linear(self, weight: Any, bias: Tensor | None) -> Tensor:
        """``Backend.linear`` with a weight that takes them: one from whose ``rounded_from`` on x has tokens."""


class Backend(Protocol[View]):
    """What a device offers."""

    #: Tokens up to which a product of weights that are joined pays.
    MAX_JOINED_TOKENS: int

    def view(self, spec: Spec, shape: Sequence[int], tensors: Sequence[Tensor]) -> View:
        """Borrowed pointers to the tensors of a weight, in the order of its fields; the caller keeps them alive."""

    def joined_view(self, spec: Spec, shape: Sequence[int], parts: Sequence[Mapping[str, Tensor]]) -> View | None:
        """The view of a weight [N, K] whose rows lie in ``parts``, one behind the other; None if they do not.

        A part is the tensors of a weight by field, packed as ``spec`` says.
        """

    def quantize(self, source: Tensor, codebook: Tensor | None, spec: Spec, nonfinite: str) -> list[Tensor]:
        """The tensors of ``source`` [N, K] or [experts, N, K] (any strides) under ``spec``, in the order of fields."""

    def dequantize(self, weight: View, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The whole weight."""

    def embedding(self, weight: View, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the weight: [*indices.shape, K]."""

    def linear(self, weight: View, x: Tensor, bias: Tensor | None, activation: str, threshold: float) -> Tensor:
        """x [..., K] times the transposed weight, plus bias [N]: [..., N] in the dtype of x.

        ``activation`` is "none", or "int8" or "auto" where x may be rounded to 8 bits, but for columns with a
        magnitude of ``threshold`` or more, if that is not 0.
        """

    def rounded_from(self, weight: View, activation: str, dtype: torch.dtype) -> int | None:
        """From how many tokens on ``linear`` rounds x in ``dtype`` to 8 bits; None if never."""

    def shared_rows(self, x: Tensor, threshold: float, rows: Any) -> SharedRows | None:
        """x [..., K] as ``linear`` rounds it, for several weights; None where each product rounds by itself.

        ``rows`` is what ``norm_rounded`` made of x with this threshold, or None.
        """

    def linear_grouped(self, weight: View, experts: int, x: Tensor, counts: Tensor) -> Tensor | None:
        """Rows x [S, K], sorted by matrix of a stack of ``experts``, times their matrix: [S, N]; None without a kernel.

        ``counts`` says how many rows each matrix gets; those beyond become zero.
        """

    def linear_grad_input(self, weight: View, grad: Tensor) -> Tensor:
        """grad [..., N] times the weight: [..., K] in the dtype of grad."""

    def queue(self, device: torch.device) -> Hashable:
        """Where work for ``device`` goes just now: results of one queue are not there for another without waiting."""

    def may_wait(self) -> bool:
        """Whether values may be read back just now."""

    def norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, kind: Sequence[Any]
    ) -> tuple[Tensor, Tensor | None]:
        """The rows of x [..., K], or of x + residual, normalized as ``kind`` (a NormKind) says, and that sum."""

    def norm_rounded(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        kind: Sequence[Any],
        threshold: float,
    ) -> tuple[Tensor, Tensor | None, Any] | None:
        """``norm``, and its result as ``shared_rows`` rounds it; None where that is not to be had."""


def backend_of(device: torch.device) -> Backend[Any]:
    """The backend of ``device``; raises Unsupported where this build has none.

    That a GPU and its driver are there shows when the backend is first used, by a CudaError where they are not.
    """
    if device.type == "cpu":
        return cpu
    if device.type == "cuda" and has_cuda_kernels():
        return cuda
    kind = "CUDA" if device.type == "cuda" else device.type
    raise unsupported(f"device {device}", f"this build has no {kind} kernels; move the tensors to the CPU with .cpu()")


def linear_call(keys: Sequence[str]) -> LinearCall:
    """The quick way of a product, on every device, for a weight whose tensors have these keys in a dict."""
    return LinearCall(list(keys), cuda.MAY_OVERLAP)
