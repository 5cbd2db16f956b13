"""How the tensors of a checkpoint are quantized: the options of ``lowbit_rs.quantize``, and codebooks made for them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from lowbit_rs import codebooks
from lowbit_rs.errors import invalid
from lowbit_rs.functional import as_codebook, make_scheme, quantize, resolve_format
from lowbit_rs.packed import dtype_name, make_spec

from .metadata import QuantizedTensor
from .safetensors_format import torch_dtype

if TYPE_CHECKING:
    from lowbit_rs._native import Spec
    from lowbit_rs.functional import CodebookLike
    from lowbit_rs.packed import BlockSize, PackedWeight

    from .safetensors_format import TensorInfo

BLOCK_OPTIMAL = "block-optimal"
FIT = "fit"
_FIT_WEIGHTS = 1 << 20
"""Weights of a tensor that its codebook is fitted to: more change the third digit of the error and cost seconds."""


@dataclass(frozen=True)
class Recipe:
    """The options of ``lowbit_rs.files.quantize_file`` that say how a tensor is quantized; checked when made."""

    format: str
    block_size: BlockSize
    double_quant: bool
    codebook: str | CodebookLike | None
    nonfinite: str
    scale_dtype: torch.dtype | None
    signed_absmax: bool
    block_order: str = "row"

    def __post_init__(self) -> None:
        if isinstance(self.codebook, str) and self.codebook not in (BLOCK_OPTIMAL, FIT):
            raise invalid("codebook", repr(self.codebook), f'"{BLOCK_OPTIMAL}", "{FIT}" or 2 to 16 values')
        if self.codebook == BLOCK_OPTIMAL and self.block_size == "row":
            raise invalid(
                "codebook", f'"{BLOCK_OPTIMAL}" with block_size="row"', f'a block size in weights, or "{FIT}"'
            )
        if self.nonfinite not in ("error", "propagate"):
            raise invalid("nonfinite", repr(self.nonfinite), '"error" or "propagate"')
        _ = self.spec, self.table

    @cached_property
    def spec(self) -> Spec:
        """The format that every quantized tensor gets."""
        format = resolve_format(self.format, self.codebook)
        scheme = make_scheme(format, self.block_size, self.block_order, self.double_quant)
        scale_dtype = "float32" if self.scale_dtype is None else dtype_name(self.scale_dtype, "scale_dtype")
        return make_spec(scheme, scale_dtype, self.signed_absmax)

    @cached_property
    def table(self) -> torch.Tensor | None:
        """The codebook that all tensors share; ``None`` for built-in formats and where each tensor has its own."""
        if self.codebook is None or self.codebook == FIT:
            return None
        if self.codebook == BLOCK_OPTIMAL:
            return as_codebook(codebooks.block_optimal(int(self.block_size), signed=self.signed_absmax))
        assert not isinstance(self.codebook, str)
        return as_codebook(self.codebook)

    @property
    def codebook_length(self) -> int | None:
        """Number of values in the table of a custom format, ``None`` for the others."""
        if self.spec.format != "custom":
            return None
        return 1 << self.spec.bits if self.table is None else self.table.numel()

    def describe(self, tensor: TensorInfo) -> QuantizedTensor:
        """What the tensor will be, known before its data is read."""
        shape, dtype = torch.Size(tensor.shape), torch_dtype(tensor.dtype)
        return QuantizedTensor(tensor.name, self.spec, shape, dtype, self.codebook_length)

    def pack(self, tensor: torch.Tensor) -> PackedWeight:
        """The tensor, quantized."""
        table = self._fit(tensor) if self.codebook == FIT else self.table
        return quantize(
            tensor,
            self.spec.format,
            self.block_size,
            self.double_quant,
            table,
            self.nonfinite,
            scale_dtype=self.scale_dtype,
            block_order=self.block_order,
            signed_absmax=self.signed_absmax,
        )

    def _fit(self, tensor: torch.Tensor) -> torch.Tensor:
        """The codebook that is best for rows taken evenly from the tensor, blocks and all."""
        rows = tensor.reshape(-1, tensor.shape[-1])
        rows = rows[:: max(1, rows.numel() // _FIT_WEIGHTS)].float()
        if self.nonfinite == "propagate":
            rows = rows[rows.isfinite().all(dim=1)]
        return as_codebook(codebooks.fit(rows, block_size=self.block_size, signed=self.signed_absmax))
