"""lowbit_rs.from_pretrained: models of every layout against the same model with the decoded weights."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowbit_rs
import lowbit_rs.compat.bitsandbytes as bnb
from foreign import Layer, awq_gemm, case, compressed_tensors, gptq, layer
from lowbit_rs import InvalidArgument, LowbitConfig, QuantLinear, Unsupported
from lowbit_rs.files import quantize_file
from lowbit_rs.integrations.checkpoints import convert_file
from lowbit_rs.integrations.transformers.modules import QuantConv1D
from lowbit_rs.nn import QuantExperts
from tiny_models import make_model

transformers = pytest.importorskip("transformers", reason="the models are those of transformers")

CONFIG: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
}
IDS = torch.tensor([[1, 5, 17, 3, 80, 2, 9, 44]])

#: Tensors of a quantized layer, called "layer.*", and its decoded weight.
Packer = Callable[[nn.Linear], tuple[dict[str, Tensor], Tensor]]


def affine(pack: Callable[[Any], dict[str, Tensor]], **options: Any) -> Packer:
    """Random integers take the place of the weight: with a scale for which the model stays in range."""

    def packer(linear: nn.Linear) -> tuple[dict[str, Tensor], Tensor]:
        x = layer(linear.out_features, linear.in_features, 32, seed=linear.in_features, **options)
        x.scale = (x.scale / (3000 if options.get("bits", 4) == 4 else 50_000)).half()
        # In float32, which products take: rounding weights to float16, as GPU kernels do, would change the logits.
        return pack(x), Layer(x.q, x.scale.float(), x.zero, x.g_idx).decoded()

    return packer


def bitsandbytes(kind: str, **options: Any) -> Packer:
    def packer(linear: nn.Linear) -> tuple[dict[str, Tensor], Tensor]:
        packed = getattr(bnb.nn, kind)(linear.in_features, linear.out_features, bias=False, **options)
        packed.load_state_dict({"weight": linear.weight.detach()})
        packed.to("cpu")
        tensors = {f"layer.{key}": tensor for key, tensor in packed.state_dict().items()}
        if kind == "Linear8bitLt":
            return tensors, bnb.functional.int8_vectorwise_dequant(packed.weight.data, packed.weight.SCB)
        return tensors, bnb.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state)

    return packer


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
LAYOUTS: dict[str, tuple[dict[str, Any], Packer]] = {
    "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, bitsandbytes("LinearNF4")),
    "fp4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        bitsandbytes("LinearFP4", compress_statistics=False),
    ),
    "int8": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        bitsandbytes("Linear8bitLt", has_fp16_weights=False),
    ),
    "gptq": (GPTQ, affine(gptq)),
    "gptq-8bit": ({**GPTQ, "bits": 8}, affine(functools.partial(gptq, bits=8), bits=8)),
    "gptq-desc-act": ({**GPTQ, "desc_act": True}, affine(gptq, desc_act=True)),
    "awq": (AWQ, affine(awq_gemm)),
    "compressed-tensors": (case("compressed-tensors-w4a16")[1], affine(compressed_tensors, symmetric=True)),
}


#: Layers that transformers leaves alone when it quantizes: heads, and T5's ``wo``, to whose dtype T5 casts its input.
KEPT = ("lm_head", "classifier", "wo")


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG | changes))


def checkpoint(path: Path, layout: str, model: Any = None, **changes: Any) -> tuple[Path, Any]:
    """A model directory in a layout, and the model with its decoded weights."""
    quantization, pack = LAYOUTS[layout]
    model = (llama(**changes) if model is None else model).eval()
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in KEPT:
            packed, decoded = pack(module)
            del tensors[f"{name}.weight"]
            tensors |= {key.replace("layer", name, 1): tensor for key, tensor in packed.items()}
            module.weight.data = decoded.to(module.weight.dtype)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text(encoding="utf-8")) | {"quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path, model


def exact(model: Any) -> Any:
    """The model, no activation of which is rounded."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.activation = "none"
    return model


def assert_same(model: Any, reference: Any) -> None:
    """Products of the same weights, summed in another order."""
    torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=1e-4, atol=1e-4)
    tokens = [m.generate(IDS, max_new_tokens=12, do_sample=False) for m in (model, reference)]
    assert torch.equal(*tokens)


def assert_close_in_norm(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    with torch.no_grad():
        assert float((got - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_tokens(layout: str, tmp_path: Path) -> None:
    path, reference = checkpoint(tmp_path / "x", layout)
    model = lowbit_rs.from_pretrained(path)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name in linears if not isinstance(model.get_submodule(name), QuantLinear)} == {"lm_head"}
    assert not model.training
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert_same(exact(model), reference)


@pytest.mark.parametrize("threshold", [None, 0.0, 4.5])
def test_rows_in_8_bits_are_multiplied_as_llm_int8(threshold: float | None, tmp_path: Path) -> None:
    """With the checkpoint's threshold, also from the native files that it is converted to."""
    path, reference = checkpoint(tmp_path / "x", "int8")
    if threshold is not None:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"]["llm_int8_threshold"] = threshold
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    convert_file(path, tmp_path / "native")
    for directory in (path, tmp_path / "native"):
        model = lowbit_rs.from_pretrained(directory)
        layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
        expected = ("auto", 6.0 if threshold is None else threshold)
        assert {(layer.activation, layer.threshold) for layer in layers} == {expected}
        assert_close_in_norm(model(IDS).logits, reference(IDS).logits, 0.05)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_what_transformers_and_bitsandbytes_wrote(kind: str, tmp_path: Path) -> None:
    """Read, rewritten as native files and back, and read by transformers again: the same weights all the way."""
    library = pytest.importorskip("bitsandbytes", reason="the installed bitsandbytes writes and reads the checkpoint")
    pytest.importorskip("accelerate", reason="transformers loads models of bitsandbytes with it")
    llama().save_pretrained(tmp_path / "float")
    options: dict[str, Any] = {"load_in_8bit": True}
    if kind != "int8":
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": kind == "nf4"}
    load = transformers.AutoModelForCausalLM.from_pretrained
    config = transformers.BitsAndBytesConfig(**options)
    written = load(tmp_path / "float", quantization_config=config, device_map="cpu")
    written.save_pretrained(tmp_path / "theirs")
    convert_file(tmp_path / "theirs", tmp_path / "native")
    convert_file(tmp_path / "native", tmp_path / "back", to="bitsandbytes")
    read, native = (lowbit_rs.from_pretrained(tmp_path / name) for name in ("theirs", "native"))
    back = load(tmp_path / "back", device_map="cpu")
    layers = [name for name, module in written.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    assert len(layers) == 14
    for name in layers:
        mine = read.get_submodule(name)
        assert mine.packed == native.get_submodule(name).packed
        for other in (written.get_submodule(name), back.get_submodule(name)):
            if kind == "int8":
                decoded = library.functional.int8_vectorwise_dequant(other.weight.data, other.weight.SCB)
                torch.testing.assert_close(mine.dequantize(torch.float32), decoded, rtol=2.0**-22, atol=0)
            else:
                decoded = library.functional.dequantize_4bit(other.weight.data, other.weight.quant_state)
                assert torch.equal(mine.dequantize(), decoded)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_weight_is_decoded_on_the_way(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = checkpoint(tmp_path / "x", layout)

    def refuse(*_: object) -> None:
        raise AssertionError("a float weight")

    monkeypatch.setattr(lowbit_rs.PackedWeight, "dequantize", refuse)
    monkeypatch.setattr("lowbit_rs.functional.quantize", refuse)
    lowbit_rs.from_pretrained(path)
    convert_file(path, tmp_path / "native")


@pytest.mark.parametrize("layout", ["nf4", "gptq-desc-act"])
def test_native_files_load_as_well(layout: str, tmp_path: Path) -> None:
    path, reference = checkpoint(tmp_path / "x", layout)
    convert_file(path, tmp_path / "native")
    assert_same(lowbit_rs.from_pretrained(tmp_path / "native"), reference)


def test_what_quantize_file_wrote(tmp_path: Path) -> None:
    model = llama().eval()
    model.save_pretrained(tmp_path / "x")
    quantize_file(tmp_path / "x", tmp_path / "native", "nf4", embeddings=True)
    loaded = lowbit_rs.from_pretrained(tmp_path / "native")
    assert isinstance(loaded.model.embed_tokens, lowbit_rs.QuantEmbedding)
    lowbit_rs.quantize_model(model, "nf4", embeddings=True, progress=False)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def other_models() -> dict[str, Any]:
    ids = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}
    opt = {
        "hidden_size": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 64,
    }
    t5 = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    bert = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {
        "opt": lambda: transformers.OPTForCausalLM(transformers.OPTConfig(vocab_size=96, **opt, **ids)),
        "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=96, **t5, **ids)),
        "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=96, **bert)),
        "bloom": lambda: transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=96, hidden_size=64, n_layer=2, n_head=4, **ids)
        ),
    }


@pytest.mark.parametrize("name", ["opt", "t5", "bert", "bloom"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path, reference = checkpoint(tmp_path / "x", "nf4", other_models()[name]())
    model = lowbit_rs.from_pretrained(path)
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if name == "t5" else {})
    torch.testing.assert_close(model(**inputs).logits, reference(**inputs).logits, rtol=1e-4, atol=1e-4)


def repacked(path: Path, layout: str, model: Any, pattern: str, *, transposed: bool = False) -> tuple[Path, Any]:
    """A model directory whose matrices of matching names are packed one by one, and the model with their values."""
    quantization, pack = LAYOUTS[layout]
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    floats = dict(tensors)
    for name in [name for name in tensors if re.search(pattern, name)]:
        weight = tensors.pop(name).T if transposed else tensors.pop(name)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight.contiguous()
        packed, decoded = pack(linear)
        tensors |= {key.replace("layer", name.removesuffix(".weight"), 1): tensor for key, tensor in packed.items()}
        floats[name] = (decoded.T if transposed else decoded).float().contiguous()
    save_file(floats, path / "model.safetensors", {"format": "pt"})
    reference = type(model).from_pretrained(path, dtype=torch.float32).eval()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text(encoding="utf-8")) | {"quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path, reference


@pytest.mark.parametrize("layout", ["nf4", "int8", "gptq-desc-act"])
def test_transposed_layers(layout: str, tmp_path: Path) -> None:
    """GPT-2's Conv1D: libraries pack them as the linear layers that they are."""
    path, reference = repacked(tmp_path / "x", layout, make_model("gpt2"), r"\.c_\w+\.weight$", transposed=True)
    model = exact(lowbit_rs.from_pretrained(path))
    assert sum(isinstance(module, QuantConv1D) for module in model.modules()) == 8
    assert_same(model, reference)
    convert_file(path, tmp_path / "native")
    assert torch.equal(exact(lowbit_rs.from_pretrained(tmp_path / "native"))(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("layout", ["nf4", "gptq", "gptq-8bit", "awq"])
def test_experts_packed_one_by_one(layout: str, architecture: str, tmp_path: Path) -> None:
    path, reference = repacked(tmp_path / "x", layout, make_model(architecture), r"\.experts\.\d+\.\w+\.weight$")
    model = lowbit_rs.from_pretrained(path)
    assert sum(isinstance(module, QuantExperts) for module in model.modules()) == 2
    assert_same(model, reference)
    convert_file(path, tmp_path / "native")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    make_model("gpt2").save_pretrained(tmp_path / "x")
    tensors = load_file(tmp_path / "x" / "model.safetensors")
    name = "transformer.h.0.mlp.c_fc.weight"
    lowbit_rs.files.save_packed(
        tensors | {name: lowbit_rs.quantize(tensors[name])}, tmp_path / "x" / "model.safetensors", force=True
    )
    with pytest.raises(InvalidArgument, match=r"mlp\.c_fc\.weight: got shape \[64, 256\], expected \[256, 64\]"):
        lowbit_rs.from_pretrained(tmp_path / "x")


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    path, reference = checkpoint(tmp_path / "x", "nf4", tie_word_embeddings=True)
    model = lowbit_rs.from_pretrained(path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same(model, reference)


def test_biases_and_those_of_zeros_that_no_layer_has(tmp_path: Path) -> None:
    """AutoGPTQ writes a bias of zeros for each layer; other biases belong to a layer."""
    path, reference = checkpoint(tmp_path / "x", "gptq", attention_bias=True)
    tensors = load_file(path / "model.safetensors")
    for module in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        linear = reference.get_submodule(module)
        if linear.bias is None:
            tensors[f"{module}.bias"] = torch.zeros(linear.out_features, dtype=torch.float16)
        else:
            linear.bias.data = tensors[f"{module}.bias"] = torch.randn(linear.out_features)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, path / "model.safetensors")
    assert_same(lowbit_rs.from_pretrained(path), reference)
    tensors["model.layers.0.mlp.up_proj.bias"][0] = 1
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(InvalidArgument, match=r"the names \['model\.layers\.0\.mlp\.up_proj\.bias'\]"):
        lowbit_rs.from_pretrained(path)


def test_dtypes(tmp_path: Path) -> None:
    path, reference = checkpoint(tmp_path / "x", "gptq")
    for dtype in (torch.float16, torch.bfloat16):
        model = lowbit_rs.from_pretrained(path, dtype=dtype)
        assert model.dtype == dtype
        assert {p.dtype for name, p in model.named_parameters() if "norm" in name or "embed" in name} == {dtype}
        projection = model.model.layers[0].mlp.up_proj
        assert (projection.dtype, projection.weight.dtype) == (dtype, torch.uint8)
        logits = model(IDS).logits
        assert logits.dtype == dtype
        torch.testing.assert_close(logits.float(), reference(IDS).logits, rtol=0.1, atol=0.1)
    with pytest.raises(InvalidArgument, match=r"dtype: got torch\.float64"):
        lowbit_rs.from_pretrained(path, dtype=torch.float64)


def test_class_and_options(tmp_path: Path) -> None:
    path, reference = checkpoint(tmp_path / "x", "nf4")
    model = lowbit_rs.from_pretrained(path, model_class=transformers.LlamaForCausalLM, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    assert_same(model, reference)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_and_loaded_by_transformers(layout: str, tmp_path: Path) -> None:
    path, _ = checkpoint(tmp_path / "x", layout)
    model = lowbit_rs.from_pretrained(path)
    model.save_pretrained(tmp_path / "out")
    convert_file(path, tmp_path / "native")
    for directory in ("out", "native"):
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / directory)
        state = again.state_dict()
        assert {name: tensor for name, tensor in model.state_dict().items() if not tensor.equal(state[name])} == {}
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert_same(lowbit_rs.from_pretrained(tmp_path / "out"), model)


def test_options_of_a_packed_model_are_kept(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "float")
    options = LowbitConfig(compute_dtype=torch.bfloat16, overrides={"*.o_proj": {"activation": "int8"}})
    packed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=options)
    packed.save_pretrained(tmp_path / "packed")
    model = lowbit_rs.from_pretrained(tmp_path / "packed")
    assert model.config.quantization_config == options
    assert [str(module) for module in model.modules() if isinstance(module, QuantLinear)] == [
        str(module) for module in packed.modules() if isinstance(module, QuantLinear)
    ]
    assert model.model.layers[0].self_attn.o_proj.activation == "int8"
    assert model.model.layers[0].mlp.up_proj.activation == "none"
    assert torch.equal(model(IDS).logits, packed(IDS).logits)


def test_repositories_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, reference = checkpoint(tmp_path / "x", "nf4")
    asked = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert "*.safetensors" in allow_patterns
        return str(path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert_same(lowbit_rs.from_pretrained("someone/model-4bit", revision="v1"), reference)
    assert asked == [("someone/model-4bit", "v1")]


class TestRefusals:
    def test_paths(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for path in (tmp_path / "file", tmp_path / "nothing", "a/b/c"):
            with pytest.raises(InvalidArgument, match="path_or_id: got"):
                lowbit_rs.from_pretrained(path)

    def test_float_models(self, tmp_path: Path) -> None:
        llama().save_pretrained(tmp_path / "x")
        with pytest.raises(InvalidArgument, match="which is not quantized, expected a quantized checkpoint"):
            lowbit_rs.from_pretrained(tmp_path / "x")

    def test_directory_without_config(self, tmp_path: Path) -> None:
        path, _ = checkpoint(tmp_path / "x", "nf4")
        (path / "config.json").unlink()
        with pytest.raises(InvalidArgument, match=r"got no config\.json"):
            lowbit_rs.from_pretrained(path)

    def test_unknown_architecture(self, tmp_path: Path) -> None:
        path, _ = checkpoint(tmp_path / "x", "nf4")
        config = json.loads((path / "config.json").read_text(encoding="utf-8")) | {"architectures": ["NoSuchModel"]}
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(Unsupported, match=r"\['NoSuchModel'\] .* has no such model; pass model_class="):
            lowbit_rs.from_pretrained(path)

    def test_missing_tensors(self, tmp_path: Path) -> None:
        path, _ = checkpoint(tmp_path / "x", "nf4")
        tensors = load_file(path / "model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, path / "model.safetensors")
        with pytest.raises(InvalidArgument, match=r"not \['model\.norm\.weight'\]"):
            lowbit_rs.from_pretrained(path)


def test_the_package_imports_without_transformers() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None; import lowbit_rs; print('from_pretrained' in dir(lowbit_rs))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "True\n"
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        lowbit_rs.nonsense  # noqa: B018
