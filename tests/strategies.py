"""Hypothesis strategies for weights and the options of packing them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from lowbit_rs.packed import BlockSize

FORMATS = ("nf4", "fp4", "int4", "uint4", "int8", "uint8")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_SIZES: tuple[BlockSize, ...] = (16, 32, 64, 128, 256, 4096, "row")

#: Largest magnitude of drawn weights, so that neither they nor their scales overflow the dtype: for shifted formats
#: the scale's numerator is twice that.
LARGEST = {torch.float32: 2.0**100, torch.float16: 2.0**14, torch.bfloat16: 2.0**100}


@dataclass(frozen=True)
class Options:
    """Keyword arguments of quantize, for a hypothesis report to show."""

    format: str
    block_size: BlockSize
    scale_dtype: torch.dtype = torch.float32
    codebook: tuple[float, ...] | None = None
    double_quant: bool = False
    block_order: str = "row"
    signed_absmax: bool = False

    def keywords(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def tables() -> st.SearchStrategy[tuple[float, ...]]:
    """Codebooks of 2 to 16 distinct values in [-1, 1], in any order."""
    value = st.integers(-64, 64).map(lambda numerator: numerator / 64)
    return st.lists(value, min_size=2, max_size=16, unique=True).map(tuple)


@st.composite
def options(
    draw: st.DrawFn,
    formats: tuple[str, ...] = (*FORMATS, "custom"),
    scale_dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> Options:
    """How to pack: any format, block size, block order and storage of scales, without double quantization."""
    format = draw(st.sampled_from(formats))
    block_size = draw(st.sampled_from(BLOCK_SIZES))
    return Options(
        format,
        block_size,
        draw(st.sampled_from(scale_dtypes)),
        draw(tables()) if format == "custom" else None,
        block_order="row" if block_size == "row" else draw(st.sampled_from(["row", "flat"])),
        signed_absmax=format == "custom" and draw(st.booleans()),
    )


@st.composite
def weights(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES, largest: float = 2.0**100) -> Tensor:
    """A finite matrix, or a stack of them, of one of ``dtypes``, with magnitudes up to ``largest``, 0 and tiny."""
    dtype = draw(st.sampled_from(dtypes))
    bound = min(largest, LARGEST[dtype])
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=70).filter(lambda s: np.prod(s) <= 1500))
    if draw(st.booleans()):
        elements = st.floats(-bound, bound, width=32)
        values = draw(hnp.arrays(np.float32, shape, elements=elements))
    else:
        generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        exponent = draw(st.integers(-20, 12))
        values = (np.clip(generator.standard_normal(shape), -4, 4) * 2.0**exponent).astype(np.float32)
        values = np.clip(values, -bound, bound)
    return torch.from_numpy(values).to(dtype)
