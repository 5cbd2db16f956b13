"""Checkpoints of other quantization libraries: read into packed weights, rewritten as native files, and back.

>>> from lowbit_rs.integrations.checkpoints import convert_file
>>> convert_file("model-gptq", "model-lowbit")  # doctest: +SKIP

Each layout has a module: ``bitsandbytes``, ``gptq``, ``awq``, ``compressed_tensors``; ``registry`` is the table of
them. None needs the library that wrote the checkpoint.
"""

from __future__ import annotations

from lowbit_rs.integrations.checkpoints.convert import convert_file
from lowbit_rs.integrations.checkpoints.registry import LAYOUTS, foreign_weights

__all__ = ["LAYOUTS", "convert_file", "foreign_weights"]
