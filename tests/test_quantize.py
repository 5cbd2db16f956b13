"""quantize: what it takes, what it refuses, what it packs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lowbit_rs
import oracle
from lowbit_rs import InvalidArgument, Unsupported
from lowbit_rs._backends import backend_of
from strategies import FORMATS

TABLE = tuple(torch.linspace(-1, 1, 16).tolist())


@pytest.mark.parametrize("format", FORMATS)
def test_strides_do_not_matter(format: str, dtype: torch.dtype) -> None:
    weight = torch.randn(40, 70).to(dtype)
    wanted = lowbit_rs.quantize(weight, format)
    storage = torch.zeros(3 * 40 * 140 + 5).to(dtype)
    strided = storage.as_strided((40, 70), (280, 3), 5).copy_(weight)
    for same in (weight.T.contiguous().T, strided, weight.repeat(1, 2)[:, :70], weight.clone().requires_grad_()):
        assert lowbit_rs.quantize(same, format) == wanted
    expanded = weight[:1].expand(5, 70)
    assert lowbit_rs.quantize(expanded, format) == lowbit_rs.quantize(expanded.contiguous(), format)


def test_negated_views_are_resolved() -> None:
    imaginary = torch.randn(3, 64, dtype=torch.complex64).conj().imag
    assert imaginary.is_neg()
    assert lowbit_rs.quantize(imaginary) == lowbit_rs.quantize(imaginary.resolve_neg())


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_numpy_arrays(dtype: Any) -> None:
    array = np.random.default_rng(0).standard_normal((40, 70)).astype(dtype)
    wanted = lowbit_rs.quantize(torch.from_numpy(array))
    frozen = array.copy()
    frozen.flags.writeable = False
    swapped = array.astype(array.dtype.newbyteorder())
    reversed_twice = array[::-1, ::-1].copy()[::-1, ::-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in (array, np.asfortranarray(array), frozen, swapped, reversed_twice):
            assert lowbit_rs.quantize(same) == wanted
    assert not frozen.flags.writeable


def test_numpy_file(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((40, 70)).astype(np.float32)
    np.save(tmp_path / "weight.npy", array)
    mapped = np.load(tmp_path / "weight.npy", mmap_mode="r")
    assert lowbit_rs.quantize(mapped) == lowbit_rs.quantize(array)


def test_stack_of_matrices_is_packed_matrix_by_matrix() -> None:
    stack = torch.randn(3, 10, 70)
    for options in ({}, {"format": "uint4"}, {"format": "int8", "block_size": "row"}):
        packed = lowbit_rs.quantize(stack, **options)  # type: ignore[arg-type]
        assert packed.shape == (3, 10, 70)
        for index, matrix in enumerate(stack):
            single = lowbit_rs.quantize(matrix, **options)  # type: ignore[arg-type]
            assert torch.equal(packed.data[index], single.data)
            assert torch.equal(packed.scale[index], single.scale)
    permuted = stack.permute(1, 2, 0)
    assert lowbit_rs.quantize(permuted) == lowbit_rs.quantize(permuted.contiguous())


@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0, 0), (2, 0, 64)])
@pytest.mark.parametrize("options", [{}, {"double_quant": True}, {"block_size": "row"}, {"block_order": "flat"}])
def test_empty_weights(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    packed = lowbit_rs.quantize(torch.zeros(shape), **options)
    assert packed.dequantize().shape == shape
    assert packed.bits_per_weight == 0


def test_result_is_detached_and_shares_nothing() -> None:
    weight = torch.randn(4, 64, requires_grad=True)
    packed = lowbit_rs.quantize(weight)
    before = packed.dequantize()
    with torch.no_grad():
        weight.zero_()
    assert torch.equal(packed.dequantize(), before)
    assert not before.requires_grad


def test_threads_do_not_change_bits() -> None:
    weight, x = torch.randn(300, 520), torch.randn(7, 520)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            packed = lowbit_rs.quantize(weight, double_quant=True)
            results.append((packed, packed.dequantize(), lowbit_rs.linear(x, packed)))
    finally:
        torch.set_num_threads(threads)
    for packed, unpacked, y in results[1:]:
        assert packed == results[0][0]
        assert torch.equal(unpacked, results[0][1])
        assert torch.equal(y, results[0][2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_weights_are_refused_by_index(bad: float, dtype: torch.dtype) -> None:
    weight = torch.zeros(5, 200, dtype=dtype)
    weight[4, 3] = weight[3, 150] = weight[3, 180] = bad
    with pytest.raises(InvalidArgument, match=r"tensor: element \[3, 150\] is .*, expected finite values"):
        lowbit_rs.quantize(weight)
    with pytest.raises(InvalidArgument, match=r"element \[1, 0, 1\]"):
        lowbit_rs.quantize(torch.tensor([[[0.0, 0.0]], [[0.0, bad]]]))


@pytest.mark.parametrize("format", FORMATS)
def test_nonfinite_weights_make_their_block_nan(format: str) -> None:
    weight = torch.randn(2, 128)
    weight[1, 70] = float("nan")
    unpacked = lowbit_rs.quantize(weight, format, nonfinite="propagate").dequantize()
    assert unpacked[1, 64:].isnan().all()
    assert not unpacked[0].isnan().any()
    assert not unpacked[1, :64].isnan().any()


def test_signed_absmax_maps_the_largest_weight_to_plus_one() -> None:
    weight = torch.randn(8, 64)
    packed = lowbit_rs.quantize(weight, codebook=TABLE, signed_absmax=True)
    largest = weight.gather(1, weight.abs().argmax(1, keepdim=True))
    assert torch.equal(packed.scale, largest)
    assert bool((oracle.codes(packed).gather(1, weight.abs().argmax(1, keepdim=True)) == 15).all())


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
def test_scales_are_stored_as_asked(scale_dtype: torch.dtype) -> None:
    weight = torch.randn(8, 64)
    packed = lowbit_rs.quantize(weight, "uint4", scale_dtype=scale_dtype)
    assert packed.scale.dtype == scale_dtype
    assert packed.shift is not None
    assert packed.shift.dtype == scale_dtype
    assert packed.bits_per_weight == 4.5


def test_scale_overflow_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="scale_dtype: got float16 with a block of scale 1e5"):
        lowbit_rs.quantize(torch.full((1, 16), 1e5), scale_dtype=torch.float16)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ([[1.0]], "tensor: got list, expected a torch.Tensor or a numpy.ndarray"),
        (torch.zeros(3), r"tensor: got shape \[3\], expected \[N, K\] or \[experts, N, K\]"),
        (torch.zeros(2, 2, 2, 2), r"tensor: got shape \[2, 2, 2, 2\]"),
        (torch.zeros(2, 2, dtype=torch.float64), "tensor: got torch.float64, expected torch.float32"),
        (torch.zeros(2, 2, dtype=torch.int32), "tensor: got torch.int32"),
        (torch.zeros(2, 2, device="meta"), "tensor: got a meta tensor, which has no values"),
        (torch.eye(3).to_sparse(), "tensor: got a torch.sparse_coo tensor, expected a dense one"),
        (torch.zeros(2, 2).as_subclass(type("Mine", (Tensor,), {})), "tensor: got the subclass Mine"),
        (np.zeros((2, 2)), "tensor: got a NumPy array of float64, expected float32 or float16"),
        (np.ma.masked_array(np.zeros((2, 2), np.float32)), "tensor: got the subclass MaskedArray"),
    ],
)
def test_wrong_tensors(tensor: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        lowbit_rs.quantize(tensor)


def test_quantized_tensors_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates its own quantized dtypes
        quantized = torch.quantize_per_tensor(torch.zeros(2, 2), 1.0, 0, torch.qint8)
    with pytest.raises(InvalidArgument, match=r"tensor: got torch\.qint8"):
        lowbit_rs.quantize(quantized)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "nf5"}, 'format: got "nf5", expected "nf4", "fp4", "int4", "uint4", "int8", "uint8" or "custom"'),
        ({"format": "custom"}, 'codebook: got None, expected the 2 to 16 values of format "custom"'),
        ({"format": "int8", "codebook": TABLE}, "format: got 'int8' with a codebook"),
        ({"block_size": 48}, 'block_size: got 48, expected a power of two from 16 to 4096, or "row"'),
        ({"block_size": 8}, "block_size: got 8"),
        ({"block_size": 8192}, "block_size: got 8192"),
        ({"block_size": 0}, "block_size: got 0"),
        ({"block_size": -16}, "block_size: got -16"),
        ({"block_size": 64.0}, r"block_size: got 64\.0"),
        ({"block_size": True}, "block_size: got True"),
        ({"block_size": "column"}, "block_size: got 'column'"),
        ({"block_order": "column"}, 'block_order: got "column", expected "row" or "flat"'),
        ({"block_size": "row", "block_order": "flat"}, 'block_order: got "flat" with block_size="row"'),
        ({"nonfinite": "skip"}, 'nonfinite: got \'skip\', expected "error" or "propagate"'),
        ({"scale_dtype": torch.float64}, "scale_dtype: got torch.float64, expected torch.float32"),
        ({"signed_absmax": True}, 'signed_absmax: got true with format "nf4"'),
        ({"codebook": [1.0]}, r"codebook: got shape \[1\], expected 2 to 16 values"),
        ({"codebook": torch.zeros(17)}, r"codebook: got shape \[17\]"),
        ({"codebook": torch.zeros(4, 4)}, r"codebook: got shape \[4, 4\]"),
        ({"codebook": [0.0, float("nan")]}, "codebook: got a value of NaN, expected finite values"),
        ({"codebook": "nf4"}, "codebook: got str, expected 2 to 16 numbers"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        lowbit_rs.quantize(torch.zeros(4, 64), **options)


def test_errors_are_value_errors_too() -> None:
    with pytest.raises(ValueError, match="block_size"):
        lowbit_rs.quantize(torch.zeros(4, 64), block_size=48)
    assert issubclass(Unsupported, NotImplementedError)
    assert issubclass(InvalidArgument, lowbit_rs.LowbitError)


def test_devices_without_kernels_are_named() -> None:
    message = r"device mps: not supported: this build has no mps kernels; .*\.cpu\(\)"
    with pytest.raises(Unsupported, match=message):
        backend_of(torch.device("mps"))
