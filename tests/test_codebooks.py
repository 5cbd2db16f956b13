"""Codebooks through the Python layer: others' tables bit for bit, what each promises, errors by message."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import lowbit_rs
from lowbit_rs import codebooks

Table = npt.NDArray[np.float32]

NF4 = np.array(
    [
        -1,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1,
    ],
    dtype=np.float32,
)
DYNAMIC_MAP_SHA256 = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"


def errors(table: Table, samples: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The distance of each sample to the nearest value."""
    ordered = np.sort(table.astype(np.float64))
    nearest = ordered[np.searchsorted((ordered[1:] + ordered[:-1]) / 2, samples)]
    distances: npt.NDArray[np.float64] = np.abs(samples - nearest)
    return distances


def quantization_error(table: Table, rows: Table, block_size: int, power: int = 2, signed: bool = False) -> float:
    """The mean of |w - w'|^power over blocks that are divided by their (signed) absolute maximum."""
    blocks = rows.reshape(-1, block_size).astype(np.float64)
    scale = np.take_along_axis(blocks, np.abs(blocks).argmax(1, keepdims=True), 1)
    scale = scale if signed else np.abs(scale)
    return float(((np.abs(scale) * errors(table, blocks / scale)) ** power).mean())


def normal(*shape: int) -> Table:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


samples_strategy = npst.arrays(
    np.float32, st.integers(1, 200), elements=st.floats(-1, 1, width=32) | st.sampled_from([0.0, 0.5])
)


def test_nf4_equals_the_published_table_to_the_last_bit() -> None:
    assert codebooks.nf4().tobytes() == NF4.tobytes()
    assert codebooks.normal_float(4).tobytes() == NF4.tobytes()


def test_dynamic_map_has_the_published_sha256() -> None:
    table = codebooks.dynamic_map()
    assert table.dtype == np.float32
    assert hashlib.sha256(table.tobytes()).hexdigest() == DYNAMIC_MAP_SHA256
    assert table[127] == 0


def test_fp4_and_int4_follow_their_codes() -> None:
    magnitudes = np.array([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4], dtype=np.float32)
    assert codebooks.fp4().tobytes() == np.concatenate([magnitudes, -magnitudes]).tobytes()
    assert codebooks.int4().tolist() == list(range(-8, 8))


@pytest.mark.parametrize("bits", range(2, 9))
def test_normal_float_ascends_through_zero_to_both_ends(bits: int) -> None:
    table = codebooks.normal_float(bits)
    assert table.shape == (2**bits,)
    assert (np.diff(table) > 0).all()
    assert [table[0], table[2 ** (bits - 1) - 1], table[-1]] == [-1, 0, 1]


def test_tables_are_the_callers_own() -> None:
    codebooks.nf4()[:] = 0
    codebooks.dynamic_map()[:] = 0
    assert codebooks.nf4()[0] == -1
    assert codebooks.dynamic_map()[-1] == 1


@given(samples_strategy, st.integers(2, 8))
def test_quantile_agrees_with_numpy_but_for_zero(samples: Table, bits: int) -> None:
    count = 2**bits
    table = codebooks.quantile(samples, bits)
    expected = np.quantile(samples.astype(np.float64), (np.arange(count) + 0.5) / count)
    assert (np.diff(table) >= 0).all()
    changed = np.flatnonzero(np.abs(table - expected) > 1e-6)
    if samples.min() <= 0 <= samples.max():
        assert 0 in table
        assert len(changed) <= 1
        assert (table[changed] == 0).all()
    else:
        assert len(changed) == 0


@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("signed", [False, True])
def test_block_optimal_beats_nf4_on_normal_data(block_size: int, signed: bool) -> None:
    blocks = normal(4096, 128)
    table = codebooks.block_optimal(block_size, signed=signed)
    gain = 1 - quantization_error(table, blocks, block_size, 2, signed) / quantization_error(NF4, blocks, block_size)
    documented = {32: (0.099, 0.169), 64: (0.055, 0.131), 128: (0.023, 0.104)}[block_size][signed]
    assert gain == pytest.approx(documented, abs=0.005)


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_block_optimal_serves_the_metric_that_it_is_asked_for(block_size: int) -> None:
    blocks = normal(4096, 128)
    for_mse = codebooks.block_optimal(block_size, metric="mse")
    for_mae = codebooks.block_optimal(block_size, metric="mae")
    for power, best, other in [(2, for_mse, for_mae), (1, for_mae, for_mse)]:
        least = quantization_error(best, blocks, block_size, power)
        assert least < quantization_error(other, blocks, block_size, power)
    signed = codebooks.block_optimal(block_size, metric="mae", signed=True)
    nf4_error = quantization_error(NF4, blocks, block_size, 1)
    assert quantization_error(signed, blocks, block_size, 1, signed=True) < nf4_error


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("metric", ["mse", "mae"])
def test_block_optimal_keeps_zero_and_the_ends(bits: int, metric: Any) -> None:
    for block_size in (2, 16, 4096):
        table = codebooks.block_optimal(block_size, bits, metric)
        assert table.shape == (2**bits,)
        assert (np.diff(table) > 0).all()
        assert table[0] == -1
        assert table[-1] == 1
        assert 0 in table
        signed = codebooks.block_optimal(block_size, bits, metric, signed=True)
        assert signed[0] > -1
        assert signed[-1] == 1
        assert 0 in signed


@given(samples_strategy, st.integers(2, 5))
def test_fit_is_never_worse_than_other_tables(samples: Table, bits: int) -> None:
    table = codebooks.fit(samples, bits)
    assert table.shape == (2**bits,)
    assert (np.diff(table) >= 0).all()
    error = (errors(table, samples) ** 2).sum()
    for other in (codebooks.quantile(samples, bits), codebooks.normal_float(bits)):
        assert error <= (errors(other, samples) ** 2).sum() + 1e-10


@given(samples_strategy, st.data())
def test_fit_counts_weights_as_copies(samples: Table, data: st.DataObject) -> None:
    copies = data.draw(npst.arrays(np.int64, samples.shape, elements=st.integers(0, 3)).filter(lambda x: x.any()))
    repeated = np.repeat(samples, copies)
    weighted = codebooks.fit(samples, 2, weights=copies)
    assert (errors(weighted, repeated) ** 2).sum() == pytest.approx(
        (errors(codebooks.fit(repeated, 2), repeated) ** 2).sum(), abs=1e-9
    )


@settings(max_examples=30)
@given(st.integers(1, 8), st.integers(1, 80), st.sampled_from([16, 64, "row"]), st.booleans(), st.integers(0, 99))
def test_fitted_codebook_errs_less_on_its_own_tensor(
    rows: int, columns: int, block_size: Any, signed: bool, seed: int
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) ** 3

    def error(codebook: Table | None, signed: bool) -> float:
        packed = lowbit_rs.quantize(weight, block_size=block_size, codebook=codebook, signed_absmax=signed)
        return float((packed.dequantize() - weight).double().square().sum())

    table = codebooks.fit(weight, block_size=block_size, signed=signed)
    assert 0 in table
    assert error(table, signed) <= error(NF4, signed) * (1 + 1e-5) + 1e-10


def test_fit_of_blocks_beats_block_optimal_on_its_tensor() -> None:
    weight = normal(256, 512) + 0.5 * normal(256, 512) ** 3
    for signed in (False, True):
        fitted = codebooks.fit(weight, block_size=64, signed=signed)
        general = codebooks.block_optimal(64, signed=signed)
        assert quantization_error(fitted, weight, 64, 2, signed) < quantization_error(general, weight, 64, 2, signed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_samples_may_be_tensors_arrays_or_lists(dtype: torch.dtype) -> None:
    tensor = torch.from_numpy(normal(64, 32)).to(dtype)
    expected = codebooks.fit(tensor.float().numpy())
    assert (codebooks.fit(tensor) == expected).all()
    assert (codebooks.fit(tensor.clone().requires_grad_()) == expected).all()
    assert (codebooks.fit(tensor.T) == expected).all()
    assert (codebooks.fit(tensor.double().numpy()) == expected).all()
    assert (codebooks.fit(tensor.float().tolist()) == expected).all()
    assert (codebooks.quantile(tensor) == codebooks.quantile(tensor.double().numpy()[::-1])).all()


def test_fit_is_the_same_on_every_run() -> None:
    weight = normal(1 << 19)
    assert codebooks.fit(weight, 8).tobytes() == codebooks.fit(weight[::-1], 8).tobytes()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: codebooks.normal_float(1), "bits: got 1, expected an integer from 2 to 8"),
        (lambda: codebooks.normal_float(-4), "bits: got -4, expected an integer of 1 or more"),
        (lambda: codebooks.quantile([1.0], 9), "bits: got 9, expected an integer from 2 to 8"),
        (lambda: codebooks.quantile([]), "samples: got no values, expected one value or more"),
        (lambda: codebooks.fit([0.0, float("nan")]), "samples: got NaN at index 1, expected finite values"),
        (lambda: codebooks.fit([1e300]), "samples: got inf at index 0, expected finite values"),
        (
            lambda: codebooks.fit(torch.ones(2, dtype=torch.cfloat)),
            "samples: got torch.complex64, expected real numbers",
        ),
        (lambda: codebooks.fit("abc"), "samples: got <U3, expected real numbers"),
        (lambda: codebooks.fit([1.0], 0), "bits: got 0, expected an integer from 1 to 8"),
        (
            lambda: codebooks.fit([1.0, 2.0], weights=[1.0]),
            "weights: got 1 values, expected 2 values, one for each sample",
        ),
        (
            lambda: codebooks.fit([1.0], weights=[-1.0]),
            "weights: got -1 at index 0, expected finite values of 0 or more",
        ),
        (lambda: codebooks.fit([1.0], weights=[0.0]), "weights: got only zeros, expected at least one positive value"),
        (
            lambda: codebooks.fit([1.0], weights=[1.0], block_size=64),
            "weights: got weights and block_size, expected only one of the two",
        ),
        (lambda: codebooks.fit([1.0], signed=True), "signed: got True, expected False without block_size"),
        (lambda: codebooks.fit([1.0], block_size=0), "block_size: got 0, expected an integer of 1 or more"),
        (
            lambda: codebooks.fit([1.0], block_size="rows"),  # type: ignore[arg-type]
            "block_size: got 'rows', expected an integer of 1 or more, or \"row\"",
        ),
        (lambda: codebooks.block_optimal(1), "block_size: got 1, expected an integer of 2 or more"),
        (
            lambda: codebooks.block_optimal(6.5),  # type: ignore[arg-type]
            "block_size: got 6.5, expected an integer of 1 or more",
        ),
        (
            lambda: codebooks.block_optimal(64, metric="rms"),  # type: ignore[arg-type]
            'metric: got "rms", expected "mse" or "mae"',
        ),
    ],
)
def test_errors_name_the_argument_and_what_it_takes(call: Callable[[], Table], message: str) -> None:
    with pytest.raises(lowbit_rs.InvalidArgument) as caught:
        call()
    assert str(caught.value) == message
