"""QuantLinear: F.linear's semantics, and everything that torch does with a module."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowbit_rs
import oracle
from lowbit_rs import InvalidArgument, PackedWeight, QuantLinear, Unsupported
from strategies import FORMATS

# Said once of the layers that are packed so here.
pytestmark = pytest.mark.filterwarnings("ignore:a weight in block_order=.flat.:UserWarning")

TABLE = torch.linspace(-1, 1, 9)

#: One of each set of parameters that a layer can have.
OPTIONS: dict[str, dict[str, Any]] = {
    **{format: {"format": format} for format in FORMATS},
    "rows": {"format": "int8", "block_size": "row"},
    "double_quant": {"format": "uint4", "block_size": 32, "double_quant": True},
    "half_scales": {"scale_dtype": torch.float16},
    "custom": {"codebook": TABLE, "signed_absmax": True},
    "flat": {"block_order": "flat"},
}


@pytest.fixture(params=OPTIONS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return OPTIONS[request.param]


@pytest.fixture
def layer(options: dict[str, Any]) -> QuantLinear:
    return QuantLinear.from_linear(nn.Linear(75, 24), **options)


def assert_same(a: QuantLinear, b: QuantLinear) -> None:
    """Equal packed weights and biases, and the same output."""
    assert a.packed == b.packed
    assert (a.bias is None) == (b.bias is None)
    x = torch.randn(3, a.in_features)
    assert torch.equal(a(x), b(x))


class TestForward:
    def test_is_linear_with_the_dequantized_weight(self, layer: QuantLinear, dtype: torch.dtype) -> None:
        x = torch.randn(2, 5, 75).to(dtype)
        y = layer(x)
        wanted = F.linear(x.float(), layer.dequantize(torch.float32), layer.bias)
        assert (y.shape, y.dtype) == ((2, 5, 24), dtype)
        bound = oracle.factor_rounding(layer.packed, x.flatten(0, 1)).unflatten(0, (2, 5))
        bound += torch.finfo(dtype).eps * wanted.abs() + 1e-5
        assert ((y.double() - wanted.double()).abs() - bound).max() <= 0

    def test_without_bias(self) -> None:
        layer = QuantLinear.from_linear(nn.Linear(64, 8, bias=False))
        assert layer.bias is None
        x = torch.randn(3, 64)
        torch.testing.assert_close(layer(x), x @ layer.dequantize().T)

    def test_shapes(self) -> None:
        layer = QuantLinear.from_linear(nn.Linear(64, 8))
        for leading in ((), (1,), (0,), (2, 3), (2, 0, 3)):
            assert layer(torch.randn(*leading, 64)).shape == (*leading, 8)
        assert layer(torch.randn(64, 5).T).shape == (5, 8)

    @pytest.mark.parametrize(("rows", "cols"), [(0, 64), (8, 0), (0, 0)])
    def test_empty_layers(self, rows: int, cols: int) -> None:
        layer = QuantLinear(cols, rows)
        assert layer(torch.randn(3, cols)).shape == (3, rows)
        assert layer(torch.randn(0, cols)).shape == (0, rows)

    def test_compute_dtype(self) -> None:
        linear = nn.Linear(64, 8)
        layer = QuantLinear.from_linear(linear, compute_dtype=torch.bfloat16)
        plain = QuantLinear.from_linear(linear)
        x = torch.randn(3, 64)
        y = layer(x)
        assert y.dtype == torch.float32
        assert torch.equal(y, plain(x.bfloat16()).float())
        assert layer(x.double()).dtype == torch.float64  # any dtype that can be cast
        assert torch.equal(layer(x.bfloat16()), plain(x.bfloat16()))
        with pytest.raises(InvalidArgument, match=r"compute_dtype: got torch\.float64"):
            QuantLinear.from_linear(linear, compute_dtype=torch.float64)

    def test_autocast(self) -> None:
        linear = nn.Linear(64, 8)
        x = torch.randn(3, 64)
        for compute_dtype in (None, torch.float16):
            layer = QuantLinear.from_linear(linear, compute_dtype=compute_dtype)
            with torch.autocast("cpu", torch.bfloat16):
                y = layer(x)
                assert y.dtype == linear(x).dtype == torch.bfloat16
            assert torch.equal(y, layer(x.bfloat16()))

    def test_gradients(self, layer: QuantLinear) -> None:
        x = torch.randn(2, 3, 75, requires_grad=True)
        layer(x).square().sum().backward()
        assert x.grad is not None
        reference = x.detach().requires_grad_()
        F.linear(reference, layer.dequantize(), layer.bias).square().sum().backward()
        torch.testing.assert_close(x.grad, reference.grad)
        assert all(parameter.grad is None for parameter in layer.parameters())

    def test_gradient_to_a_bias_that_asks_for_it(self) -> None:
        layer = QuantLinear.from_linear(nn.Linear(64, 8))
        assert layer.bias is not None
        layer.bias.requires_grad_()
        layer(torch.randn(2, 3, 64)).sum().backward()
        assert torch.equal(layer.bias.grad, torch.full((8,), 6.0))  # type: ignore[arg-type]

    def test_checkpointing(self) -> None:
        """Gradient checkpointing runs the forward again under the same state."""
        from torch.utils.checkpoint import checkpoint

        layer, x = QuantLinear.from_linear(nn.Linear(64, 8)), torch.randn(3, 64, requires_grad=True)
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(3, 64))

    def test_errors_name_the_argument(self) -> None:
        layer = QuantLinear(64, 8)
        with pytest.raises(InvalidArgument, match=r"x: got shape \[3, 63\], expected \[\.\.\., 64\]"):
            layer(torch.randn(3, 63))
        with pytest.raises(InvalidArgument, match=r"x: got torch\.float64"):
            layer(torch.randn(3, 64).double())


class TestConstruction:
    def test_of_a_layer_to_be_loaded(self, options: dict[str, Any]) -> None:
        layer = QuantLinear(75, 24, **options)
        assert isinstance(layer, nn.Linear)
        assert (layer.in_features, layer.out_features) == (75, 24)
        assert not layer.dequantize().any()
        assert not layer(torch.randn(2, 75)).any()
        assert QuantLinear(75, 24, bias=False, **options).bias is None

    def test_parameters_are_frozen_and_named(self, layer: QuantLinear) -> None:
        names = dict(layer.named_parameters())
        fields = layer.packed.tensors()
        assert set(names) == {"bias", "weight", *(f"weight_{field}" for field in fields if field != "data")}
        assert not any(parameter.requires_grad for parameter in layer.parameters())
        assert not list(layer.buffers())
        assert all(type(parameter) is nn.Parameter for parameter in layer.parameters())

    def test_dtype_is_that_of_the_bias_and_of_dequantize(self) -> None:
        layer = QuantLinear(64, 8, dtype=torch.bfloat16)
        assert layer.bias is not None
        assert layer.bias.dtype == layer.dequantize().dtype == layer.packed.dtype == torch.bfloat16
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float16)
        try:
            assert QuantLinear(64, 8).dtype == torch.float16
        finally:
            torch.set_default_dtype(default)

    def test_from_linear_keeps_what_belongs_to_the_layer(self) -> None:
        linear = nn.Linear(64, 8, dtype=torch.bfloat16).eval()
        layer = QuantLinear.from_linear(linear)
        assert not layer.training
        assert layer.dtype == torch.bfloat16
        assert torch.equal(layer.bias, linear.bias)
        with torch.no_grad():
            linear.bias.add_(1)
        assert not torch.equal(layer.bias, linear.bias)
        assert layer.packed == lowbit_rs.quantize(linear.weight)

    def test_from_packed_shares_memory(self) -> None:
        packed, bias = lowbit_rs.quantize(torch.randn(8, 64)), torch.randn(8)
        layer = QuantLinear.from_packed(packed, bias)
        assert layer.weight.data_ptr() == packed.data.data_ptr()
        assert layer.packed.scale.data_ptr() == packed.scale.data_ptr()
        assert layer.packed == packed
        assert torch.equal(layer(torch.ones(1, 64)), lowbit_rs.linear(torch.ones(1, 64), packed, bias))

    def test_packed_is_what_it_was_made_from(self, options: dict[str, Any]) -> None:
        for more in ({}, {"scale_dtype": torch.bfloat16}, {"double_quant": True, "scale_dtype": torch.float16}):
            packed = lowbit_rs.quantize(torch.randn(24, 75), **(options | more))
            assert QuantLinear.from_packed(packed).packed == packed
            assert pickle.loads(pickle.dumps(QuantLinear.from_packed(packed))).packed == packed

    def test_activation_goes_with_the_layer(self) -> None:
        for layer in (
            QuantLinear(64, 8, activation="int8"),
            QuantLinear.from_linear(nn.Linear(64, 8), activation="int8"),
            QuantLinear.from_packed(lowbit_rs.quantize(torch.randn(8, 64)), activation="int8"),
        ):
            for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.half()):
                assert copied.activation == "int8"
                assert "activation=int8" in repr(copied)
        with pytest.raises(InvalidArgument, match="activation: got 'int4'"):
            QuantLinear(64, 8, activation="int4")

    def test_to_linear_and_back(self, options: dict[str, Any]) -> None:
        layer = QuantLinear.from_linear(nn.Linear(75, 24), **options).eval()
        linear = layer.to_linear()
        assert type(linear) is nn.Linear
        assert not linear.training
        assert linear.weight.requires_grad
        assert torch.equal(linear.weight, layer.dequantize())
        assert torch.equal(linear.bias, layer.bias)
        assert layer.to_linear(torch.float16).bias.dtype == torch.float16

    @pytest.mark.parametrize(
        ("arguments", "options", "message"),
        [
            ((-1, 8), {}, "in_features: got -1, expected a non-negative integer"),
            ((64, 2.0), {}, r"out_features: got 2\.0"),
            ((64, 8), {"format": "custom"}, "codebook: got None, expected the 2 to 16 values"),
            ((64, 8), {"block_size": 48}, "block_size: got 48"),
            ((64, 8), {"dtype": torch.float64}, "dtype: got torch.float64"),
        ],
    )
    def test_wrong_arguments(self, arguments: Any, options: dict[str, Any], message: str) -> None:
        with pytest.raises(InvalidArgument, match=message):
            QuantLinear(*arguments, **options)

    def test_wrong_sources(self) -> None:
        with pytest.raises(InvalidArgument, match=r"linear: got Conv2d, expected a torch\.nn\.Linear"):
            QuantLinear.from_linear(nn.Conv2d(1, 1, 1))  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match="linear: got QuantLinear"):
            QuantLinear.from_linear(QuantLinear(64, 8))
        with pytest.raises(InvalidArgument, match="tensor: got a meta tensor"):
            QuantLinear.from_linear(nn.Linear(64, 8, device="meta"))
        with pytest.raises(Unsupported, match=r"packed: shape \[2, 8, 64\]: not supported"):
            QuantLinear.from_packed(lowbit_rs.quantize(torch.randn(2, 8, 64)))
        with pytest.raises(InvalidArgument, match=r"bias: got shape \[7\], expected \[8\]"):
            QuantLinear.from_packed(lowbit_rs.quantize(torch.randn(8, 64)), torch.zeros(7))

    def test_repr_is_the_constructor(self) -> None:
        assert repr(QuantLinear(64, 8, bias=False, double_quant=True, compute_dtype=torch.bfloat16)) == (
            "QuantLinear(in_features=64, out_features=8, bias=False, nf4, block_size=64, double_quant, "
            "compute_dtype=torch.bfloat16)"
        )


class TestCasts:
    def test_packed_parameters_survive(self, layer: QuantLinear) -> None:
        before = layer.packed
        for cast in ("half", "bfloat16", "double", "float"):
            getattr(layer, cast)()
            assert layer.bias is not None
            assert layer.bias.dtype == {"half": torch.float16, "bfloat16": torch.bfloat16}.get(
                cast, torch.float64 if cast == "double" else torch.float32
            )
            assert layer.packed.tensors().keys() == before.tensors().keys()
            for name, tensor in layer.packed.tensors().items():
                assert torch.equal(tensor, before.tensors()[name])
                assert tensor.dtype == before.tensors()[name].dtype

    def test_dtype_follows(self) -> None:
        layer = QuantLinear(64, 8)
        nn.Sequential(layer).to(torch.bfloat16)
        assert layer.dequantize().dtype == torch.bfloat16
        assert layer.to_linear().weight.dtype == torch.bfloat16
        layer.to(torch.device("cpu"), torch.float16)
        assert layer.dequantize().dtype == torch.float16
        layer.double()  # no dtype of packed weights: the last one stays
        assert layer.dequantize().dtype == torch.float16

    def test_scales_cast_by_someone_else_are_taken_as_they_are(self) -> None:
        """peft.prepare_model_for_kbit_training casts every 16-bit Parameter to fp32 through .data."""
        layer = QuantLinear.from_linear(nn.Linear(64, 8), "uint4", scale_dtype=torch.bfloat16)
        x = torch.randn(3, 64)
        before = layer(x)
        for parameter in layer.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.to(torch.float32)
        assert torch.equal(layer(x), before)
        assert layer.spec.scale_dtype == "float32"

    def test_parameters_that_cannot_be_read_are_refused(self) -> None:
        """Never a read out of bounds, whatever someone assigns."""
        layer, x = QuantLinear.from_linear(nn.Linear(64, 8)), torch.randn(1, 64)
        good = layer.weight.data
        for bad, message in (
            (good[:4], "data|codes"),
            (good.float(), "data: got a torch.float32 tensor on cpu, expected contiguous torch.uint8 on the CPU"),
            (good.repeat(1, 2)[:, ::2], "data: got a non-contiguous torch.uint8 tensor"),
        ):
            layer.weight.data = bad
            with pytest.raises(InvalidArgument, match=message):
                layer(x)


class TestState:
    def test_round_trip(self, layer: QuantLinear, options: dict[str, Any]) -> None:
        empty = QuantLinear(75, 24, **options)
        state = layer.state_dict()
        assert all(isinstance(value, Tensor) for value in state.values())
        empty.load_state_dict(state, strict=True)
        assert_same(layer, empty)
        assert empty.weight.data_ptr() != layer.weight.data_ptr()

    def test_assign(self, layer: QuantLinear, options: dict[str, Any]) -> None:
        empty = QuantLinear(75, 24, device="meta", **options)
        assert all(parameter.is_meta for parameter in empty.parameters())
        state = layer.state_dict()
        empty.load_state_dict(state, assign=True)
        assert_same(layer, empty)
        assert empty.weight.data_ptr() == state["weight"].data_ptr()
        assert not any(parameter.requires_grad for parameter in empty.parameters())

    def test_files_and_copies(self, layer: QuantLinear, options: dict[str, Any]) -> None:
        assert_same(layer, copy.deepcopy(layer))
        assert_same(layer, pickle.loads(pickle.dumps(layer)))
        whole, state = io.BytesIO(), io.BytesIO()
        torch.save(layer, whole)
        torch.save(layer.state_dict(), state)
        whole.seek(0)
        state.seek(0)
        assert_same(layer, torch.load(whole, weights_only=False))
        empty = QuantLinear(75, 24, **options)
        empty.load_state_dict(torch.load(state, weights_only=True))
        assert_same(layer, empty)

    def test_safetensors(self, layer: QuantLinear, options: dict[str, Any]) -> None:
        import safetensors.torch

        empty = QuantLinear(75, 24, **options)
        empty.load_state_dict(safetensors.torch.load(safetensors.torch.save(layer.state_dict())))
        assert_same(layer, empty)

    def test_parameters_as_plain_tensors(self, layer: QuantLinear) -> None:
        """Offloading moves parameters through state_dict() and back by name."""
        for name, parameter in layer.named_parameters():
            layer._parameters[name] = nn.Parameter(parameter.data.clone(), requires_grad=False)
        assert_same(layer, copy.deepcopy(layer))

    def test_meta_device(self, options: dict[str, Any]) -> None:
        with torch.device("meta"):
            layer = QuantLinear(75, 24, **options)
        assert all(parameter.is_meta for parameter in layer.parameters())
        y = layer(torch.randn(2, 75, device="meta"))
        assert (y.shape, y.is_meta) == ((2, 24), True)
        filled = layer.to_empty(device="cpu")
        dtypes = {name: parameter.dtype for name, parameter in QuantLinear(75, 24, **options).named_parameters()}
        assert {name: parameter.dtype for name, parameter in filled.named_parameters()} == dtypes
        filled.reset_parameters()
        if "codebook" not in options:
            assert not filled(torch.randn(2, 75)).any()

    def test_float_weight_is_quantized_on_the_way_in(self, options: dict[str, Any]) -> None:
        linear = nn.Linear(75, 24)
        wanted = QuantLinear.from_linear(linear, **options)
        layer = QuantLinear(75, 24, **options)
        layer.load_state_dict(linear.state_dict())
        assert_same(layer, wanted)
        assert layer.dtype == torch.float32

    def test_float_weight_can_be_assigned(self) -> None:
        linear = nn.Linear(75, 24, dtype=torch.bfloat16)
        layer = QuantLinear(75, 24, device="meta")
        layer.load_state_dict(linear.state_dict(), assign=True)
        assert layer.packed == lowbit_rs.quantize(linear.weight)
        assert layer.dequantize().dtype == torch.bfloat16

    def test_float_weight_inside_a_model(self) -> None:
        floats = nn.Linear(75, 24), nn.Linear(24, 3)
        packed = QuantLinear(75, 24), QuantLinear(24, 3, format="int8")
        state = nn.Sequential(*floats).state_dict()
        nn.Sequential(*packed).load_state_dict(state)
        assert packed[0].packed == lowbit_rs.quantize(floats[0].weight)
        assert packed[1].packed == lowbit_rs.quantize(floats[1].weight, "int8")
        assert torch.equal(state["0.weight"], floats[0].weight)  # the caller's dictionary is as it was

    @pytest.mark.parametrize(
        ("saved", "options", "message"),
        [
            ({"format": "fp4"}, {}, "weight: got a weight packed as fp4, block_size=64.*, expected nf4, block_size=64"),
            ({"block_size": 32}, {}, "packed as nf4, block_size=32.*, expected nf4, block_size=64"),
            ({"format": "int8"}, {}, "packed as int8.*, expected nf4"),
            ({"double_quant": True}, {}, "packed as nf4, block_size=64, double_quant, expected nf4"),
            ({}, {"scale_dtype": torch.float16}, r"got torch.float32 in weight_scale, expected torch.float16 for nf4"),
        ],
    )
    def test_other_formats_are_refused(self, saved: dict[str, Any], options: dict[str, Any], message: str) -> None:
        state = QuantLinear.from_linear(nn.Linear(64, 8), **saved).state_dict()
        with pytest.raises(RuntimeError, match=message):
            QuantLinear(64, 8, **options).load_state_dict(state)

    @pytest.mark.parametrize(
        ("saved", "message"),
        [
            ({"format": "int8"}, "got torch.int8 in weight, expected torch.uint8 for nf4"),
            ({"double_quant": True}, "got torch.uint8 in weight_scale, expected torch.float32 for nf4"),
            ({"block_size": 32}, "size mismatch for weight_scale"),
            ({"format": "uint4"}, 'Unexpected key.*"weight_shift"'),
        ],
    )
    def test_other_formats_are_refused_without_metadata(self, saved: dict[str, Any], message: str) -> None:
        """As from a safetensors file, which holds tensors alone."""
        state = dict(QuantLinear.from_linear(nn.Linear(64, 8), **saved).state_dict())
        with pytest.raises(RuntimeError, match=message):
            QuantLinear(64, 8).load_state_dict(state)

    def test_narrower_scales_are_widened(self) -> None:
        source = QuantLinear.from_linear(nn.Linear(64, 8), scale_dtype=torch.bfloat16)
        layer = QuantLinear(64, 8)
        layer.load_state_dict(source.state_dict())
        assert torch.equal(layer.dequantize(), source.dequantize())

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ({"weight": torch.zeros(8, 63)}, r"got a torch.float32 weight \[8, 63\], expected a float .* \[8, 64\]"),
            ({"weight": torch.zeros(8, 64), "weight_scale": torch.zeros(8, 1)}, r"\[8, 64\] beside weight_scale"),
            ({"weight": torch.full((8, 64), torch.nan)}, r"weight: tensor: element \[0, 0\] is NaN"),
            ({"weight": torch.zeros(8, 64).double()}, "weight: tensor: got torch.float64"),
            ({}, 'Missing key.*"weight", "weight_scale"'),
        ],
    )
    def test_bad_states_are_refused(self, state: dict[str, Tensor], message: str) -> None:
        layer = QuantLinear(64, 8, bias=False)
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(state)
        assert not layer.dequantize().any()


def test_blocks_that_straddle_rows_are_said_to_be_slow() -> None:
    with pytest.warns(UserWarning, match='block_order="flat" whose rows are no whole number of blocks'):
        QuantLinear(75, 24, block_order="flat")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        QuantLinear(128, 24, block_order="flat")


def test_functional_call() -> None:
    layer, x = QuantLinear.from_linear(nn.Linear(64, 8)), torch.randn(3, 64)
    other = QuantLinear.from_linear(nn.Linear(64, 8))
    assert torch.equal(torch.func.functional_call(layer, dict(other.named_parameters()), x), other(x))


def test_packed_is_a_view() -> None:
    layer = QuantLinear.from_linear(nn.Linear(64, 8))
    packed = layer.packed
    assert isinstance(packed, PackedWeight)
    packed.scale.zero_()
    assert not layer.dequantize().any()
