"""Layers of ``bitsandbytes.nn`` for inference and adapters."""

from __future__ import annotations

from lowbit_rs.compat.bitsandbytes._absent import getattr_of
from lowbit_rs.compat.bitsandbytes.nn.modules import (
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    Linear4bit,
    Linear8bitLt,
    LinearFP4,
    LinearNF4,
)
from lowbit_rs.compat.bitsandbytes.nn.parameters import Int8Params, Params4bit

__all__ = [
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "Params4bit",
]

__getattr__ = getattr_of(
    "bnb.nn",
    {
        "StableEmbedding": "it registers 8-bit optimizer states, which lowbit_rs does not have; use torch.nn.Embedding",
        "Embedding": "it registers 8-bit optimizer states, which lowbit_rs does not have; use torch.nn.Embedding",
        "OutlierAwareLinear": "it is abstract in bitsandbytes; use Linear8bitLt",
    },
)
