"""Quantizing, dequantizing, saving and loading safetensors files and model directories."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowbit_rs
from lowbit_rs import InvalidArgument, PackedWeight, Unsupported
from lowbit_rs.files import dequantize_file, inspect, load_model, load_packed, quantize_file, save_packed
from lowbit_rs.files.checkpoint import open_checkpoint
from lowbit_rs.files.selection import select
from strategies import options, weights

in_one_directory = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

#: Every other dtype that safetensors and torch share: tensors of these are carried over.
OTHER_DTYPES = (
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
)


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def other_tensors() -> dict[str, Tensor]:
    """Tensors that no conversion may touch: every dtype, scalars, empty ones, vectors."""
    tensors = {}
    for dtype in OTHER_DTYPES:
        count = 6 * dtype.itemsize
        data = torch.randint(0, 2, (count,)) if dtype is torch.bool else torch.randint(0, 256, (count,))
        tensors[f"other.{str(dtype).removeprefix('torch.')}.weight"] = data.to(torch.uint8).view(dtype).reshape(-1, 3)
    return tensors | {
        "model.norm.weight": noise(64, dtype=torch.bfloat16),
        "layer.bias": noise(33),
        "scalar": torch.tensor(3.5),
        "no_rows.weight": torch.zeros(0, 64),
        "no_columns.weight": torch.zeros(8, 0),
        "convolution.weight": noise(4, 3, 5),
        "buffer": noise(4, 4),
    }


def linear_weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights that are quantized by default, of odd shapes too."""
    return {
        "layers.0.up_proj.weight": noise(33, 77, dtype=dtype),
        "layers.0.down_proj.weight": noise(1, 1, dtype=dtype),
        "layers.1.up_proj.weight": noise(48, 256, dtype=dtype),
        "layers.1.experts.gate_up_proj": noise(3, 5, 70, dtype=dtype),
    }


def assert_same_tensors(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(got[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def plain_part(loaded: Mapping[str, PackedWeight | Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in loaded.items() if isinstance(value, Tensor)}


FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "nf4 double": {"double_quant": True},
    "fp4 bfloat16 scales": {"format": "fp4", "block_size": 32, "scale_dtype": torch.bfloat16},
    "int4 rows": {"format": "int4", "block_size": "row"},
    "uint4": {"format": "uint4", "block_size": 16, "scale_dtype": torch.float16},
    "uint4 double": {"format": "uint4", "double_quant": True},
    "int8": {"format": "int8", "block_size": 128},
    "int8 rows": {"format": "int8", "block_size": "row"},
    "custom": {"codebook": [-1.0, -0.25, 0.0, 0.125, 1.0]},
    "custom signed": {"codebook": [-0.75, 0.0, 0.5, 1.0], "signed_absmax": True, "double_quant": True},
}


@pytest.mark.parametrize("keywords", FORMATS.values(), ids=FORMATS)
def test_file_holds_what_quantize_gives(tmp_path: Path, keywords: dict[str, Any], dtype: torch.dtype) -> None:
    matrices, others = linear_weights(dtype), other_tensors()
    source, packed, unpacked = (tmp_path / f"{name}.safetensors" for name in ("source", "packed", "unpacked"))
    save_file(matrices | others, source)

    summary = quantize_file(source, packed, **keywords)
    loaded = load_packed(packed)
    assert summary.converted == tuple(name for name in open_order(source) if name in matrices)
    assert summary.skipped.keys() == others.keys()
    assert_same_tensors(plain_part(loaded), others)
    assert loaded.keys() == (matrices | others).keys()
    for name, matrix in matrices.items():
        assert loaded[name] == lowbit_rs.quantize(matrix, **keywords), name

    dequantize_file(packed, unpacked)
    expected = {name: lowbit_rs.quantize(matrix, **keywords).dequantize() for name, matrix in matrices.items()}
    assert_same_tensors(load_file(unpacked), expected | others)


def open_order(path: Path) -> list[str]:
    return [tensor.name for tensor in open_checkpoint(path).tensors()]


def test_safetensors_library_opens_what_is_written(tmp_path: Path) -> None:
    source, destination = tmp_path / "source.safetensors", tmp_path / "packed.safetensors"
    matrices, others = linear_weights(torch.bfloat16), other_tensors()
    save_file(matrices | others, source, {"format": "pt", "made by": "µ"})
    quantize_file(source, destination, double_quant=True)
    expected = dict(others)
    for name, matrix in matrices.items():
        for part, tensor in lowbit_rs.quantize(matrix, double_quant=True).tensors().items():
            expected[name if part == "data" else f"{name}_{part}"] = tensor
    assert_same_tensors(load_file(destination), expected)
    with safetensors.safe_open(destination, "pt") as file:
        metadata = file.metadata()
        assert torch.equal(file.get_slice("layers.1.up_proj.weight")[3:5], expected["layers.1.up_proj.weight"][3:5])
    assert metadata.keys() == {"format", "made by", "lowbit"}
    assert json.loads(metadata["lowbit"])["format_version"] == 1
    assert json.loads(metadata["lowbit"])["tensors"]["layers.0.up_proj.weight"] == {
        "format": "nf4",
        "block_size": 64,
        "block_order": "row",
        "scale_dtype": "float32",
        "double_quant": True,
        "signed_absmax": False,
        "shape": [33, 77],
        "dtype": "bfloat16",
    }


def test_metadata_say_pytorch_where_the_source_says_nothing(tmp_path: Path) -> None:
    """Hugging Face's loader refuses metadata without a framework."""
    save_file(linear_weights(), tmp_path / "a.safetensors")
    quantize_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with safetensors.safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


@given(weight=weights(largest=2.0**14), chosen=options(), double_quant=st.booleans())
@in_one_directory
def test_save_and_load_keep_any_packed_weight(tmp_path: Path, weight: Tensor, chosen: Any, double_quant: bool) -> None:
    packed = lowbit_rs.quantize(weight, **(chosen.keywords() | {"double_quant": double_quant}))
    path = tmp_path / "weight.safetensors"
    save_packed({"a.weight": packed, "b": weight}, path, force=True)
    loaded = load_packed(path)
    assert loaded["a.weight"] == packed
    assert_same_tensors(plain_part(loaded), {"b": weight})


def test_dequantize_to_another_dtype(tmp_path: Path) -> None:
    source, packed, unpacked = (tmp_path / f"{name}.safetensors" for name in "abc")
    save_file(linear_weights(torch.bfloat16) | {"n.weight": noise(3)}, source)
    quantize_file(source, packed)
    dequantize_file(packed, unpacked, torch.float32)
    tensors = load_file(unpacked)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    with safetensors.safe_open(unpacked, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    name = "layers.0.up_proj.weight"
    expected = load_packed(packed)[name]
    assert isinstance(expected, PackedWeight)
    assert torch.equal(tensors[name], expected.dequantize(torch.float32))


def test_codebooks_made_for_the_weights_err_less(tmp_path: Path) -> None:
    source, name = tmp_path / "source.safetensors", "a.weight"
    weight = torch.rand(64, 512) - 0.3  # far from normal, so that a fitted table has much to gain
    save_file({name: weight, "b.weight": noise(64, 512)}, source)
    errors = {}
    for codebook in (None, "block-optimal", "fit"):
        path = tmp_path / f"{codebook}.safetensors"
        quantize_file(source, path, codebook=codebook)
        loaded = load_packed(path)
        for key, original in load_file(source).items():
            packed = loaded[key]
            assert isinstance(packed, PackedWeight)
            errors[codebook, key] = float((packed.dequantize() - original).square().sum())
    assert errors["block-optimal", "b.weight"] < errors[None, "b.weight"]
    assert errors["fit", name] < 0.8 * errors[None, name]


SELECTION = {
    "model.layers.0.self_attn.q_proj.weight": None,
    "model.layers.0.mlp.gate_proj.weight": None,
    "model.layers.0.mlp.experts.3.w1.weight": None,
    "model.layers.0.mlp.shared_expert_gate.weight": None,
    "score.weight": None,
    "lm_head.weight": "matches skip='lm_head'",
    "model.embed_tokens.weight": "embedding",
    "transformer.wte.weight": "embedding",
    "transformer.wpe.weight": "embedding",
    "embeddings.word_embeddings.weight": "embedding",
    "embeddings.token_type_embeddings.weight": "embedding",
    "gpt_neox.embed_in.weight": "embedding",
    "model.embed_tokens_per_layer.weight": "embedding",
    "shared.weight": "embedding",
    "block.0.SelfAttention.relative_attention_bias.weight": "embedding",
    "model.layers.0.self_attn.q_norm.weight": "norm",
    "encoder.LayerNorm.weight": "norm",
    "h.0.ln_1.weight": "norm",
    "model.layers.0.mlp.gate.weight": "router of a mixture of experts",
    "time_embed.linear_1.weight": None,
    "embedding_projection.weight": None,
    "model.layers.0.linear_attn.A_log": "not called *.weight",
}


def test_choice_by_name(tmp_path: Path) -> None:
    path = tmp_path / "names.safetensors"
    save_file({name: noise(4, 8) for name in SELECTION}, path)
    selection = select(open_checkpoint(path), skip=("lm_head",), embeddings=False)
    assert {name: selection.skipped.get(name) for name in SELECTION} == SELECTION
    assert selection.chosen == {name for name, reason in SELECTION.items() if reason is None}


def test_choice_by_shape_and_dtype(tmp_path: Path) -> None:
    path = tmp_path / "shapes.safetensors"
    tensors = {
        "vector.weight": noise(8),
        "image.weight": noise(2, 2, 2, 2),
        "stack.weight": noise(2, 2, 2),
        "wide.weight": noise(4, 4, dtype=torch.float64),
        "experts.down_proj": noise(2, 4, 8),
        "experts.down_proj_bias": noise(2, 4),
        "experts.stack_bias": noise(2, 4, 2),
        "empty.weight": torch.zeros(0, 8),
    }
    save_file(tensors, path)
    selection = select(open_checkpoint(path), skip=(), embeddings=True)
    assert selection.chosen == {"experts.down_proj"}
    assert selection.skipped == {
        "vector.weight": "1-D",
        "image.weight": "4-D",
        "stack.weight": "3-D",
        "wide.weight": "dtype F64",
        "experts.down_proj_bias": "not called *.weight",
        "experts.stack_bias": "bias",
        "empty.weight": "empty",
    }


def test_transposed_weights_are_left_alone(tmp_path: Path) -> None:
    """GPT-2's: the square one is told by its namesakes that are not square."""
    path = tmp_path / "gpt2.safetensors"
    tensors: dict[str, Tensor] = {}
    for layer, (rows, columns) in {"attn.c_attn": (8, 24), "attn.c_proj": (8, 8), "mlp.c_proj": (32, 8)}.items():
        tensors |= {f"h.0.{layer}.weight": noise(rows, columns), f"h.0.{layer}.bias": noise(columns)}
    tensors |= {"head.weight": noise(3, 8), "head.bias": noise(3)}
    save_file(tensors, path)
    selection = select(open_checkpoint(path), skip=(), embeddings=False)
    assert selection.chosen == {"head.weight"}
    assert selection.skipped["h.0.attn.c_proj.weight"] == "transposed: its rows are inputs"


@pytest.mark.parametrize(
    ("config", "head", "chosen"),
    [
        ({"tie_word_embeddings": True}, True, {"model.embed_positions.weight"}),
        ({"tie_word_embeddings": True}, False, {"model.embed_positions.weight"}),
        ({"text_config": {"tie_word_embeddings": True}}, True, {"model.embed_positions.weight"}),
        ({}, False, {"model.embed_positions.weight"}),
        (
            {"tie_word_embeddings": False},
            True,
            {"model.embed_positions.weight", "model.embed_tokens.weight", "lm_head.weight"},
        ),
        ({}, True, {"model.embed_positions.weight", "model.embed_tokens.weight", "lm_head.weight"}),
        ({"tie_word_embeddings": False}, False, {"model.embed_positions.weight", "model.embed_tokens.weight"}),
    ],
)
def test_tied_embeddings_stay(tmp_path: Path, config: dict[str, Any], head: bool, chosen: set[str]) -> None:
    tensors = {"model.embed_tokens.weight": noise(9, 8), "model.embed_positions.weight": noise(9, 8)}
    if head:
        tensors["lm_head.weight"] = noise(9, 8)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    selection = select(open_checkpoint(tmp_path), skip=(), embeddings=True)
    assert selection.chosen == chosen


def test_choice_is_that_of_quantize_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    defaults: dict[str, Any] = {"skip": ("lm_head",), "embeddings": False}
    changes: list[dict[str, Any]] = [{}, {"embeddings": True}, {"skip": ("down", "*.0.up")}, {"skip": ()}]
    for change in changes:
        model = Model()
        save_file(model.state_dict(), path)
        report = lowbit_rs.quantize_model(model, progress=False, **change)
        selection = select(open_checkpoint(path), **(defaults | change))
        assert {f"{row.name}.weight" for row in report.rows} == selection.chosen


class Block(nn.Module):
    """Two linear layers and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(48)
        self.up, self.down = nn.Linear(48, 80), nn.Linear(80, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return x + added


class Model(nn.Module):
    """A language model in small."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(20, 48)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(48, 20, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.lm_head(x)
        return logits


def save_model(model: nn.Module, path: Path) -> None:
    """As Hugging Face does: a tied weight once."""
    tensors = model.state_dict()
    if tensors["lm_head.weight"].data_ptr() == tensors["embed_tokens.weight"].data_ptr():
        del tensors["lm_head.weight"]
    save_file(tensors, path)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("start", ["float", "packed", "packed otherwise", "meta"])
def test_load_model(tmp_path: Path, start: str, tied: bool) -> None:
    original = Model(tied=tied)
    save_model(original, tmp_path / "a.safetensors")
    quantize_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "uint4", 16, double_quant=True)
    lowbit_rs.quantize_model(original, "uint4", 16, double_quant=True, progress=False)

    with torch.device("meta" if start == "meta" else "cpu"):
        model = Model(tied=tied)
    if start == "packed":
        lowbit_rs.quantize_model(model, "uint4", 16, double_quant=True, progress=False)
    elif start == "packed otherwise":
        lowbit_rs.quantize_model(model, "int8", 64, progress=False)
    load_model(model, tmp_path / "b.safetensors")

    assert isinstance(model.layers[0].up, lowbit_rs.QuantLinear)
    assert_same_tensors(model.state_dict(), original.state_dict())
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied
    tokens = torch.arange(20)
    assert torch.equal(model(tokens), original(tokens))


def test_keys_are_those_of_a_quantized_model(tmp_path: Path) -> None:
    original = Model()
    save_model(original, tmp_path / "a.safetensors")
    quantize_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", embeddings=True, codebook=[-1, 0, 0.5, 1])
    model = Model()
    lowbit_rs.quantize_model(model, embeddings=True, codebook=[-1, 0, 0.5, 1], progress=False)
    model.load_state_dict(load_file(tmp_path / "b.safetensors"))
    lowbit_rs.quantize_model(original, embeddings=True, codebook=[-1, 0, 0.5, 1], progress=False)
    assert_same_tensors(model.state_dict(), original.state_dict())


def test_load_model_names_what_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    state: dict[str, Any] = dict(Model().state_dict())
    state["layers.0.up.weight"] = lowbit_rs.quantize(state["layers.0.up.weight"])

    save_packed({**state, "more": noise(3)}, path)
    with pytest.raises(InvalidArgument, match=r"got the names \['more'\] and not \[\], expected the names of"):
        load_model(Model(), path)
    load_model(Model(), path, strict=False)
    without_norm = {name: tensor for name, tensor in state.items() if name != "layers.1.norm.bias"}
    save_packed(without_norm, path, force=True)
    with pytest.raises(InvalidArgument, match=r"got the names \[\] and not \['layers.1.norm.bias'\]"):
        load_model(Model(), path)
    save_packed({**state, "lm_head.weight": noise(3, 3)}, path, force=True)
    with pytest.raises(InvalidArgument, match=r"size mismatch for lm_head.weight"):
        load_model(Model(), path)
    save_packed({**state, "layers.0.up.weight": lowbit_rs.quantize(noise(3, 3))}, path, force=True)
    with pytest.raises(InvalidArgument, match=r"shape \[80, 48\], expected \[3, 3\], as in the file"):
        load_model(Model(), path)
    save_packed({**state, "layers.7.up.weight": lowbit_rs.quantize(noise(3, 3))}, path, force=True)
    with pytest.raises(InvalidArgument, match=r"no module 'layers.7.up', expected one for the weight"):
        load_model(Model(), path)
    save_packed({**state, "layers.0.norm.weight": lowbit_rs.quantize(noise(3, 3))}, path, force=True)
    with pytest.raises(Unsupported, match=r"a packed weight in LayerNorm at 'layers.0.norm'"):
        load_model(Model(), path)


def test_inspect_counts_bits(tmp_path: Path) -> None:
    save_file({"a.weight": noise(64, 128, dtype=torch.bfloat16), "n.weight": noise(10)}, tmp_path / "a.safetensors")
    plain = inspect(tmp_path / "a.safetensors")
    assert [(t.name, t.dtype, t.format, t.bits_per_weight) for t in plain.tensors] == [
        ("n.weight", "F32", None, 32.0),
        ("a.weight", "BF16", None, 16.0),
    ]
    quantize_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    quantized = inspect(tmp_path / "b.safetensors")
    weight = next(tensor for tensor in quantized.tensors if tensor.name == "a.weight")
    assert (weight.shape, weight.dtype, weight.format) == ((64, 128), "bfloat16", "nf4, block_size=64, scale=float32")
    assert weight.bits_per_weight == 4.5
    assert quantized.nbytes == sum(t.nbytes for t in load_file(tmp_path / "b.safetensors").values())
    assert quantized.weights == plain.weights == 64 * 128 + 10


MEMORY = """
import sys
import torch
from lowbit_rs.files import dequantize_file, quantize_file

def memory(field):
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))

small, large, packed = sys.argv[1:]
quantize_file(small, packed), dequantize_file(packed, small, force=True)  # what is loaded on first use
before = memory("VmRSS")
quantize_file(large, packed, force=True)
print(memory("VmHWM") - before)
dequantize_file(packed, large, force=True)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_under_twice_the_largest_tensor(tmp_path: Path) -> None:
    small, large, packed = (tmp_path / f"{name}.safetensors" for name in ("small", "large", "packed"))
    save_file({"a.weight": noise(256, 512, dtype=torch.bfloat16)}, small)
    matrix = noise(4096, 4096, dtype=torch.bfloat16)
    save_file({f"{index}.weight": matrix.clone() for index in range(4)} | {"lm_head.weight": matrix}, large)
    command = [sys.executable, "-c", MEMORY, str(small), str(large), str(packed)]
    run = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "2"}
    )
    assert all(int(growth) < 2 * matrix.nbytes for growth in run.stdout.split()), run.stdout
