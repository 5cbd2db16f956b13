"""GPTQ, AWQ and compressed-tensors in every group size and order, packed here word by word.

tests/test_checkpoints.py has files of the libraries themselves; here are the sizes that they do not have.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foreign import EXPECTED, Layer, awq_gemm, case, compressed_tensors, gptq, layer, words, write_case, write_directory
from lowbit_rs import InvalidArgument, PackedWeight, Unsupported
from lowbit_rs.files import load_packed
from lowbit_rs.files.checkpoint import open_checkpoint
from lowbit_rs.integrations.checkpoints import convert_file, foreign_weights
from lowbit_rs.integrations.checkpoints.source import TensorSource

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}


def read(path: Path) -> PackedWeight:
    with TensorSource(open_checkpoint(path)) as source:
        ((weight,), _) = foreign_weights(source)[::-1]
        return weight.load()


@given(
    rows=st.integers(1, 4).map(lambda n: 8 * n),
    cols=st.integers(1, 20).map(lambda n: 16 * n),
    group_size=st.sampled_from([16, 32, 48, 64, 96, 128, 160, 320, 10_000]),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    desc_act=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_gptq_of_any_shape(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    cols: int,
    group_size: int,
    bits: int,
    symmetric: bool,
    desc_act: bool,
    seed: int,
) -> None:
    """The definition, to the bit; products with it, too, in the order of columns of the weight."""
    x = layer(rows, cols, group_size, bits=bits, symmetric=symmetric, desc_act=desc_act, seed=seed)
    path = write_directory(tmp_path_factory.mktemp("gptq") / "x", gptq(x, bits), {**GPTQ, "bits": bits})
    weight = read(path)
    assert torch.equal(weight.dequantize(), x.decoded())
    assert torch.equal(
        weight.dequantize(torch.float32), x.scale.float()[:, x.g_idx] * torch.from_numpy(x.q - x.zero[:, x.g_idx])
    )


def test_gptq_names_its_bits_by_g_idx(tmp_path: Path) -> None:
    """GPTQModel's "dynamic" quantizes single layers with other bits than the config has."""
    x = layer(8, 64, 32, bits=8, symmetric=True)
    assert torch.equal(read(write_directory(tmp_path / "x", gptq(x, 8), GPTQ)).dequantize(), x.decoded())


@pytest.mark.parametrize("g_idx", ["absent", "zeros"])
def test_gptq_without_an_order(g_idx: str, tmp_path: Path) -> None:
    x = layer(8, 64, 32)
    tensors = gptq(x)
    if g_idx == "absent":
        del tensors["layer.g_idx"]
    else:
        tensors["layer.g_idx"].zero_()
    assert torch.equal(read(write_directory(tmp_path / "x", tensors, GPTQ)).dequantize(), x.decoded())


def test_zero_points_of_the_first_format_carry(tmp_path: Path) -> None:
    """A zero point of 0 is stored as a borrow from its word, as GPTQModel's conversion from the second format does."""
    x = layer(8, 64, 32)
    x.zero[0, 0] = x.zero[3, 1] = 0
    tensors = gptq(Layer(x.q, x.scale, x.zero.clip(1), x.g_idx))
    tensors["layer.qzeros"] = words(x.zero.T, 4, 1) - 0x11111111
    assert torch.equal(read(write_directory(tmp_path / "x", tensors, GPTQ)).dequantize(), x.decoded())


def test_old_checkpoints_have_their_options_beside_the_config(tmp_path: Path) -> None:
    tensors, config = case("gptq-asym")
    source = write_directory(tmp_path / "x", tensors, None)
    (source / "quantize_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert torch.equal(read(source).dequantize(), EXPECTED["gptq-asym"])


@pytest.mark.parametrize("group_size", [16, 48, 128])
def test_awq_gemm_of_any_group(group_size: int, tmp_path: Path) -> None:
    x = layer(16, 384, group_size)
    tensors = awq_gemm(x)
    config = {"quant_method": "awq", "w_bit": 4, "q_group_size": group_size, "version": "GEMM"}
    assert torch.equal(read(write_directory(tmp_path / "x", tensors, config)).dequantize(), x.decoded())


def test_compressed_tensors_with_sorted_columns(tmp_path: Path) -> None:
    """actorder "group", as llm-compressor wrote it until compressed-tensors dropped it."""
    x = layer(16, 96, 32, symmetric=True, desc_act=True)
    _, config = case("compressed-tensors-w4a16")
    tensors = compressed_tensors(x) | {"layer.weight_g_idx": torch.from_numpy(x.g_idx).to(torch.int32)}
    weight = read(write_directory(tmp_path / "x", tensors, config))
    assert weight.permutation is not None
    assert torch.equal(weight.dequantize(), x.decoded())


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_with_zero_points(bits: int, desc_act: bool, tmp_path: Path) -> None:
    x = layer(16, 96, 32, bits=bits, desc_act=desc_act)
    _, config = case(f"compressed-tensors-w{bits}a16-asym")
    config["config_groups"]["group_0"]["weights"]["group_size"] = 32
    tensors = compressed_tensors(x, bits, symmetric=False)
    tensors["layer.weight_g_idx"] = torch.from_numpy(x.g_idx).to(torch.int32)
    assert torch.equal(read(write_directory(tmp_path / "x", tensors, config)).dequantize(), x.decoded())


def test_compressed_tensors_with_one_scale(tmp_path: Path) -> None:
    x = layer(16, 96, 96, symmetric=True)
    x.scale[:] = x.scale[0]
    _, config = case("compressed-tensors-w4a16")
    config["config_groups"]["group_0"]["weights"] |= {"strategy": "tensor", "group_size": None}
    tensors = compressed_tensors(x) | {"layer.weight_scale": x.scale[0]}
    assert torch.equal(read(write_directory(tmp_path / "x", tensors, config)).dequantize(), x.decoded())


def test_compressed_tensors_groups_by_target(tmp_path: Path) -> None:
    eight, eight_config = case("compressed-tensors-w8a16")
    four, config = case("compressed-tensors-w4a16")
    by_name = eight_config["config_groups"]["group_0"] | {"targets": ["re:.*down_proj"]}
    config["config_groups"]["group_1"] = by_name
    tensors = four | {key.replace("layer", "mlp.down_proj"): value for key, value in eight.items()}
    convert_file(write_directory(tmp_path / "x", tensors, config), tmp_path / "native")
    for targets, message in ((["re:["], "a regular expression"), (["Linear"], "2 groups for 'layer'")):
        by_name["targets"] = targets
        with pytest.raises(InvalidArgument, match=message):
            convert_file(write_directory(tmp_path / message, tensors, config), tmp_path / "out")
    loaded = load_packed(tmp_path / "native")
    for name, expected in (("layer", "compressed-tensors-w4a16"), ("mlp.down_proj", "compressed-tensors-w8a16")):
        weight = loaded[f"{name}.weight"]
        assert isinstance(weight, PackedWeight)
        assert torch.equal(weight.dequantize(), EXPECTED[expected])


def with_options(path: Path, name: str, changes: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> Path:
    """A case with other options; "group" changes those of compressed-tensors' group, "weights" those of its weights."""
    own, config = case(name)
    group = config.get("config_groups", {}).get("group_0", {})
    group.get("weights", {}).update(changes.pop("weights", {}))
    group.update(changes.pop("group", {}))
    return write_directory(path, own | (tensors or {}), config | changes)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "gptq-sym",
            {"checkpoint_format": "marlin"},
            "format 'marlin': not supported: served are gptq and gptq_v2",
        ),
        ("gptq-sym", {"is_marlin_format": True}, "checkpoint_format 'marlin'"),
        ("awq-gemm", {"version": "gemv_fast"}, "AWQ version 'gemv_fast': not supported: served are gemm and gemv"),
        ("awq-gemm", {"version": "marlin"}, "AWQ version 'marlin'"),
        ("awq-gemm", {"bits": 8}, "AWQ in 8 bits: not supported"),
        (
            "compressed-tensors-w4a16",
            {"format": "marlin-24"},
            "'marlin-24': not supported: served is pack-quantized",
        ),
        ("compressed-tensors-w4a16", {"kv_cache_scheme": {"num_bits": 8}}, "with kv_cache_scheme: not supported"),
        ("compressed-tensors-w4a16", {"transform_config": {"config_groups": {"a": {}}}}, "with transform_config"),
        ("compressed-tensors-w4a16", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "with sparsity"),
        ("compressed-tensors-w4a16", {"quantization_status": "frozen"}, "quantization_status 'frozen'"),
        ("compressed-tensors-w4a16", {"group": {"input_activations": {"num_bits": 8}}}, "with input_activations"),
        ("compressed-tensors-w4a16", {"weights": {"num_bits": 3}}, "num_bits 3"),
        ("compressed-tensors-w4a16", {"weights": {"type": "float"}}, "type 'float'"),
        ("compressed-tensors-w4a16", {"weights": {"strategy": "block"}}, "strategy 'block'"),
    ],
)
def test_variants_that_are_not_served(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=message):
        convert_file(with_options(tmp_path / "x", name, changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["fp8", "hqq", "aqlm", "quanto", "torchao", "mxfp4", "fbgemm_fp8", "eetq", None])
def test_methods_that_are_not_served(name: str | None, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=f"quant_method '{name}': not supported: served are bitsandbytes, gptq"):
        convert_file(with_options(tmp_path / "x", "gptq-sym", {"quant_method": name}), tmp_path / "out")


def test_groups_that_blocks_cannot_tile(tmp_path: Path) -> None:
    x = layer(8, 96, 24)
    with pytest.raises(Unsupported, match="group_size 24: not supported: groups are a multiple of 16"):
        read(write_directory(tmp_path / "x", gptq(x), {**GPTQ, "group_size": 24}))


def test_groups_of_several_sizes(tmp_path: Path) -> None:
    tensors = gptq(layer(8, 64, 32))
    tensors["layer.g_idx"][0] = 1
    with pytest.raises(Unsupported, match=r"groups of \[31, 33\] columns: not supported"):
        read(write_directory(tmp_path / "x", tensors, GPTQ))


@pytest.mark.parametrize(
    ("name", "changes", "tensors", "message"),
    [
        ("gptq-sym", {}, {"layer.g_idx": torch.full((128,), 9, dtype=torch.int32)}, "groups 9 to 9, expected 0 to 3"),
        ("gptq-sym", {}, {"layer.g_idx": torch.zeros(64, dtype=torch.int32)}, r"expected I32 \[4, 8\]"),
        ("gptq-sym", {}, {"layer.scales": torch.zeros(4, 32, dtype=torch.int8)}, "expected F32 or F16 or BF16"),
        (
            "gptq-sym",
            {},
            {"layer.qzeros": torch.zeros(4, 5, dtype=torch.int32)},
            r"expected I32 \[4, 4\]",
        ),
        ("gptq-sym", {}, {"layer.qweight": torch.zeros(16, 32, dtype=torch.int64)}, "expected I32"),
        ("awq-gemm", {"group_size": 48}, {}, "expected -1 or a divisor of the 128 columns"),
        ("awq-gemm", {"bits": "four"}, {}, "quantization_config: bits: got 'four', expected an integer"),
        ("awq-gemv", {"group_size": 2}, {}, "room for 16 groups, expected 64"),
        ("compressed-tensors-w4a16", {"config_groups": []}, {}, "config_groups: got"),
        ("compressed-tensors-w4a16", {"weights": {"symmetric": None}}, {}, "symmetric: got None"),
        ("compressed-tensors-w4a16", {"weights": {"group_size": 16}}, {}, "got 16 for 4 groups, expected 128 columns"),
        ("compressed-tensors-w4a16", {"weights": {"symmetric": False}}, {}, "no tensor"),
        ("compressed-tensors-w4a16", {}, {"layer.weight_shape": torch.tensor([32, 200])}, r"expected I32 \[32, 25\]"),
    ],
)
def test_malformed(
    name: str, changes: dict[str, Any], tensors: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    path = with_options(tmp_path / "x", name, changes, tensors)
    with pytest.raises((InvalidArgument, Unsupported), match=message):
        convert_file(path, tmp_path / "out")


def test_a_permuted_weight_survives_its_file(tmp_path: Path) -> None:
    convert_file(write_case(tmp_path / "x", "gptq-desc-act"), tmp_path / "native")
    weight = load_packed(tmp_path / "native")["layer.weight"]
    assert isinstance(weight, PackedWeight)
    assert weight == read(tmp_path / "x")
    with pytest.raises(Unsupported, match="with permuted columns: not supported: bitsandbytes keeps columns in order"):
        convert_file(tmp_path / "native", tmp_path / "out", to="bitsandbytes")
