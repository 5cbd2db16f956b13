"""QuantEmbedding: torch.nn.Embedding with a packed table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit_rs.errors import invalid, unsupported
from lowbit_rs.functional import CodebookLike, packed_embedding, quantize
from lowbit_rs.nn._base import PackedModule, empty_packed
from lowbit_rs.packed import BlockSize, PackedWeight, describe


class QuantEmbedding(PackedModule, nn.Embedding):
    """A lookup table [num_embeddings, embedding_dim] stored in 4 or 8 bits; only the rows looked up are decoded.

    Takes int64 or int32 indices of any shape and gives [*indices.shape, embedding_dim] in ``dtype``. The table is
    frozen. ``max_norm`` of nn.Embedding, which rewrites rows as it reads them, is not supported. Options are those of
    :func:`lowbit_rs.quantize`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        format: str = "nf4",
        block_size: BlockSize = 64,
        double_quant: bool = False,
        codebook: CodebookLike | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        scale_dtype: torch.dtype | None = None,
        block_order: str = "row",
        signed_absmax: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        packed = empty_packed(
            [num_embeddings, embedding_dim],
            format,
            block_size,
            double_quant,
            codebook,
            scale_dtype,
            block_order,
            signed_absmax,
            dtype,
            device,
        )
        self._fill(packed, padding_idx)

    def _fill(self, packed: PackedWeight, padding_idx: int | None) -> None:
        self.num_embeddings, self.embedding_dim = packed.shape
        if padding_idx is not None and not -self.num_embeddings <= padding_idx < self.num_embeddings:
            raise invalid("padding_idx", padding_idx, f"a row of {self.num_embeddings}")
        self.padding_idx = padding_idx if padding_idx is None else padding_idx % self.num_embeddings
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self._hold(packed)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        format: str = "nf4",
        block_size: BlockSize = 64,
        double_quant: bool = False,
        codebook: CodebookLike | None = None,
        nonfinite: str = "error",
        *,
        scale_dtype: torch.dtype | None = None,
        block_order: str = "row",
        signed_absmax: bool = False,
    ) -> QuantEmbedding:
        """A table with the rows of ``embedding``, packed. Raises Unsupported for one with ``max_norm``."""
        if not isinstance(embedding, nn.Embedding) or isinstance(embedding, QuantEmbedding):
            raise invalid("embedding", type(embedding).__name__, "a torch.nn.Embedding")
        if embedding.max_norm is not None:
            raise unsupported(f"max_norm={embedding.max_norm}", "a packed table cannot rescale rows as it reads them")
        packed = quantize(
            embedding.weight,
            format,
            block_size,
            double_quant,
            codebook,
            nonfinite,
            scale_dtype=scale_dtype,
            block_order=block_order,
            signed_absmax=signed_absmax,
        )
        layer = cls.from_packed(packed, embedding.padding_idx)
        return layer.train(embedding.training)

    @classmethod
    def from_packed(cls, packed: PackedWeight, padding_idx: int | None = None) -> QuantEmbedding:
        """A table whose parameters share the tensors of ``packed`` [num_embeddings, embedding_dim]."""
        if len(packed.shape) != 2:
            raise unsupported(f"packed: shape {list(packed.shape)}", "a layer holds one matrix, so index a stack first")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._fill(packed, padding_idx)
        return layer

    def to_embedding(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """A torch.nn.Embedding with the dequantized table in ``dtype`` or that of the layer."""
        weight = self.dequantize(dtype)
        embedding = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, _weight=weight)
        return embedding.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """The rows ``input`` of the table: [*input.shape, embedding_dim]."""
        permutation = self._parameters["weight_permutation"]
        return packed_embedding(input, self._tensors(), self._shape, self._scheme, self.dtype, permutation)

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {describe(self.spec)}"
