"""from_pretrained with a LowbitConfig: what is packed while loading, how, and what is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaForSequenceClassification, LlamaModel
from transformers.pytorch_utils import Conv1D

import lowbit_rs
from lowbit_rs import LowbitConfig, PackedWeight, QuantEmbedding, QuantLinear
from lowbit_rs.integrations.transformers.modules import QuantConv1D, packed_weights
from lowbit_rs.nn import QuantExperts
from lowbit_rs.nn.experts import matrices, stack_names
from tiny_models import ARCHITECTURES, VOCABULARY, inputs_of, load, logits_of, make_model

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"double_quant": True},
    "fp4": {"format": "fp4", "block_size": 32},
    "int4": {"format": "int4", "scale_dtype": torch.bfloat16},
    "uint4": {"format": "uint4", "block_size": 16, "scale_dtype": "float16"},
    "int8": {"format": "int8", "block_size": "row"},
    "codebook": {"codebook": [-1.0, -0.3, 0.0, 0.3, 1.0], "block_size": 32},
    "signed": {"codebook": "block-optimal", "signed_absmax": True},
    "flat": {"block_order": "flat"},
}

#: The layers of an architecture that stay float; of most, the head.
KEPT = {"bert": ("classifier",), "t5": ("lm_head", "wo")}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def saved(architecture: str, tmp_path: Path) -> Path:
    make_model(architecture).save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    make_model("llama").save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def float_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The matrices of a float model that can be packed, rows as outputs, by the names of their parameters."""
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            weight = module.weight.detach()
            weights[f"{name}.weight"] = weight.t() if isinstance(module, Conv1D) else weight
        for stack in stack_names(module):
            weights[f"{name}.{stack}"] = matrices(module, module.get_parameter(stack).detach())
    return weights


def packed_of(model: nn.Module) -> dict[str, PackedWeight]:
    return {
        f"{name}.{key}": packed
        for name, module in model.named_modules()
        for key, packed in packed_weights(module).items()
    }


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_every_format_of_every_architecture(architecture: str, saved: Path, options: dict[str, Any]) -> None:
    """Weights are those of lowbit_rs.quantize, to the bit; the model computes what its dequantized weights do."""
    source = make_model(architecture)
    model = load(saved, quantization_config=LowbitConfig(**options))
    packed, weights = packed_of(model), float_weights(source)
    kept = KEPT.get(architecture, ("lm_head",))
    assert packed.keys() == {name for name in weights if name.split(".")[-2] not in kept}
    keywords = {key: value for key, value in LowbitConfig(**options).to_dict().items() if key in PACKING}
    for name in packed:
        keywords["codebook"] = packed[name].codebook
        keywords["scale_dtype"] = getattr(torch, keywords["scale_dtype"] or "float32")
        assert packed[name] == lowbit_rs.quantize(weights[name], **keywords)
        keywords["scale_dtype"] = str(keywords["scale_dtype"]).removeprefix("torch.")
    assert type(model.get_submodule(kept[0])) is nn.Linear

    assert model.num_parameters() == source.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == source.num_parameters(exclude_embeddings=True)
    logits = logits_of(model)
    for name, weight in packed.items():
        weights[name].copy_(weight.dequantize(torch.float32))
    expected = logits_of(source)
    # Sums in fp32, in another order.
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


PACKING = ("format", "block_size", "double_quant", "scale_dtype", "block_order", "signed_absmax")


def test_dtype_and_footprint(architecture: str, saved: Path) -> None:
    source = make_model(architecture)
    model = load(saved, quantization_config=LowbitConfig(double_quant=True), dtype=torch.bfloat16)
    assert logits_of(model).dtype == torch.bfloat16
    packed = packed_of(model)
    before, after = source.get_memory_footprint() // 2, model.get_memory_footprint()
    weights = sum(weight.shape.numel() for weight in packed.values())
    # Norms of some architectures stay in float32, and buffers of positions are as they were.
    assert after < before - 2 * weights + sum(weight.nbytes for weight in packed.values()) + before // 10
    assert all(4 < weight.bits_per_weight < 4.3 or min(weight.shape) < 64 for weight in packed.values())
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "_scale" in name)
    assert model.dtype == torch.bfloat16
    report = model.hf_quantizer.report
    assert report.bytes_before == 2 * weights
    assert report.bytes_after == sum(weight.nbytes for weight in packed.values())
    assert "packed as nf4, block_size=64, double_quant" in str(report)


def test_keywords_reach_the_modules(llama: Path) -> None:
    config = LowbitConfig(
        compute_dtype=torch.float16,
        skip_modules=["lm_head", "*.1.mlp.*"],
        overrides={
            "*_proj": {"block_size": 32},
            "*.down_proj": {"block_size": "row", "format": "int8"},
            "model.layers.0.self_attn.q_proj": {"codebook": [-1.0, 0.0, 1.0], "compute_dtype": "bfloat16"},
        },
    )
    model = load(llama, quantization_config=config)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert (attention.k_proj.spec.block_size, attention.k_proj.compute_dtype) == (32, torch.float16)
    assert (attention.q_proj.spec.format, attention.q_proj.compute_dtype) == ("custom", torch.bfloat16)
    assert (mlp.down_proj.spec.format, mlp.down_proj.spec.block_size) == ("int8", "row")
    assert {type(layer) for layer in model.model.layers[1].mlp.children() if hasattr(layer, "weight")} == {nn.Linear}
    assert model.hf_quantizer.report.skipped["model.layers.1.mlp.up_proj"] == "matches skip='*.1.mlp.*'"


def test_dictionary_as_config(llama: Path) -> None:
    model = load(llama, quantization_config={"quant_method": "lowbit", "format": "int8", "block_size": "row"})
    assert model.model.layers[0].mlp.up_proj.spec.format == "int8"


def test_codebook_fitted_to_each_weight(llama: Path) -> None:
    model = load(llama, quantization_config=LowbitConfig(codebook="fit", block_size=32))
    tables = {tuple(packed.codebook.tolist()) for packed in packed_of(model).values() if packed.codebook is not None}
    assert len(tables) == len(packed_of(model))


def test_head_is_packed_on_demand_and_never_where_it_is_tied(tmp_path: Path) -> None:
    for tied in (False, True):
        make_model("llama", tie_word_embeddings=tied).save_pretrained(tmp_path / str(tied))
        config = LowbitConfig(skip_modules=[], embeddings=True)
        model = load(tmp_path / str(tied), quantization_config=config)
        assert type(model.lm_head) is (nn.Linear if tied else QuantLinear)
        assert type(model.model.embed_tokens) is (nn.Embedding if tied else QuantEmbedding)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert model.num_parameters() == make_model("llama", tie_word_embeddings=tied).num_parameters()
        assert logits_of(model).isfinite().all()
    assert model.hf_quantizer.report.skipped["lm_head"] == "its weight is tied to another"


def test_new_heads_stay_float_and_trainable(llama: Path) -> None:
    model = LlamaForSequenceClassification.from_pretrained(llama, quantization_config=LowbitConfig(), num_labels=3)
    assert type(model.score) is nn.Linear
    assert model.score.weight.requires_grad
    assert model.score.weight.std() > 0
    assert isinstance(model.get_submodule("model.layers.0.mlp.up_proj"), QuantLinear)


def test_modules_kept_in_fp32(tmp_path: Path) -> None:
    make_model("t5").save_pretrained(tmp_path)
    for dtype in (torch.float16, torch.bfloat16):
        model = load(tmp_path, quantization_config=LowbitConfig(), dtype=dtype)
        output = model.encoder.block[0].layer[1].DenseReluDense.wo
        assert type(output) is nn.Linear  # T5 asks for it
        assert output.weight.dtype == (torch.float32 if dtype == torch.float16 else dtype)
        assert isinstance(model.decoder.block[0].layer[0].SelfAttention.q, QuantLinear)
        assert logits_of(model).isfinite().all()


def test_float16_of_a_checkpoint_in_bfloat16(tmp_path: Path) -> None:
    make_model("llama").bfloat16().save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=LowbitConfig(), dtype=torch.float16)
    weight = model.model.layers[0].mlp.up_proj
    source = make_model("llama").bfloat16().half().get_parameter("model.layers.0.mlp.up_proj.weight")
    assert weight.packed == lowbit_rs.quantize(source)


@pytest.mark.parametrize("architecture", ["gpt2"], indirect=True)
def test_conv1d_has_inputs_as_rows(saved: Path) -> None:
    model = load(saved, quantization_config=LowbitConfig(format="int8", block_size="row"))
    layer = model.transformer.h[0].mlp.c_fc
    source = make_model("gpt2").get_parameter("transformer.h.0.mlp.c_fc.weight").detach()
    assert isinstance(layer, QuantConv1D)
    assert (layer.in_features, layer.out_features) == (64, 256)
    back = layer.to_conv1d()
    assert type(back) is Conv1D
    assert back.weight.shape == source.shape
    torch.testing.assert_close(back.weight.detach(), source, rtol=0, atol=float(source.abs().max()) / 127)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"], indirect=True)
def test_experts_are_packed_and_reported(saved: Path) -> None:
    model = load(saved, quantization_config=LowbitConfig(double_quant=True))
    experts = model.model.layers[1].mlp.experts
    assert isinstance(experts, QuantExperts)
    rows = {row.name: row for row in model.hf_quantizer.report.rows}
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert rows[name].shape == tuple(experts.stacks["gate_up_proj"].shape)
    assert rows[name].bytes_after == experts.stacks["gate_up_proj"].nbytes
    router = model.model.layers[1].mlp.gate
    assert router.weight.is_floating_point()


def test_base_model_of_a_checkpoint_with_a_head(llama: Path) -> None:
    model = LlamaModel.from_pretrained(llama, quantization_config=LowbitConfig())
    assert isinstance(model.get_submodule("layers.0.mlp.up_proj"), QuantLinear)
    assert (
        AutoModel.from_pretrained(llama, quantization_config=LowbitConfig()).num_parameters() == model.num_parameters()
    )


def test_nothing_to_pack_is_a_warning(llama: Path) -> None:
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM has no layer that is packed\n  .*: matches skip='model'"):
        load(llama, quantization_config=LowbitConfig(skip_modules=["model", "lm_head"]))


def test_experts_that_are_not_served_are_a_warning(tmp_path: Path) -> None:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        intermediate_size_mlp=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=2,
        pad_token_id=0,
    )
    Llama4ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"2 stacks of experts stay in floating point, as model.layers.0.feed_forward"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=LowbitConfig())
    assert isinstance(model.model.layers[0].self_attn.q_proj, QuantLinear)


def test_weights_that_are_not_in_the_checkpoint_are_initialized(tmp_path: Path) -> None:
    for architecture, lost in (("llama", "mlp.up_proj"), ("mixtral", "mlp.experts.gate_up_proj")):
        model = make_model(architecture)
        state = {name: tensor for name, tensor in model.state_dict().items() if lost not in name}
        model.save_pretrained(tmp_path / architecture, state_dict=state)
        if architecture == "mixtral":
            state = {key: value for key, value in state.items() if "gate_up_proj" not in key}
        loaded = type(model).from_pretrained(
            None, config=model.config, state_dict=state, quantization_config=LowbitConfig()
        )
        weights = packed_of(loaded)
        weight = next(packed for name, packed in weights.items() if lost in name).dequantize()
        assert 0 < weight.std() < 0.05
        assert logits_of(loaded).isfinite().all()


def test_weights_that_cannot_be_packed_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("llama")
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 4] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="details look at the `CONVERSION` entries"):
        load(tmp_path, quantization_config=LowbitConfig())
    assert r"model.layers.1.mlp.up_proj.weight: tensor: element [3, 4] is NaN" in caplog.text
    assert logits_of(load(tmp_path, quantization_config=LowbitConfig(nonfinite="propagate"))).isnan().any()


def test_config_of_the_caller_serves_several_models(tmp_path: Path) -> None:
    config = LowbitConfig()
    for architecture in ("llama", "opt"):
        make_model(architecture).save_pretrained(tmp_path / architecture)
        load(tmp_path / architecture, quantization_config=config)
    assert config == LowbitConfig()


def test_generation_is_that_of_the_dequantized_model(architecture: str, saved: Path) -> None:
    if architecture == "bert":
        pytest.skip("does not generate")
    model = load(saved, quantization_config=LowbitConfig(double_quant=True))
    inputs = {"input_ids": inputs_of(model)["input_ids"]}
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    model.dequantize()
    assert tokens.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False))
