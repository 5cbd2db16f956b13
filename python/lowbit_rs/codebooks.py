"""Codebooks: the values that 4-bit codes stand for.

Every function returns a new one-dimensional NumPy array of fp32 values, code ``i`` standing for entry ``i``. Any table
of up to 16 of them can be passed as ``codebook=`` to :func:`lowbit_rs.quantize`; there, values within [-1, 1] are
relative to the block's absolute maximum.

Arguments called ``samples`` or ``weights`` are torch tensors (any dtype but complex, any device) or anything that NumPy
makes an array of; they are read as fp32. A wrong argument raises :class:`lowbit_rs.InvalidArgument`.
"""

from __future__ import annotations

import operator
from typing import Literal, SupportsIndex

import numpy as np
import numpy.typing as npt
import torch

from lowbit_rs import _native
from lowbit_rs.errors import invalid

__all__ = ["block_optimal", "dynamic_map", "fit", "fp4", "int4", "nf4", "normal_float", "quantile"]

Table = npt.NDArray[np.float32]


def nf4() -> Table:
    """The 16 values of NF4 (QLoRA, arXiv 2305.14314), ascending: -1 at code 0, 0 at code 7, 1 at code 15.

    Equal to :func:`normal_float` of 4 bits and to the table in bitsandbytes' checkpoints, to the last bit.
    """
    return _table(_native.nf4())


def normal_float(bits: SupportsIndex) -> Table:
    """The NormalFloat table of ``bits`` bits, 2 to 8: 2^bits ascending values with -1, 0 and 1 among them.

    They are quantiles of the normal distribution over the largest one (QLoRA, arXiv 2305.14314, section 3): 2^(bits-1)
    above zero and one fewer below, evenly spaced in probability on either side.
    """
    return _table(_native.normal_float(_count("bits", bits)))


def fp4() -> Table:
    """The 16 values of bitsandbytes' 4-bit float in the order of its codes: bit 3 is the sign, and code 8 is -0.

    The magnitudes of codes 0 to 7 are 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6 and 1/4: they do not ascend.
    """
    return _table(_native.fp4())


def int4() -> Table:
    """The integers -8 to 7. A block's absolute maximum is mapped to 7, so -8 stays unused."""
    return _table(_native.int4())


def dynamic_map() -> Table:
    """The 256 ascending values with which double quantization stores block scales; 0 is at index 127.

    Equal to bitsandbytes' signed dynamic map (arXiv 1511.04561) to the last bit: for each of the decades that end at
    10^-6 to 1, the middles of 1, 2, 4, ... 64 equal cells with both signs, and 0 and 1.
    """
    return _table(_native.dynamic_map())


def quantile(samples: torch.Tensor | npt.ArrayLike, bits: SupportsIndex = 4) -> Table:
    """The codebook of 2^bits ascending values (2 to 8 bits) that are equally often nearest to a sample, or nearly so.

    Value ``i`` is the quantile of ``samples`` at probability (i + 1/2) / 2^bits, the median of the ``i``-th of 2^bits
    equally probable cells, as ``numpy.quantile`` interpolates it. Where zero lies in the range of the samples, the
    value nearest to it becomes exactly zero (the lower one of two).

    Values are in the unit of the samples: for a codebook to quantize weights with, pass weights divided by their
    block's absolute maximum.
    """
    array = _float32("samples", samples)
    return _table(_native.quantile(_buffer(array), _count("bits", bits)))


def block_optimal(
    block_size: SupportsIndex,
    bits: SupportsIndex = 4,
    metric: Literal["mse", "mae"] = "mse",
    signed: bool = False,
) -> Table:
    """The codebook that errs least on normal weights quantized in blocks of ``block_size`` (2 or more).

    It minimises the expected squared (``"mse"``) or absolute (``"mae"``) error of the weights themselves among all
    tables of 2^bits values (2 to 8 bits) that keep -1, 0 and 1 exact (AF4, arXiv 2306.06965; BOF4, arXiv 2505.06653).
    It is computed by numerical integration, in some milliseconds.

    ``signed=True`` is for blocks divided by their weight of largest magnitude with its sign (``signed_absmax=True`` of
    :func:`lowbit_rs.quantize`; BOF4-S): -1 then needs no value, and one more is free.

    How far the error on normal weights lies below that of NF4, in percent, with 4 bits:

    ========== ===== ============ ===== ============
    block size   MSE  MSE, signed   MAE  MAE, signed
    ========== ===== ============ ===== ============
            32   9.9         16.9  0.6           4.5
            64   5.5         13.1  0.02          4.2
           128   2.3         10.4  0.3           4.8
    ========== ===== ============ ===== ============
    """
    if not isinstance(metric, str):
        raise invalid("metric", repr(metric), '"mse" or "mae"')
    return _table(_native.block_optimal(_count("block_size", block_size), _count("bits", bits), metric, bool(signed)))


def fit(
    samples: torch.Tensor | npt.ArrayLike,
    bits: SupportsIndex = 4,
    weights: torch.Tensor | npt.ArrayLike | None = None,
    block_size: SupportsIndex | Literal["row"] | None = None,
    *,
    signed: bool = False,
) -> Table:
    """The codebook of 2^bits ascending values that errs least on given data (Lloyd-Max, or k-means in one dimension).

    Without ``block_size`` it minimises the squared distance of ``samples`` to the nearest value, each counted with its
    entry of ``weights`` (as many as samples, 0 or more; weights under 1e-16 of their sum may get lost). 1 to 8 bits;
    values are in the unit of the samples, and zero is kept only where it happens to be best.

    With ``block_size`` it minimises the squared error of quantizing the tensor ``samples`` itself in blocks of that
    many weights along the last dimension (``"row"``: a block a row): every weight is divided by its block's absolute
    maximum and counted with the square of that. 2 to 8 bits; 0 is exact. -1 and 1 are not kept, as keeping them would
    leave more error (of normal weights in blocks of 64, 3.6 % more), so a block's largest weight is decoded some
    percent short. ``signed=True`` fits to blocks divided by their weight of largest magnitude with its sign
    (``signed_absmax=True`` of :func:`lowbit_rs.quantize`).

    A partition found by dynamic programming (the best of all for up to 2048 distinct samples) is refined by Lloyd's
    iteration, which never raises the error. The result is the same on every run. Where there are fewer distinct
    samples than values, the largest value is repeated.
    """
    array = _float32("samples", samples)
    if block_size is None:
        if signed:
            raise invalid("signed", signed, "False without block_size")
        if weights is None:
            return _table(_native.fit(_buffer(array), _count("bits", bits), None))
        counted = _float32("weights", weights)
        return _table(_native.fit(_buffer(array), _count("bits", bits), _buffer(counted)))
    if weights is not None:
        raise invalid("weights", "weights and block_size", "only one of the two")
    row_length = max(array.shape[-1], 1)
    size = row_length if block_size == "row" else _count("block_size", block_size, 'an integer of 1 or more, or "row"')
    return _table(_native.fit_blocks(_buffer(array), row_length, size, _count("bits", bits), bool(signed)))


def _table(values: list[float]) -> Table:
    return np.array(values, dtype=np.float32)


def _count(argument: str, value: SupportsIndex, expected: str = "an integer of 1 or more") -> int:
    """An integer that the native module can take; the exact range is for that to check."""
    try:
        count = operator.index(value)
    except TypeError:
        raise invalid(argument, repr(value), expected) from None
    if not 0 <= count < 2**31:
        raise invalid(argument, count, expected)
    return count


def _float32(argument: str, values: torch.Tensor | npt.ArrayLike) -> Table:
    """``values`` as a contiguous fp32 array of one dimension or more."""
    if isinstance(values, torch.Tensor):
        if values.is_complex():
            raise invalid(argument, values.dtype, "real numbers")
        return np.ascontiguousarray(values.detach().to("cpu", torch.float32).numpy())
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise invalid(argument, array.dtype, "real numbers")
    with np.errstate(over="ignore"):  # too large for fp32 is reported as the infinity that it becomes
        return np.ascontiguousarray(array, dtype=np.float32)


def _buffer(array: Table) -> tuple[int, int]:
    """Address and length, for a call during which the caller keeps ``array`` alive."""
    return array.ctypes.data, array.size
