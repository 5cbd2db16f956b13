"""QuantEmbedding: nn.Embedding whose rows are decoded as they are looked up."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import lowbit_rs
from lowbit_rs import InvalidArgument, QuantEmbedding, Unsupported
from strategies import FORMATS


@pytest.mark.filterwarnings("ignore:a weight in block_order=.flat.:UserWarning")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("options", [{}, {"double_quant": True}, {"block_size": "row"}, {"block_order": "flat"}])
def test_rows_are_those_of_the_dequantized_table(format: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    embedding = nn.Embedding(40, 75, dtype=dtype)
    packed = QuantEmbedding.from_embedding(embedding, format, **options)
    indices = torch.randint(40, (2, 7))
    rows = packed(indices)
    assert rows.dtype == dtype
    assert torch.equal(rows, packed.dequantize()[indices])
    assert torch.equal(packed(indices.int()), rows)


def test_keeps_what_belongs_to_the_table() -> None:
    embedding = nn.Embedding(40, 64, padding_idx=-1).eval()
    packed = QuantEmbedding.from_embedding(embedding)
    assert isinstance(packed, nn.Embedding)
    assert (packed.num_embeddings, packed.embedding_dim, packed.padding_idx) == (40, 64, 39)
    assert not packed.training
    assert not packed(torch.tensor(39)).any()  # the padding row is zero and stays so
    assert not any(parameter.requires_grad for parameter in packed.parameters())
    assert not packed(torch.tensor([1])).requires_grad


def test_to_embedding_and_back() -> None:
    packed = QuantEmbedding.from_embedding(nn.Embedding(40, 64, padding_idx=3))
    embedding = packed.to_embedding()
    assert type(embedding) is nn.Embedding
    assert embedding.padding_idx == 3
    assert torch.equal(embedding.weight, packed.dequantize())
    assert packed.to_embedding(torch.float16).weight.dtype == torch.float16


def test_state_copies_and_casts() -> None:
    packed = QuantEmbedding.from_embedding(nn.Embedding(40, 64), "uint4")
    empty = QuantEmbedding(40, 64, format="uint4")
    assert not empty(torch.arange(40)).any()
    empty.load_state_dict(packed.state_dict(), strict=True)
    for same in (empty, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert same.packed == packed.packed
    meta = QuantEmbedding(40, 64, format="uint4", device="meta")
    assert meta(torch.zeros(3, dtype=torch.int64, device="meta")).shape == (3, 64)
    meta.load_state_dict(packed.state_dict(), assign=True)
    assert meta.packed == packed.packed
    assert packed.half()(torch.tensor([1])).dtype == torch.float16
    assert packed.weight_scale.dtype == torch.float32


def test_float_table_is_quantized_on_the_way_in() -> None:
    embedding = nn.Embedding(40, 64)
    packed = QuantEmbedding(40, 64)
    packed.load_state_dict(embedding.state_dict())
    assert packed.packed == lowbit_rs.quantize(embedding.weight)


def test_repr_is_the_constructor() -> None:
    assert repr(QuantEmbedding(40, 64, 3)) == "QuantEmbedding(40, 64, padding_idx=3, nf4, block_size=64, scale=float32)"


def test_wrong_arguments() -> None:
    with pytest.raises(Unsupported, match=r"max_norm=1\.0: not supported"):
        QuantEmbedding.from_embedding(nn.Embedding(40, 64, max_norm=1.0))
    with pytest.raises(InvalidArgument, match=r"embedding: got Linear, expected a torch\.nn\.Embedding"):
        QuantEmbedding.from_embedding(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="padding_idx: got 40, expected a row of 40"):
        QuantEmbedding(40, 64, 40)
    with pytest.raises(Unsupported, match=r"packed: shape \[2, 8, 64\]"):
        QuantEmbedding.from_packed(lowbit_rs.quantize(torch.randn(2, 8, 64)))
    packed = QuantEmbedding(40, 64)
    with pytest.raises(InvalidArgument, match="input: got index 40"):
        packed(torch.tensor([1, 40]))
    with pytest.raises(InvalidArgument, match=r"input: got torch\.float32"):
        packed(torch.tensor([1.0]))


def test_only_the_rows_looked_up_are_decoded() -> None:
    """A table whose other rows hold NaN scales is never touched there."""
    packed = lowbit_rs.quantize(torch.randn(1000, 64))
    packed.scale[1:] = torch.nan
    layer = QuantEmbedding.from_packed(packed)
    assert not layer(torch.zeros(3, dtype=torch.int64)).isnan().any()
