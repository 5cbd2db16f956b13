"""What the tests on a GPU share. Where there is none they are skipped, and say why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit_rs import CudaError, _native

HERE = Path(__file__).parent

#: One of each set of tensors and ways of laying them out that a weight can have.
WEIGHTS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "fp4": {"format": "fp4", "block_size": 32, "scale_dtype": torch.float16},
    "int4": {"format": "int4", "block_size": 128},
    "uint4": {"format": "uint4", "block_size": 16, "scale_dtype": torch.bfloat16},
    "int8": {"format": "int8"},
    "int8_rows": {"format": "int8", "block_size": "row"},
    "uint8": {"format": "uint8", "block_size": 128},
    "uint8_half": {"format": "uint8", "block_size": 32, "scale_dtype": torch.float16},
    "uint8_rows": {"format": "uint8", "block_size": "row"},
    "nf4_rows": {"block_size": "row"},
    "custom": {"codebook": (1.0, -1.0, 0.5, 0.0, -0.25), "signed_absmax": True},
    "double_quant": {"double_quant": True},
    "double_quant_uint4": {"format": "uint4", "double_quant": True, "block_size": 16},
    "large_blocks": {"block_size": 4096},
    "flat": {"block_order": "flat", "block_size": 32},
    "double_quant_uint8": {"format": "uint8", "double_quant": True},
    "flat_int8": {"block_order": "flat", "block_size": 32, "format": "int8"},
}


def reason_to_skip() -> str | None:
    """Why nothing can run on a GPU here, or None."""
    if not _native.has_cuda_kernels():
        return "this build has no CUDA kernels"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    try:
        _native.cuda_device(0)
    except CudaError as error:
        return str(error)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of this folder, and skips them where there is no GPU."""
    reason = reason_to_skip()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cuda)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=WEIGHTS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Keyword arguments of quantize, in turn."""
    return WEIGHTS[request.param]
