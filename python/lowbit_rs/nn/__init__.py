"""Modules with packed weights, and the functions that put them into a model."""

from __future__ import annotations

from lowbit_rs.nn.embedding import QuantEmbedding
from lowbit_rs.nn.experts import QuantExperts
from lowbit_rs.nn.fusion import fuse_model
from lowbit_rs.nn.linear import QuantLinear
from lowbit_rs.nn.model import dequantize_model, quantize_model
from lowbit_rs.nn.norm import LayerNorm, RMSNorm
from lowbit_rs.nn.report import Fusion, Report, ReportRow

__all__ = [
    "Fusion",
    "LayerNorm",
    "QuantEmbedding",
    "QuantExperts",
    "QuantLinear",
    "RMSNorm",
    "Report",
    "ReportRow",
    "dequantize_model",
    "fuse_model",
    "quantize_model",
]
