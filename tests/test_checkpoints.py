"""Checkpoints of other libraries as native ones: the same weights, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import lowbit_rs
from foreign import EXPECTED, case, write_case, write_directory
from lowbit_rs import InvalidArgument, PackedWeight, Unsupported
from lowbit_rs.cli import main
from lowbit_rs.files import inspect, load_packed, quantize_file
from lowbit_rs.integrations.checkpoints import convert_file
from lowbit_rs.packed import describe

#: What each case becomes.
BECOMES = {
    "bitsandbytes-nf4-nested": "nf4, block_size=64, double_quant",
    "bitsandbytes-nf4-float-storage": "nf4, block_size=32, double_quant",
    "bitsandbytes-fp4": "fp4, block_size=64, scale=float32",
    "bitsandbytes-nf4-straddling": "nf4, block_size=64, scale=float32, block_order=flat",
    "bitsandbytes-int8": "int8, block_size=row, scale=float32",
    "gptq-sym": "int4, block_size=32, scale=float16",
    "gptq-asym": "uint4, block_size=32, scale=float32",
    "gptq-v2": "uint4, block_size=32, scale=float32",
    "gptq-desc-act": "uint4, block_size=32, scale=float32",
    "gptq-row": "int4, block_size=row, scale=float16",
    "gptq-8bit": "int8, block_size=32, scale=float16",
    "gptq-8bit-asym": "uint8, block_size=32, scale=float32",
    "awq-gemm": "uint4, block_size=32, scale=float32",
    "awq-gemv": "uint4, block_size=64, scale=float32",
    "compressed-tensors-w4a16": "int4, block_size=32, scale=bfloat16",
    "compressed-tensors-w4a16-asym": "uint4, block_size=32, scale=float32",
    "compressed-tensors-w4a16-channel": "int4, block_size=row, scale=float16",
    "compressed-tensors-w8a16": "int8, block_size=64, scale=bfloat16",
    "compressed-tensors-w8a16-channel": "int8, block_size=row, scale=float16",
    "compressed-tensors-w8a16-asym": "uint8, block_size=32, scale=float32",
}


def converted(path: Path, name: str) -> PackedWeight:
    source = write_case(path / "source", name)
    convert_file(source, path / "native")
    weight = load_packed(path / "native")["layer.weight"]
    assert isinstance(weight, PackedWeight)
    return weight


@pytest.mark.parametrize("name", BECOMES)
def test_weights_are_those_that_the_library_decodes(name: str, tmp_path: Path) -> None:
    """Bit for bit, in the dtype in which the library gives them.

    But for bitsandbytes' int8: w = q * SCB / 127 takes two roundings of at most 2^-24 here, and three there.
    """
    weight, expected = converted(tmp_path, name), EXPECTED[name]
    assert describe(weight.spec) == BECOMES[name]
    assert weight.shape == expected.shape
    if name == "bitsandbytes-int8":
        assert expected.dtype == torch.float32
        torch.testing.assert_close(weight.dequantize(torch.float32), expected, rtol=5.01 * 2.0**-24, atol=0)
    else:
        assert torch.equal(weight.dequantize(expected.dtype), expected)


@pytest.mark.parametrize("name", BECOMES)
def test_directory_is_native_and_whole(name: str, tmp_path: Path) -> None:
    source = write_case(tmp_path / "source", name, hidden_size=128, dtype="float16")
    (source / "tokenizer.json").write_text("{}", encoding="utf-8")
    (source / "quantize_config.json").write_text("{}", encoding="utf-8")
    summary = convert_file(source, tmp_path / "native")
    assert summary.converted == ("layer.weight",)
    assert sorted(path.name for path in (tmp_path / "native").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    config = json.loads((tmp_path / "native" / "config.json").read_text(encoding="utf-8"))
    rounding = {"activation": "auto", "threshold": 6.0} if name == "bitsandbytes-int8" else {}
    assert config.pop("quantization_config") == {"quant_method": "lowbit", "format_version": 1, **rounding}
    assert config == {"hidden_size": 128, "dtype": "float16"}
    assert inspect(tmp_path / "native").foreign_scheme is None
    names = set(load_file(tmp_path / "native" / "model.safetensors"))
    assert {name for name in names if not name.startswith("layer.weight")} <= {"layer.bias"}


def test_parts_of_a_weight_may_lie_in_several_shards(tmp_path: Path) -> None:
    tensors, config = case("bitsandbytes-nf4-nested")
    source = write_directory(tmp_path / "source", {"head.weight": torch.ones(2, 3)}, config)
    (source / "model.safetensors").rename(source / "model-00001-of-00003.safetensors")
    names = sorted(tensors)
    parts = {"model-00002-of-00003.safetensors": names[::2], "model-00003-of-00003.safetensors": names[1::2]}
    for file, group in parts.items():
        save_file({name: tensors[name] for name in group}, source / file)
    weight_map = {name: file for file, group in parts.items() for name in group}
    weight_map["head.weight"] = "model-00001-of-00003.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    convert_file(source, tmp_path / "native")
    loaded = load_packed(tmp_path / "native")
    assert isinstance(loaded["layer.weight"], PackedWeight)
    assert torch.equal(loaded["layer.weight"].dequantize(), EXPECTED["bitsandbytes-nf4-nested"])
    assert torch.equal(loaded["head.weight"], torch.ones(2, 3))  # type: ignore[arg-type]


def test_command(tmp_path: Path) -> None:
    source = write_case(tmp_path / "x", "bitsandbytes-fp4")
    result = CliRunner().invoke(main, ["convert", str(source), str(tmp_path / "native")])
    assert result.exit_code == 0
    assert result.stdout.startswith("converted 1 tensor: 2.4 kB -> 2.3 kB\n")
    result = CliRunner().invoke(
        main, ["convert", str(tmp_path / "native"), str(source), "--to", "bitsandbytes", "--force"]
    )
    assert result.exit_code == 0
    assert set(load_file(source / "model.safetensors")) == set(case("bitsandbytes-fp4")[0])
    result = CliRunner().invoke(main, ["convert", str(source), str(tmp_path / "native")])
    assert result.exit_code == 1
    assert "which exists" in result.stderr


class TestRefusals:
    def refused(self, path: Path, error: type[Exception], message: str, **options: Any) -> None:
        with pytest.raises(error, match=message):
            convert_file(path, path.parent / "out", **options)
        assert not (path.parent / "out").exists()

    def test_unknown_target(self, tmp_path: Path) -> None:
        self.refused(
            tmp_path / "x", InvalidArgument, 'to: got \'gguf\', expected "native" or "bitsandbytes"', to="gguf"
        )

    def test_unknown_method(self, tmp_path: Path) -> None:
        path = write_directory(tmp_path / "x", {"a.weight": torch.ones(2, 2)}, {"quant_method": "hqq"})
        self.refused(path, Unsupported, "quant_method 'hqq': not supported: served are bitsandbytes, gptq, awq, comp")

    def test_float_checkpoint(self, tmp_path: Path) -> None:
        path = write_directory(tmp_path / "x", {"a.weight": torch.ones(2, 2)}, None)
        self.refused(path, InvalidArgument, "which is not quantized, expected a quantized checkpoint")
        self.refused(path, InvalidArgument, "with no native quantized weight", to="bitsandbytes")

    def test_native_checkpoint(self, tmp_path: Path) -> None:
        path = write_directory(tmp_path / "x", {"a.weight": torch.ones(2, 64)}, None)
        quantize_file(path, tmp_path / "native")
        self.refused(tmp_path / "native", InvalidArgument, "which holds native weights")

    def test_config_without_quantized_weights(self, tmp_path: Path) -> None:
        path = write_directory(tmp_path / "x", {"a.weight": torch.ones(2, 2)}, {"quant_method": "bitsandbytes"})
        self.refused(path, InvalidArgument, "with no weight that bitsandbytes packed")


class TestBitsandbytes:
    def change(self, path: Path, name: str, **changes: Any) -> Path:
        """A case with other tensors, and with other entries in the JSON of its quant_state."""
        tensors, config = case(name)
        key = next((key for key in tensors if "quant_state" in key), None)
        if key is not None:
            state = json.loads(tensors[key].numpy().tobytes())
            state |= changes.pop("state", {})
            state = {key: value for key, value in state.items() if value is not None}
            tensors[key] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
        tensors |= {f"layer.{key}": value for key, value in changes.items()}
        return write_directory(path, tensors, config)

    def test_single_file_without_config(self, tmp_path: Path) -> None:
        tensors, _ = case("bitsandbytes-fp4")
        save_file(tensors, tmp_path / "x.safetensors")
        convert_file(tmp_path / "x.safetensors", tmp_path / "native.safetensors")
        weight = load_packed(tmp_path / "native.safetensors")["layer.weight"]
        assert isinstance(weight, PackedWeight)
        assert torch.equal(weight.dequantize(), EXPECTED["bitsandbytes-fp4"])

    def test_int8_dtype_is_that_of_the_model(self, tmp_path: Path) -> None:
        source = write_case(tmp_path / "x", "bitsandbytes-int8", torch_dtype="bfloat16")
        convert_file(source, tmp_path / "native")
        assert load_packed(tmp_path / "native")["layer.weight"].dtype == torch.bfloat16

    def test_another_dynamic_map_or_nested_block_restores_the_scales(self, tmp_path: Path) -> None:
        """bitsandbytes computes its map with torch.linspace, which may give another last bit elsewhere."""
        tensors, _ = case("bitsandbytes-nf4-nested")
        other = tensors["layer.weight.nested_quant_map"].clone()
        other[200] = other[200].nextafter(torch.tensor(2.0))
        sources = {
            "map": self.change(tmp_path / "map", "bitsandbytes-nf4-nested", **{"weight.nested_quant_map": other}),
            "block": self.change(
                tmp_path / "block",
                "bitsandbytes-nf4-nested",
                state={"nested_blocksize": 64},
                **{"weight.nested_absmax": tensors["layer.weight.nested_absmax"]},
            ),
        }
        for name, path in sources.items():
            convert_file(path, tmp_path / f"native-{name}")
            weight = load_packed(tmp_path / f"native-{name}")["layer.weight"]
            assert isinstance(weight, PackedWeight)
            assert describe(weight.spec) == "nf4, block_size=64, scale=float32"
            table = other if name == "map" else tensors["layer.weight.nested_quant_map"]
            state = json.loads(tensors["layer.weight.quant_state.bitsandbytes__nf4"].numpy().tobytes())
            scale = table[tensors["layer.weight.absmax"].int()] * tensors["layer.weight.nested_absmax"]
            assert torch.equal(weight.scale.flatten(), scale + torch.tensor(state["nested_offset"]))

    def test_another_table_becomes_a_codebook(self, tmp_path: Path) -> None:
        tensors, _ = case("bitsandbytes-fp4")
        table = tensors["layer.weight.quant_map"].flip(0)
        convert_file(
            self.change(tmp_path / "x", "bitsandbytes-fp4", **{"weight.quant_map": table}), tmp_path / "native"
        )
        weight = load_packed(tmp_path / "native")["layer.weight"]
        assert isinstance(weight, PackedWeight)
        assert weight.spec.format == "custom"
        assert weight.codebook is not None
        assert torch.equal(weight.codebook, table)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"state": {"blocksize": 48}}, "blocksize: got 48, expected one of 32, 64"),
            ({"state": {"dtype": "float64"}}, "dtype: got 'float64'"),
            ({"state": {"shape": [32]}}, r"shape: got \[32\]"),
            ({"state": {"shape": [32, 256]}}, "got 2048 bytes, expected the 4096 that its quant_state tells of"),
            ({"state": {"nested_offset": None}}, "expected nested_blocksize and nested_offset in it"),
            ({"weight.absmax": torch.zeros(63, dtype=torch.uint8)}, r"absmax.*: got U8 \[63\], expected U8 \[64\]"),
            ({"weight.absmax": torch.zeros(64)}, r"absmax.*: got F32 \[64\], expected U8 \[64\]"),
            ({"weight.quant_map": torch.zeros(15)}, r"quant_map.*: got F32 \[15\], expected F32 \[16\]"),
            ({"weight.nested_quant_map": torch.zeros(16)}, r"expected F32 \[256\]"),
        ],
    )
    def test_malformed(self, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
        path = self.change(tmp_path / "x", "bitsandbytes-nf4-nested", **changes)
        with pytest.raises(InvalidArgument, match=message):
            convert_file(path, tmp_path / "out")

    def test_missing_part(self, tmp_path: Path) -> None:
        tensors, config = case("bitsandbytes-nf4-nested")
        del tensors["layer.weight.quant_map"]
        with pytest.raises(InvalidArgument, match=r"no tensor 'layer\.weight\.quant_map'"):
            convert_file(write_directory(tmp_path / "x", tensors, config), tmp_path / "out")

    def test_column_major_rows_are_refused_by_name(self, tmp_path: Path) -> None:
        path = self.change(tmp_path / "x", "bitsandbytes-int8", weight_format=torch.tensor(2, dtype=torch.uint8))
        with pytest.raises(Unsupported, match=r"weight_format': 2 \(col_turing\): not supported"):
            convert_file(path, tmp_path / "out")


class TestToBitsandbytes:
    @pytest.mark.parametrize("name", [name for name in BECOMES if name.startswith("bitsandbytes")])
    def test_there_and_back(self, name: str, tmp_path: Path) -> None:
        """The tensors of bitsandbytes; with SCB, the float32 that it stood for may be the one beside."""
        tensors, _ = case(name)
        convert_file(write_case(tmp_path / "x", name), tmp_path / "native")
        convert_file(tmp_path / "native", tmp_path / "back", to="bitsandbytes")
        back = load_file(tmp_path / "back" / "model.safetensors")
        assert back.keys() == tensors.keys()
        for key, tensor in tensors.items():
            if "quant_state" in key:
                states = [json.loads(x.numpy().tobytes()) for x in (tensor, back[key])]
                assert states[0] == states[1]
            elif key.endswith("SCB"):
                assert torch.equal(back[key] / 127, tensor / 127)
                torch.testing.assert_close(back[key], tensor, rtol=2.0**-23, atol=0)
            else:
                assert torch.equal(back[key].view(torch.uint8).flatten(), tensor.view(torch.uint8).flatten())
        convert_file(tmp_path / "back", tmp_path / "again")
        assert load_packed(tmp_path / "again")["layer.weight"] == load_packed(tmp_path / "native")["layer.weight"]

    @pytest.mark.parametrize("name", ["bitsandbytes-nf4-nested", "bitsandbytes-fp4", "bitsandbytes-int8"])
    def test_bitsandbytes_itself_decodes_it(self, name: str, tmp_path: Path) -> None:
        bitsandbytes = pytest.importorskip("bitsandbytes", reason="compares with the installed bitsandbytes")
        convert_file(write_case(tmp_path / "x", name), tmp_path / "native")
        convert_file(tmp_path / "native", tmp_path / "back", to="bitsandbytes")
        tensors = load_file(tmp_path / "back" / "model.safetensors")
        data = tensors.pop("layer.weight")
        if name.endswith("int8"):
            decoded = bitsandbytes.functional.int8_vectorwise_dequant(data, tensors["layer.SCB"])
            torch.testing.assert_close(decoded, EXPECTED[name], rtol=2.0**-22, atol=0)
            return
        state = bitsandbytes.functional.QuantState.from_dict(
            {key.removeprefix("layer.weight."): value for key, value in tensors.items()}, torch.device("cpu")
        )
        assert torch.equal(bitsandbytes.functional.dequantize_4bit(data, state), EXPECTED[name])

    def test_config_is_what_transformers_reads(self, tmp_path: Path) -> None:
        weights = {"a.weight": torch.randn(4, 64).bfloat16(), "lm_head.weight": torch.randn(4, 64).bfloat16()}
        source = write_directory(tmp_path / "x", weights, None, model_type="llama", hidden_size=64)
        quantize_file(source, tmp_path / "native", "nf4", double_quant=True)
        convert_file(tmp_path / "native", tmp_path / "back", to="bitsandbytes")
        config = json.loads((tmp_path / "back" / "config.json").read_text(encoding="utf-8"))
        assert config["hidden_size"] == 64
        assert config["quantization_config"] == {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "llm_int8_skip_modules": ["lm_head"],
            "llm_int8_threshold": 6.0,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
        }

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"format": "int4"}, "in int4: not supported: bitsandbytes has nf4, fp4 and int8 alone"),
            ({"format": "uint4"}, "in uint4: not supported"),
            ({"codebook": (-1.0, 0.0, 1.0)}, "in custom: not supported"),
            ({"block_size": 16}, "of 96 columns in blocks of 16 by row: not supported"),
            ({"block_size": 64}, "of 96 columns in blocks of 64 by row: not supported"),
            ({"block_size": "row"}, "of 96 columns in blocks of 96 by row: not supported"),
            ({"format": "int8"}, "in int8 blocks of 64: not supported"),
        ],
    )
    def test_what_bitsandbytes_has_not_is_refused(self, options: dict[str, Any], message: str, tmp_path: Path) -> None:
        save_file({"a.weight": torch.randn(4, 96)}, tmp_path / "x.safetensors")
        quantize_file(tmp_path / "x.safetensors", tmp_path / "native.safetensors", **options)
        with pytest.raises(Unsupported, match=message):
            convert_file(tmp_path / "native.safetensors", tmp_path / "out.safetensors", to="bitsandbytes")

    def test_one_format_for_a_model(self, tmp_path: Path) -> None:
        weights = {
            "a.weight": lowbit_rs.quantize(torch.randn(4, 64)),
            "b.weight": lowbit_rs.quantize(torch.randn(4, 64), "fp4"),
        }
        lowbit_rs.files.save_packed(weights, tmp_path / "x.safetensors")
        with pytest.raises(Unsupported, match="names one format for all of a model"):
            convert_file(tmp_path / "x.safetensors", tmp_path / "out.safetensors", to="bitsandbytes")

    def test_every_absmax_comes_back_to_its_scale(self) -> None:
        from lowbit_rs.integrations.checkpoints.bitsandbytes import _absmax

        absmax = (torch.randn(100_000).abs() * torch.exp2(torch.randint(-20, 20, (100_000,)))).float()
        assert torch.equal(_absmax(absmax / 127) / 127, absmax / 127)
