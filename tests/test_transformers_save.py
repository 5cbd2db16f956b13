"""Saving packed models and loading them again: identical tensors, identical tokens, complete files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedModel

import lowbit_rs
from lowbit_rs import InvalidArgument, LowbitConfig, PackedWeight, QuantLinear, Unsupported
from lowbit_rs.files import inspect, load_packed, quantize_file, save_packed
from lowbit_rs.integrations.transformers import card
from lowbit_rs.nn import QuantExperts
from lowbit_rs.nn.model import PACKED_MODULES
from lowbit_rs.packed import describe
from tiny_models import ARCHITECTURES, inputs_of, load, logits_of, make_model, make_tokenizer

OPTIONS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "nf4-double": {"double_quant": True},
    "fp4": {"format": "fp4"},
    "fp4-double": {"format": "fp4", "double_quant": True},
    "uint4": {"format": "uint4", "scale_dtype": torch.bfloat16},
    "int8": {"format": "int8", "block_size": "row"},
    "fit": {"codebook": "fit", "signed_absmax": True},
    "mixed": {
        "overrides": {"*.1.*": {"format": "int8"}, "*_proj": {"block_size": 32}},
        "compute_dtype": torch.bfloat16,
        "activation": "int8",
    },
}


@pytest.fixture
def packed(tmp_path: Path) -> PreTrainedModel:
    """A packed Llama."""
    make_model("llama").save_pretrained(tmp_path / "float")
    model: PreTrainedModel = load(tmp_path / "float", quantization_config=LowbitConfig(double_quant=True))
    return model


def assert_same(one: PreTrainedModel, other: PreTrainedModel) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert tensor.equal(theirs[name]), name
    assert [str(module) for module in one.modules() if isinstance(module, PACKED_MODULES)] == [
        str(module) for module in other.modules() if isinstance(module, PACKED_MODULES)
    ]
    assert one.num_parameters() == other.num_parameters()
    assert logits_of(one).equal(logits_of(other))


@pytest.mark.parametrize(
    ("architecture", "options"),
    [(name, "mixed") for name in ARCHITECTURES] + [("llama", name) for name in OPTIONS if name != "mixed"],
)
def test_saved_loaded_and_saved_again(architecture: str, options: str, tmp_path: Path) -> None:
    make_model(architecture).save_pretrained(tmp_path / "float")
    model = load(tmp_path / "float", quantization_config=LowbitConfig(**OPTIONS[options]))
    model.save_pretrained(tmp_path / "one")
    again = load(tmp_path / "one")
    assert_same(model, again)
    again.save_pretrained(tmp_path / "two")
    assert_same(model, load(tmp_path / "two"))
    assert (tmp_path / "one" / "config.json").read_bytes() == (tmp_path / "two" / "config.json").read_bytes()
    assert metadata(tmp_path / "one") == metadata(tmp_path / "two")
    if model.can_generate():
        inputs = inputs_of(model)["input_ids"]
        one, two = (each.generate(inputs, max_new_tokens=6, do_sample=False) for each in (model, again))
        assert one.equal(two)


def metadata(directory: Path) -> Any:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "t5"])
def test_sharded(architecture: str, tmp_path: Path) -> None:
    make_model(architecture).save_pretrained(tmp_path / "float", max_shard_size="100kB")
    config = LowbitConfig(format="int8", block_size=32)
    model = load(tmp_path / "float", quantization_config=config)
    model.save_pretrained(tmp_path / "packed", max_shard_size="20kB")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 3
    assert_same(model, load(tmp_path / "packed"))
    index = json.loads((tmp_path / "packed" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == make_model(architecture).num_parameters()


def test_dtype_of_the_rest_follows_the_argument(packed: PreTrainedModel, tmp_path: Path) -> None:
    packed.save_pretrained(tmp_path / "packed")
    model = load(tmp_path / "packed", dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.packed.tensors().keys() == packed.model.layers[0].mlp.up_proj.packed.tensors().keys()
    assert model.model.norm.weight.dtype == layer.dtype == torch.bfloat16
    assert layer.weight_scale_2.dtype == torch.float32
    assert logits_of(model).dtype == torch.bfloat16


def test_files_are_complete_and_readable_without_transformers(packed: PreTrainedModel, tmp_path: Path) -> None:
    directory = tmp_path / "packed"
    packed.save_pretrained(directory)
    assert {"config.json", "generation_config.json", "model.safetensors"} == {path.name for path in directory.iterdir()}
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert config == json.loads(json.dumps(LowbitConfig(double_quant=True).to_dict()))
    assert (config["quant_method"], config["format_version"]) == ("lowbit", 1)
    weights = load_packed(directory)
    name = "model.layers.0.mlp.up_proj"
    layer = packed.get_submodule(name)
    assert isinstance(layer, QuantLinear)
    assert weights[f"{name}.weight"] == layer.packed
    row = next(tensor for tensor in inspect(directory).tensors if tensor.name == f"{name}.weight")
    assert row.format == "nf4, block_size=64, double_quant"
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert {f"{name}.weight{part}" for part in ("", "_scale", "_scale_2", "_scale_offset")} <= set(file.keys())


def test_file_of_lowbit_quantize_loads_as_a_model(tmp_path: Path) -> None:
    """Per-tensor descriptions in the header are what counts: config.json names the method alone."""
    source = make_model("llama")
    source.save_pretrained(tmp_path / "float")
    quantize_file(tmp_path / "float", tmp_path / "packed", "uint4", 32, double_quant=True)
    model = load(tmp_path / "packed")
    assert model.config.quantization_config.format is None
    lowbit_rs.quantize_model(source, "uint4", 32, double_quant=True, progress=False)
    assert logits_of(model).equal(logits_of(source))
    model.save_pretrained(tmp_path / "again")
    assert_same(model, load(tmp_path / "again"))


#: Ways to pack one expert by itself, and what a stack of them is stored as.
EXPERT_BY_EXPERT: dict[str, tuple[dict[str, Any], str]] = {
    "nf4": ({}, "nf4, block_size=64, scale=float32"),
    "double": ({"double_quant": True}, "nf4, block_size=64, scale=float32"),
    "uint4 double": (
        {"format": "uint4", "block_size": 32, "double_quant": True, "scale_dtype": torch.float16},
        "uint4, block_size=32, scale=float32",
    ),
    "int8": ({"format": "int8", "block_size": "row"}, "int8, block_size=row, scale=float32"),
    "codebook": (
        {"codebook": "block-optimal", "signed_absmax": True},
        "custom, block_size=64, scale=float32, signed_absmax",
    ),
}


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(("options", "becomes"), EXPERT_BY_EXPERT.values(), ids=EXPERT_BY_EXPERT)
def test_experts_packed_one_by_one_are_stacked(
    architecture: str, options: dict[str, Any], becomes: str, tmp_path: Path
) -> None:
    make_model(architecture).save_pretrained(tmp_path / "float")
    quantize_file(tmp_path / "float", tmp_path / "packed", **options)
    model = load(tmp_path / "packed")
    experts = [module for module in model.modules() if isinstance(module, QuantExperts)]
    assert len(experts) == 2
    assert {describe(stack.spec) for module in experts for stack in module.stacks.values()} == {becomes}
    packed = {
        name: weight for name, weight in load_packed(tmp_path / "packed").items() if isinstance(weight, PackedWeight)
    }
    floats = decoded_directory(tmp_path / "float", tmp_path / "decoded", packed)
    for name, module in load(floats).named_modules():
        other = model.get_submodule(name)
        if isinstance(other, QuantExperts):
            for key, stack in other.stacks.items():
                assert stack.dequantize().equal(module.get_parameter(key))
    model.save_pretrained(tmp_path / "again")
    assert_same(model, load(tmp_path / "again"))


def decoded_directory(source: Path, path: Path, packed: dict[str, PackedWeight]) -> Path:
    """The directory ``source`` with the values of packed weights."""
    shutil.copytree(source, path)
    tensors = load_file(path / "model.safetensors")
    save_file(
        tensors | {name: weight.dequantize() for name, weight in packed.items()},
        path / "model.safetensors",
        {"format": "pt"},
    )
    return path


def test_experts_that_cannot_be_stacked_are_named(tmp_path: Path) -> None:
    make_model("mixtral").save_pretrained(tmp_path / "float")
    quantize_file(tmp_path / "float", tmp_path / "packed")
    path = tmp_path / "packed" / "model.safetensors"
    tensors = load_packed(path)
    name = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    weight = tensors[name]
    assert isinstance(weight, PackedWeight)
    save_packed({**tensors, name: lowbit_rs.quantize(weight.dequantize(), "int4")}, path, force=True)
    with pytest.raises(Unsupported, match=r"experts\.2\.w1\.weight: not supported: it is not packed as .*0\.w1"):
        load(tmp_path / "packed")
    del tensors[name]
    save_packed(tensors, path, force=True)
    with pytest.raises(
        InvalidArgument, match=r"0\.mlp\.experts\.gate_up_proj: got 896 rows in 7 packed matrices, expected 1024"
    ):
        load(tmp_path / "packed")


def test_with_and_without_a_head(packed: PreTrainedModel, tmp_path: Path) -> None:
    packed.save_pretrained(tmp_path / "head")
    body = LlamaModel.from_pretrained(tmp_path / "head")
    assert isinstance(body.get_submodule("layers.0.mlp.up_proj"), QuantLinear)
    body.save_pretrained(tmp_path / "body")
    head = LlamaForCausalLM.from_pretrained(tmp_path / "body", dtype=torch.float32)
    assert isinstance(head.get_submodule("model.layers.0.mlp.up_proj"), QuantLinear)
    assert type(head.lm_head) is torch.nn.Linear
    head.lm_head.load_state_dict(packed.lm_head.state_dict())
    assert_same(packed, head.eval())


def test_state_dict_in_place_of_files(packed: PreTrainedModel) -> None:
    loaded = LlamaForCausalLM.from_pretrained(None, config=config_of(packed), state_dict=packed.state_dict())
    assert_same(packed, loaded.eval())


def config_of(model: PreTrainedModel) -> LlamaConfig:
    """The config as it is read from a file: transformers takes one with a dictionary for that of a packed model."""
    config: LlamaConfig = LlamaConfig.from_dict(model.config.to_dict())
    return config


def test_lacking_and_foreign_tensors_are_refused(packed: PreTrainedModel, tmp_path: Path) -> None:
    state = packed.state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    del state[f"{name}_scale_2"]
    with pytest.raises(InvalidArgument, match=r"no tensor for model.layers.0.mlp.up_proj.weight_scale_2"):
        LlamaForCausalLM.from_pretrained(None, config=config_of(packed), state_dict=state)
    packed.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["intermediate_size"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidArgument, match=r"model.layers.0.mlp.gate_proj.weight: got shape \[128, 64\], expected"):
        load(tmp_path)


def test_newer_format_is_refused_by_name(packed: PreTrainedModel, tmp_path: Path) -> None:
    packed.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= {"format_version": 2, "format": "nf3"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidArgument, match=r"format_version: got 2, expected 1 at most.*: install a newer one"):
        load(tmp_path)


def test_dequantize_removes_every_trace(packed: PreTrainedModel, tmp_path: Path) -> None:
    expected = logits_of(packed)
    model: Any = packed
    model.dequantize()
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert not [module for module in model.modules() if isinstance(module, PACKED_MODULES)]
    assert not {"hf_quantizer", "quantization_method", "num_parameters", "hqq_quantized"} & vars(model).keys()
    assert not hasattr(model.config, "quantization_config")
    assert model.num_parameters() == make_model("llama").num_parameters()
    model.to(torch.float16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    model.save_pretrained(tmp_path / "back")
    back = load(tmp_path / "back", dtype=torch.float16)
    assert all(tensor.equal(back.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert not getattr(back, "is_quantized", False)


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral", "t5"])
def test_dequantized_models_save_in_the_layout_of_their_architecture(architecture: str, tmp_path: Path) -> None:
    source = make_model(architecture)
    source.save_pretrained(tmp_path / "float")
    model = load(tmp_path / "float", quantization_config=LowbitConfig(format="int8", block_size="row"))
    model.dequantize().save_pretrained(tmp_path / "back")
    back = load(tmp_path / "back")
    assert_same(model, back)
    assert {name: tensor.shape for name, tensor in back.state_dict().items()} == {
        name: tensor.shape for name, tensor in source.state_dict().items()
    }


def test_dequantize_to_another_dtype(packed: PreTrainedModel) -> None:
    model: Any = packed
    model.dequantize(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert logits_of(model).isfinite().all()


def test_casts_are_refused_or_harmless(packed: PreTrainedModel) -> None:
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    model: Any = packed
    for method in (model.half, model.float):
        with pytest.raises(ValueError, match="not supported for quantized model"):
            method()
    model.to(torch.bfloat16).bfloat16()
    for name, module in packed.named_modules():
        if isinstance(module, QuantLinear):
            for key in ("weight", "weight_scale", "weight_scale_2", "weight_scale_offset"):
                assert module.state_dict()[key].equal(before[f"{name}.{key}"])
            assert module.dtype == torch.bfloat16
    assert logits_of(packed).dtype == torch.bfloat16


def test_card_tells_to_import_this_package(
    packed: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways of pushing end in _upload_modified_files; what it gets is what would be on the Hub."""
    uploads: list[tuple[str, set[str], str]] = []

    def upload(self: object, working_dir: str, repo_id: str, *_: object, **__: object) -> None:  # noqa: ARG001
        files = {path.name for path in Path(working_dir).iterdir()}
        uploads.append((repo_id, files, (Path(working_dir) / "README.md").read_text(encoding="utf-8")))

    class Api:
        def create_repo(self, repo_id: str, **_: object) -> Any:
            return type("Url", (), {"repo_id": f"someone/{repo_id}"})

    from huggingface_hub import ModelCard, ModelCardData

    def new_card(repo_id: str, tags: list[str] | None = None, token: str | None = None) -> Any:  # noqa: ARG001
        return ModelCard.from_template(
            ModelCardData(tags=tags, library_name="transformers"), model_description="A model."
        )

    monkeypatch.setattr(PreTrainedModel, "_upload_modified_files", upload)
    for module in ("transformers.modeling_utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.create_and_tag_model_card", new_card)
        monkeypatch.setattr(f"{module}.hf_api", Api)
    model: Any = packed
    model.push_to_hub("tiny")
    model.save_pretrained(tmp_path / "tiny", push_to_hub=True)
    model.dequantize()
    model.push_to_hub("tiny")
    complete = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert [(name, files) for name, files, _ in uploads] == [("someone/tiny", complete)] * 3
    for _, _, text in uploads[:2]:
        assert "import lowbit_rs\nfrom transformers import LlamaForCausalLM\n" in text
        assert 'LlamaForCausalLM.from_pretrained("someone/tiny")' in text
        assert "- lowbit\n" in text
        assert "A model." in text
    assert "lowbit" not in uploads[2][2]


def test_note_is_added_once(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    for _ in range(2):
        card.add_note(path, "someone/tiny", "LlamaForCausalLM")
    assert path.read_text(encoding="utf-8").count("import lowbit_rs") == 1


def test_with_a_tokenizer_through_the_auto_classes(packed: PreTrainedModel, tmp_path: Path) -> None:
    packed.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert_same(packed, model)


def test_packed_weight_of_experts_is_in_the_file(tmp_path: Path) -> None:
    make_model("mixtral").save_pretrained(tmp_path / "float")
    model = load(tmp_path / "float", quantization_config=LowbitConfig())
    model.save_pretrained(tmp_path / "packed")
    experts = model.model.layers[1].mlp.experts
    assert isinstance(experts, QuantExperts)
    stored = load_packed(tmp_path / "packed" / "model.safetensors")["model.layers.1.mlp.experts.gate_up_proj"]
    assert isinstance(stored, PackedWeight)
    assert stored == experts.stacks["gate_up_proj"]
