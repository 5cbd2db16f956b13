"""Activations in int8 beside int8 weights by row: LLM.int8(), by its definition and beside bitsandbytes."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lowbit_rs
import oracle
from lowbit_rs import InvalidArgument, QuantLinear
from lowbit_rs.compat.bitsandbytes import functional as bnb

GOLDEN = np.load(Path(__file__).parent / "data" / "golden.npz")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def rows(weight: Tensor) -> lowbit_rs.PackedWeight:
    return lowbit_rs.quantize(weight, "int8", "row")


def within(y: Tensor, product: oracle.Int8Product) -> bool:
    """Whether fp32 sums, rounded once to the dtype of y, may be these."""
    step = oracle.unit_roundoff(y.dtype) * (product.y.abs() + product.error) + oracle.half_step(y.dtype)
    return bool(((y.double() - product.y).abs() <= product.error + step + 1e-38).all())


@st.composite
def activations(draw: st.DrawFn) -> Tensor:
    """Rows with outliers planted in some columns, and tiny ones, and zeros."""
    tokens, cols = draw(st.integers(1, 40)), draw(st.integers(1, 200))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(tokens, cols, generator=generator).clamp(-4, 4) * draw(st.sampled_from([1.0, 1e-3, 0.0]))
    planted = st.tuples(st.integers(0, tokens - 1), st.integers(0, cols - 1), st.sampled_from([6.0, -40.0, 9000.0]))
    for token, col, value in draw(st.lists(planted, max_size=5)):
        x[token, col] = value
    return x.to(draw(st.sampled_from(DTYPES)))


@given(x=activations(), outputs=st.integers(1, 40), threshold=st.sampled_from([0.0, 2.5, 6.0]), seed=st.integers(0, 99))
def test_products_are_as_defined(x: Tensor, outputs: int, threshold: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    packed = rows(torch.randn(outputs, x.shape[1], generator=generator))
    rounded = oracle.linear_int8(packed, x, threshold)
    exact = x.double() @ packed.dequantize(torch.float32).double().T
    error = oracle.factor_rounding(packed, x) + rounded.error
    kept = oracle.Int8Product(exact, rounded.codes, rounded.scales, rounded.columns, error)
    for activation in ("int8", "auto"):
        y = lowbit_rs.linear(x, packed, activation=activation, threshold=threshold)
        # A permission: taken, or the product is as exact as without.
        assert within(y, rounded) or within(y, kept)


def test_outliers_are_found_over_all_rows() -> None:
    packed = rows(torch.eye(8, 64))
    x = torch.full((600, 64), 0.3)
    x[:, 1] = 1.0
    x[599, 0] = 100.0
    x[0, 2] = torch.nan
    x[1, 3] = -torch.inf
    y = lowbit_rs.linear(x, packed, activation="int8", threshold=6.0)
    assert y[599, 0] == 100
    assert y[2:599, 0].sub(0.3).abs().max() < 1e-6, "the rest of its column is taken as it is as well"
    assert y[0].isnan().all()
    assert y[1, 3] == -torch.inf
    assert y[2:, 1:4].isfinite().all()


def test_what_most_columns_would_leave_out_is_not_rounded() -> None:
    packed, x = rows(torch.randn(16, 64)), 100 * torch.randn(64, 64)
    y = lowbit_rs.linear(x, packed, activation="int8", threshold=6.0)
    torch.testing.assert_close(y, x @ packed.dequantize().T, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_not_farther_from_the_truth_than_bitsandbytes(threshold: float) -> None:
    """With its own steps, as its layer takes them: integers, int32, two scales, float16, and outliers on top."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(96, 256, generator=generator)
    x = torch.randn(300, 256, generator=generator).half()
    x[:, 7] = (x[:, 7] * 20).half()
    packed = rows(weight)
    truth = x.double() @ weight.double().T
    y = lowbit_rs.linear(x, packed, activation="int8", threshold=threshold)
    codes, absmax, columns = bnb.int8_vectorwise_quant(x, threshold)
    theirs = bnb.int8_mm_dequant(bnb.int8_linear_matmul(codes, packed.data), absmax, packed.scale.flatten() * 127)
    if columns is not None:
        dequantized = bnb.int8_vectorwise_dequant(packed.data, packed.scale * 127).half()
        theirs = (theirs.float() + x[:, columns].float() @ dequantized[:, columns].float().T).half()
    assert (y.double() - truth).norm() <= (theirs.double() - truth).norm() * 1.01


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("shape", ["5x48x96", "33x64x256"])
def test_golden_layers_of_bitsandbytes(shape: str, threshold: float) -> None:
    """Linear8bitLt on a GPU, whose outputs are recorded: nearer to the definition, as near to the float product."""

    def golden(part: str) -> Tensor:
        return torch.from_numpy(GOLDEN[f"int8|{shape}|{part}"])

    x, theirs = (golden(f"{part}|{threshold}").view(torch.float16) for part in ("A", "y"))
    packed = bnb.packed_rows(golden("CB"), golden("SCB"), torch.float16)
    expected = oracle.linear_int8(packed, x, threshold)
    assert torch.equal(expected.columns, golden(f"cols|{threshold}"))
    assert torch.equal(expected.codes.to(torch.int8), golden(f"CA|{threshold}"))
    torch.testing.assert_close(expected.scales.flatten() * 127, golden(f"SCA|{threshold}"), rtol=2.0**-22, atol=0)
    y = lowbit_rs.linear(x, packed, activation="int8", threshold=threshold)
    assert (y.double() - expected.y).norm() <= (theirs.double() - expected.y).norm()
    # What both share, the rounding of factors, is nearly all of this; what they do not may fall either way.
    truth = x.double() @ golden("W").view(torch.float16).double().T
    assert (y.double() - truth).norm() <= (theirs.double() - truth).norm() * 1.01


class TestLayer:
    def test_auto_says_from_when_on_it_rounds(self) -> None:
        layer = QuantLinear(64, 8, format="int8", block_size="row", activation="auto", threshold=4.5)
        assert "activation=auto (" in repr(layer)
        assert repr(layer).endswith(", threshold=4.5)")
        assert "(by device)" in repr(layer.to("meta"))
        assert "threshold" not in repr(QuantLinear(64, 8, activation="auto"))
        assert "(floats)" in repr(QuantLinear(64, 8, activation="auto"))

    def test_auto_takes_other_formats_as_they_are(self) -> None:
        layer = QuantLinear.from_linear(nn.Linear(64, 8), activation="auto")
        x = torch.randn(40, 64)
        y = layer(x)
        layer.activation = "none"
        assert torch.equal(y, layer(x))

    def test_the_threshold_goes_with_the_layer(self) -> None:
        layer = QuantLinear.from_linear(nn.Linear(64, 8), "int8", "row", activation="int8", threshold=None)
        assert copy.deepcopy(layer).threshold is None
        for threshold in (-1.0, float("nan"), float("inf"), "6", True):
            with pytest.raises(InvalidArgument, match=r"threshold: got .*, expected a positive number"):
                QuantLinear(64, 8, threshold=threshold)  # type: ignore[arg-type]

    def test_gradients_are_those_without_rounding(self) -> None:
        layer = QuantLinear.from_linear(nn.Linear(64, 8), "int8", "row", activation="int8")
        x, grad = torch.randn(40, 64, requires_grad=True), torch.randn(40, 8)
        layer(x).backward(grad)
        assert x.grad is not None
        torch.testing.assert_close(x.grad, grad @ layer.dequantize(), rtol=1e-5, atol=1e-5)

    def test_a_model_takes_the_options(self) -> None:
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
        lowbit_rs.quantize_model(model, "int8", "row", activation="auto", threshold=3.0, progress=False)
        layers = [layer for layer in model if isinstance(layer, QuantLinear)]
        assert [(layer.activation, layer.threshold) for layer in layers] == [("auto", 3.0)] * 2
        with pytest.raises(InvalidArgument, match="threshold: got -1"):
            lowbit_rs.quantize_model(nn.Sequential(nn.Linear(8, 8)), threshold=-1, progress=False)
