"""Quantized weights in safetensors files: convert, inspect, load, save.

>>> from lowbit_rs.files import quantize_file, load_packed
>>> quantize_file("model", "model-nf4", "nf4", double_quant=True)  # doctest: +SKIP
>>> weights = load_packed("model-nf4")  # doctest: +SKIP
"""

from __future__ import annotations

from lowbit_rs.files.convert import dequantize_file, quantize_file
from lowbit_rs.files.inspection import InspectedTensor, Inspection, inspect
from lowbit_rs.files.pipeline import Progress, Summary
from lowbit_rs.files.state import load_model, load_packed, save_packed

__all__ = [
    "InspectedTensor",
    "Inspection",
    "Progress",
    "Summary",
    "dequantize_file",
    "inspect",
    "load_model",
    "load_packed",
    "quantize_file",
    "save_packed",
]
