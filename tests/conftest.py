"""Settings of hypothesis, and fixtures that several files use."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from lowbit_rs import _native

# Nothing is downloaded; without this, transformers asks its hub for files that a model directory could have.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile("default", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=3000)
settings.load_profile("ci" if os.environ.get("CI") else "default")


# Tests are small. With more threads than idle cores, torch's would spend their time waiting for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=_native.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine in turn."""
    _native.force_isa(request.param)
    yield request.param
    _native.force_isa(None)


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every dtype of activations and weights in turn."""
    kind: torch.dtype = request.param
    return kind
