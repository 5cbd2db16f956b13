"""What is said where there are no CUDA kernels, no driver or no GPU."""

from __future__ import annotations

import pytest
import torch

from lowbit_rs import CudaError, InvalidArgument, Unsupported, _backends, _native
from lowbit_rs._backends import backend_of, cuda
from lowbit_rs._native import CudaWeight, Spec


def test_a_build_without_kernels_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "has_cuda_kernels", lambda: False)
    with pytest.raises(Unsupported, match=r"device cuda:0: not supported: this build has no CUDA kernels; .*\.cpu\(\)"):
        backend_of(torch.device("cuda:0"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_says_what_is_missing() -> None:
    for _ in range(2):  # the outcome is remembered, not the first message alone
        with pytest.raises(CudaError, match=r"CUDA: .*expected (NVIDIA's driver 580|a working GPU)"):
            _native.cuda_device(0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_work_on_a_machine_without_a_gpu_is_refused_before_it_starts() -> None:
    weight = CudaWeight(0, Spec("nf4", 64), 1, 64, (0, 32), (0, 1))
    with pytest.raises(CudaError, match="CUDA: "):
        _native.cuda_dequantize(weight, (0, 0, 1, 64), (0, 64, "float32"), 0)


def test_activations_are_rounded_beside_rows_of_int8_alone() -> None:
    weight = CudaWeight(0, Spec("nf4", 64), 1, 64, (0, 32), (0, 1))
    with pytest.raises(Unsupported, match=r'activation="int8" on CUDA: not supported: .*a scale a row alone'):
        cuda.linear(weight, torch.zeros(1, 64), None, "int8", 6.0)


def test_lengths_are_checked_without_a_gpu() -> None:
    for arguments, message in (
        (((0, 31), (0, 1)), "codes: got 31 elements, expected 32 elements"),
        (((0, 32), (0, 2)), "scale: got 2 elements, expected 1 elements"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            CudaWeight(0, Spec("nf4", 64), 1, 64, *arguments)
    with pytest.raises(InvalidArgument, match="shift: got none, expected a buffer"):
        CudaWeight(0, Spec("uint4", 64), 1, 64, (0, 32), (0, 1))
    with pytest.raises(InvalidArgument, match="codebook: got 17 values"):
        CudaWeight(0, Spec("custom", 64), 1, 64, (0, 32), (0, 1), codebook=(0, 17))
    with pytest.raises(InvalidArgument, match="device: got cuda:64"):
        _native.cuda_device(64)
