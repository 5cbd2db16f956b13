"""The names of bitsandbytes 0.50.2 for inference, with its signatures and defaults, over the kernels of lowbit_rs.

>>> import torch
>>> import lowbit_rs.compat.bitsandbytes as bnb
>>> layer = bnb.nn.Linear4bit(64, 8, quant_type="nf4", compute_dtype=torch.float32).to("cpu")  # quantizes, as there
>>> layer(torch.randn(2, 64)).shape
torch.Size([2, 8])

Codes, scales, state dicts and decoded weights are bitsandbytes'. What differs is said where it does, and together in
docs/from-bitsandbytes.md: products are summed in float32 and rounded once, and 8-bit layers do not quantize x.

What is not offered raises Unsupported with the reason when it is asked for: optimizers (``bnb.optim``), and functions
that serve training in 8 bits.
"""

from __future__ import annotations

from lowbit_rs.compat.bitsandbytes import functional, nn, optim
from lowbit_rs.compat.bitsandbytes.functional import MatmulLtState, matmul, matmul_4bit
from lowbit_rs.compat.bitsandbytes.nn import modules

__all__ = ["MatmulLtState", "functional", "matmul", "matmul_4bit", "modules", "nn", "optim"]

#: The version of bitsandbytes whose names these are: code that uses it compares versions.
__version__ = "0.50.2"

#: What integrations ask bitsandbytes for.
features = {"multi_backend"}
supported_torch_devices = {"cpu", "cuda"}
