"""quantize_model and dequantize_model: what they replace, what they leave alone, and what they say about it."""

from __future__ import annotations

import copy
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lowbit_rs
from lowbit_rs import (
    InvalidArgument,
    PackedWeight,
    QuantEmbedding,
    QuantLinear,
    Report,
    Unsupported,
    dequantize_model,
    quantize_model,
)
from lowbit_rs.nn import model as nn_model
from lowbit_rs.nn.report import ReportRow, relative_error


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(x)))
        return x + y


class Model(nn.Module):
    """The names of a small language model."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.lm_head = nn.Linear(64, 50, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.lm_head(x)
        return y


LINEARS = ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]


def packed_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantLinear | QuantEmbedding)]


def linear_at(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def packed_at(model: nn.Module, name: str) -> PackedWeight:
    module = model.get_submodule(name)
    assert isinstance(module, QuantLinear | QuantEmbedding)
    return module.packed


def quantize_quietly(model: nn.Module, *arguments: Any, **options: Any) -> Report:
    return quantize_model(model, *arguments, progress=False, **options)


class TestReplacement:
    def test_replaces_linear_layers_in_place(self) -> None:
        model = Model()
        original = copy.deepcopy(model)
        report = quantize_quietly(model, "int8", 32, compute_dtype=torch.bfloat16)
        assert packed_names(model) == LINEARS == [row.name for row in report.rows]
        for name in LINEARS:
            layer, linear = model.get_submodule(name), original.get_submodule(name)
            assert isinstance(layer, QuantLinear)
            assert isinstance(linear, nn.Linear)
            assert layer.compute_dtype == torch.bfloat16
            assert layer.packed == lowbit_rs.quantize(linear.weight, "int8", 32)
            assert (layer.bias is None) == (linear.bias is None)
        assert report.skipped == {"lm_head": "matches skip='lm_head'"}
        assert type(model.embed) is nn.Embedding

    def test_the_model_computes_nearly_the_same(self) -> None:
        """8 bits are a relative error of at most 1/254 of a block's largest weight, in each of five layers."""
        model, tokens = Model(), torch.randint(50, (2, 7))
        before = model(tokens).detach()
        quantize_quietly(model, "int8", 16, skip=(), embeddings=True)
        assert float((model(tokens).detach() - before).norm() / before.norm()) < 5 / 254

    def test_every_option_reaches_the_layers(self) -> None:
        options: dict[str, Any] = {
            "codebook": (-1.0, -0.3, 0.0, 0.3, 1.0),
            "block_size": 16,
            "scale_dtype": torch.bfloat16,
            "block_order": "flat",
            "signed_absmax": True,
        }
        model = Model()
        weight = linear_at(model, "layers.0.up").weight.detach()
        quantize_quietly(model, **options)
        assert packed_at(model, "layers.0.up") == lowbit_rs.quantize(weight, **options)

    def test_embeddings(self) -> None:
        model = Model()
        weight = model.embed.weight.detach()
        report = quantize_quietly(model, embeddings=True)
        assert [row.name for row in report.rows] == ["embed", *LINEARS]
        assert isinstance(model.embed, QuantEmbedding)
        assert model.embed.packed == lowbit_rs.quantize(weight)

    def test_float_weights_are_freed_one_by_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = Model()
        weights = [weakref.ref(model.get_submodule(name).weight) for name in LINEARS]
        alive: list[int] = []
        from_linear = QuantLinear.from_linear.__func__  # type: ignore[attr-defined]

        def watched(cls: type[QuantLinear], linear: nn.Linear, /, **options: Any) -> QuantLinear:
            alive.append(sum(weight() is not None for weight in weights))
            layer: QuantLinear = from_linear(cls, linear, **options)
            return layer

        monkeypatch.setattr(QuantLinear, "from_linear", classmethod(watched))
        quantize_quietly(model)
        assert alive == [4, 3, 2, 1]
        assert not any(weight() is not None for weight in weights)

    def test_a_module_that_stands_in_two_places_is_replaced_in_both(self) -> None:
        shared = nn.Linear(64, 64)
        model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(64, 8))})
        report = quantize_quietly(model)
        assert [row.name for row in report.rows] == ["a", "b.1"]
        assert isinstance(model["a"], QuantLinear)
        assert model["a"] is model["b"][0]  # type: ignore[index]

    def test_hooks_stay(self) -> None:
        model = nn.Sequential(nn.Linear(64, 8))
        seen: list[str] = []
        model[0].register_forward_pre_hook(lambda *_: seen.append("before"))
        handle = model[0].register_forward_hook(lambda *_: seen.append("after"))
        quantize_quietly(model)
        model(torch.randn(1, 64))
        handle.remove()
        model(torch.randn(1, 64))
        assert seen == ["before", "after", "before"]

    def test_training_flag_stays(self) -> None:
        model = Model().eval()
        quantize_quietly(model)
        assert not any(module.training for module in model.modules())


class TestSkipping:
    @pytest.mark.parametrize(
        ("skip", "left"),
        [
            ((), [*LINEARS, "lm_head"]),
            (("layers.0",), ["layers.1.up", "layers.1.down", "lm_head"]),
            ("down", ["layers.0.up", "layers.1.up", "lm_head"]),
            (["1.up"], ["layers.0.up", "layers.0.down", "layers.1.down", "lm_head"]),
            (("layers.*.up", "lm_*"), ["layers.0.down", "layers.1.down"]),
            (("layers.[0]*",), ["layers.1.up", "layers.1.down", "lm_head"]),
            (("own", "layer", "head"), [*LINEARS, "lm_head"]),
        ],
    )
    def test_by_name(self, skip: Any, left: list[str]) -> None:
        model = Model()
        report = quantize_quietly(model, skip=skip)
        assert packed_names(model) == left
        assert set(report.skipped) == {*LINEARS, "lm_head"} - set(left)
        assert all(reason.startswith("matches skip=") for reason in report.skipped.values())

    def test_names_of_more_components(self) -> None:
        assert nn_model.matches("model.lm_head", "lm_head")
        assert nn_model.matches("lm_head", "lm_head")
        assert nn_model.matches("lm_head.dense", "lm_head")
        assert not nn_model.matches("model.lm_head.dense", "lm_head")
        assert not nn_model.matches("my_lm_head", "lm_head")

    def test_tied_weights(self) -> None:
        model = Model(tied=True)
        report = quantize_quietly(model, skip=(), embeddings=True)
        assert packed_names(model) == LINEARS
        assert report.skipped == {
            "embed": "its weight is tied to lm_head",
            "lm_head": "its weight is tied to embed",
        }
        assert model.lm_head.weight is model.embed.weight

    def test_packed_layers(self) -> None:
        model = Model()
        quantize_quietly(model, "int8", skip=("layers.1", "lm_head"))
        report = quantize_quietly(model)
        assert report.skipped["layers.0.up"] == "already packed"
        assert [row.name for row in report.rows] == LINEARS[2:]
        assert packed_at(model, "layers.0.up").spec.format == "int8"

    def test_layers_that_are_more_than_linear(self) -> None:
        class Scaled(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:
                return super().forward(input) * 2

        class Plain(nn.Linear):
            pass

        patched = nn.Linear(64, 64)
        patched.forward = lambda input: input  # type: ignore[method-assign]
        model = nn.ModuleDict(
            {
                "scaled": Scaled(64, 64),
                "patched": patched,
                "parametrized": parametrizations.orthogonal(nn.Linear(64, 64)),
                "wide": nn.Linear(64, 64, dtype=torch.float64),
                "attention": nn.MultiheadAttention(64, 4),
                "encoder": nn.TransformerEncoderLayer(64, 4, 64),
                "renormed": nn.Embedding(5, 64, max_norm=1.0),
                "plain": Plain(64, 64),
            }
        )
        report = quantize_quietly(model, embeddings=True)
        assert [row.name for row in report.rows] == ["plain"]
        assert report.skipped == {
            "scaled": "Scaled has a forward of its own",
            "patched": "Linear has a forward of its own",
            "parametrized": "its weight is not a parameter (parametrization)",
            "wide": "its weight is torch.float64",
            "attention.out_proj": "MultiheadAttention reads its weight without calling it",
            "encoder.self_attn.out_proj": "TransformerEncoderLayer reads its weight without calling it",
            "encoder.linear1": "TransformerEncoderLayer reads its weight without calling it",
            "encoder.linear2": "TransformerEncoderLayer reads its weight without calling it",
            "renormed": "max_norm rewrites its rows",
        }
        x = torch.randn(2, 3, 64)
        with torch.no_grad():
            assert model["encoder"].eval()(x).shape == model["attention"](x, x, x)[0].shape

    def test_nothing_to_replace_is_a_warning(self) -> None:
        with pytest.warns(UserWarning, match="quantize_model replaced no layer: the model has no nn.Linear"):
            assert quantize_quietly(nn.Sequential(nn.ReLU())).rows == []
        with pytest.warns(UserWarning, match="replaced no layer\n  lm_head: matches skip='lm_head'"):
            quantize_quietly(nn.ModuleDict({"lm_head": nn.Linear(64, 8)}))


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"format": "nf5"}, 'format: got "nf5"'),
            ({"format": "custom"}, "codebook: got None"),
            ({"block_size": 48}, "block_size: got 48"),
            ({"codebook": [1.0]}, r"codebook: got shape \[1\]"),
            ({"nonfinite": "skip"}, "nonfinite: got 'skip'"),
            ({"compute_dtype": torch.float64}, "compute_dtype: got torch.float64"),
            ({"scale_dtype": torch.int8}, "scale_dtype: got torch.int8"),
        ],
    )
    def test_bad_options_change_nothing(self, options: dict[str, Any], message: str) -> None:
        model = Model()
        with pytest.raises(InvalidArgument, match=message):
            quantize_quietly(model, **options)
        assert packed_names(model) == []

    def test_meta_weights_change_nothing(self) -> None:
        model = Model()
        model.layers[1].add_module("down", nn.Linear(96, 64, device="meta"))
        with pytest.raises(
            InvalidArgument, match=r"model: got the meta tensor layers\.1\.down\.weight, .* loaded weights"
        ):
            quantize_quietly(model)
        assert packed_names(model) == []

    def test_a_bare_layer_has_no_place_to_be_replaced(self) -> None:
        with pytest.raises(InvalidArgument, match="model: got Linear, expected a module that contains layers"):
            quantize_quietly(nn.Linear(64, 8))
        with pytest.raises(InvalidArgument, match="model: got QuantLinear, expected a module that contains layers"):
            dequantize_model(QuantLinear(64, 8))

    def test_nonfinite_weight_is_named_and_leaves_a_working_model(self) -> None:
        model = Model()
        with torch.no_grad():
            linear_at(model, "layers.1.up").weight[3, 5] = torch.nan
        with pytest.raises(InvalidArgument, match=r"layers\.1\.up\.weight: tensor: element \[3, 5\] is NaN"):
            quantize_quietly(model)
        assert packed_names(model) == LINEARS[:2]
        assert model(torch.randint(50, (2, 7))).shape == (2, 7, 50)
        report = quantize_quietly(model, nonfinite="propagate")
        assert [row.name for row in report.rows] == LINEARS[2:]
        assert math.isnan(report.rows[0].relative_error or 0)

    def test_devices_without_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(device: torch.device) -> None:
            raise Unsupported(f"device {device}")

        monkeypatch.setattr(nn_model, "backend_of", refuse)
        model = Model()
        with pytest.raises(Unsupported, match="device cpu"):
            quantize_quietly(model)
        assert packed_names(model) == []


class TestReport:
    def test_sizes_and_errors(self) -> None:
        model = Model().to(torch.bfloat16)
        weight = linear_at(model, "layers.0.up").weight.detach()
        report = quantize_quietly(model)
        row = report.rows[0]
        packed = lowbit_rs.quantize(weight)
        error = (packed.dequantize(torch.float32) - weight.float()).norm() / weight.float().norm()
        assert (row.name, row.shape) == ("layers.0.up", (96, 64))
        assert (row.bytes_before, row.bytes_after) == (96 * 64 * 2, 96 * 64 // 2 + 96 * 4)
        assert row.relative_error == pytest.approx(float(error), rel=1e-5)
        assert report.bytes_before == sum(row.bytes_before for row in report.rows)
        assert report.bytes_after == sum(row.bytes_after for row in report.rows)

    def test_table(self) -> None:
        report = Report(
            "nf4, block_size=64, scale=float32",
            [ReportRow("layers.0.up", (96, 64), 24576, 3456, 0.09151), ReportRow("down", (64, 96), 24576, 3456, 0.1)],
            {"lm_head": "matches skip='lm_head'"},
        )
        assert str(report).splitlines() == [
            "packed as nf4, block_size=64, scale=float32",
            "layer        shape     before   after  relative error",
            "-----------------------------------------------------",
            "layers.0.up  96 x 64  24.6 kB  3.5 kB          0.0915",
            "down         64 x 96  24.6 kB  3.5 kB          0.1000",
            "-----------------------------------------------------",
            "2 layers              49.2 kB  6.9 kB",
            "skipped lm_head: matches skip='lm_head'",
        ]

    @pytest.mark.parametrize("format", ["nf4", "int8"])
    def test_relative_error_in_chunks(self, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
        weight = torch.randn(37, 100)
        packed = lowbit_rs.quantize(weight, format)
        exact = float((packed.dequantize().double() - weight.double()).norm() / weight.double().norm())
        for chunk in (1, 700, 1 << 20):
            monkeypatch.setattr("lowbit_rs.nn.report._CHUNK", chunk)
            assert relative_error(weight, packed) == pytest.approx(exact, rel=1e-5)

    def test_relative_error_of_zeros(self) -> None:
        weight = torch.zeros(3, 64)
        assert relative_error(weight, lowbit_rs.quantize(weight)) == 0

    def test_progress_bar(self, capsys: pytest.CaptureFixture[str]) -> None:
        quantize_model(Model())
        assert "quantize: 100%" in capsys.readouterr().err
        quantize_quietly(Model())
        captured = capsys.readouterr()
        assert captured.out == captured.err == ""


class TestDequantize:
    def test_restores_torch_modules(self) -> None:
        model, tokens = Model().eval(), torch.randint(50, (2, 7))
        quantize_quietly(model, embeddings=True)
        packed = {name: packed_at(model, name) for name in packed_names(model)}
        before = model(tokens)
        dequantize_model(model)
        assert packed_names(model) == []
        for name, weight in packed.items():
            module = model.get_submodule(name)
            assert type(module) in (nn.Linear, nn.Embedding)
            assert torch.equal(module.get_parameter("weight"), weight.dequantize())
        torch.testing.assert_close(model(tokens), before)
        assert not any(module.training for module in model.modules())
        model.to(torch.float16)
        assert linear_at(model, "layers.0.up").weight.dtype == torch.float16

    def test_in_another_dtype(self) -> None:
        model = Model()
        quantize_quietly(model)
        dequantize_model(model, torch.bfloat16)
        assert linear_at(model, "layers.0.up").weight.dtype == torch.bfloat16
        assert linear_at(model, "layers.0.up").bias.dtype == torch.bfloat16

    def test_state_of_a_model_round_trips(self) -> None:
        model = Model()
        quantize_quietly(model, "uint4", double_quant=True)
        empty = Model()
        quantize_quietly(empty, "uint4", double_quant=True)
        empty.load_state_dict(model.state_dict(), strict=True)
        tokens = torch.randint(50, (2, 7))
        assert torch.equal(empty(tokens), model(tokens))
