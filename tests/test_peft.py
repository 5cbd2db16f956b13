"""PEFT on packed layers: adapters train, merge, come out again; the packed weights never change by themselves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn

import lowbit_rs
from adapters import randomized
from lowbit_rs import LowbitConfig, PackedWeight, QuantLinear
from lowbit_rs.integrations.peft import LoraQuantLinear
from tiny_models import VOCABULARY, load, logits_of, make_model

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"double_quant": True},
    "uint4": {"format": "uint4", "scale_dtype": torch.bfloat16},
    "int8": {"format": "int8", "block_size": "row"},
    "fit": {"codebook": "fit"},
}

#: From transformers, in what PEFT and Trainer call.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make_model("llama").save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def adapted(path: Path, options: dict[str, Any] | None = None, **lora: Any) -> Any:
    """A packed Llama with an adapter on every packed layer."""
    model = load(path, quantization_config=LowbitConfig(**options or {}))
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": "all-linear", **lora}))


def layers_of(model: nn.Module) -> dict[str, LoraQuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraQuantLinear)}


def base_of(layer: LoraQuantLinear) -> QuantLinear:
    base = layer.get_base_layer()
    assert isinstance(base, QuantLinear)
    return base


def tokens(count: int = 12) -> Tensor:
    torch.manual_seed(3)
    return torch.randint(2, VOCABULARY, (4, count))


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_training_changes_adapters_alone_and_the_loss_falls(
    directory: Path, options: dict[str, Any], lora: dict[str, Any]
) -> None:
    model = adapted(directory, options, **lora).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    changed = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert len(layers_of(model)) == 14


def test_gradients_under_autocast(directory: Path) -> None:
    model = adapted(directory).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name)
        assert parameter.grad is None or parameter.grad.isfinite().all()
    assert any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_adapter_computes_what_it_does_on_the_float_layer(directory: Path) -> None:
    model = randomized(adapted(directory))
    expected = logits_of(model)
    float_model = load(directory, quantization_config=LowbitConfig())
    float_model.dequantize()
    torch.manual_seed(0)
    other = randomized(get_peft_model(float_model, LoraConfig(r=4, target_modules="all-linear")))
    torch.testing.assert_close(expected, logits_of(other), rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_merged_weight_is_the_packed_sum(
    directory: Path, options: dict[str, Any], lora: dict[str, Any], safe: bool
) -> None:
    model = adapted(directory, options, **lora).eval()
    packed_logits = logits_of(model)  # a new adapter changes nothing
    randomized(model)
    layers = layers_of(model)
    before = {name: base_of(layer).packed for name, layer in layers.items()}
    kept = copy.deepcopy(before)
    expected = logits_of(model)
    if not lora:
        deltas = {name: layer.get_delta_weight("default") for name, layer in layers.items()}
    model.merge_adapter(safe_merge=safe)
    for name, layer in layers.items():
        packed = base_of(layer).packed
        assert packed.spec == before[name].spec
        if not lora:
            repacked = lowbit_rs.quantize(
                kept[name].dequantize(torch.float32) + deltas[name],
                packed.spec.format,
                packed.spec.block_size,
                packed.spec.double_quant,
                packed.codebook,
                scale_dtype=getattr(torch, packed.spec.scale_dtype),
            )
            assert packed.dequantize(torch.float32).equal(repacked.dequantize(torch.float32))
    # Packing the sum rounds weights as packing the float model did, and its logits move about as much.
    rounding = (packed_logits - logits_of(make_model("llama"))).norm() / packed_logits.norm()
    assert 0 < (logits_of(model) - expected).norm() / expected.norm() < 2 * rounding
    model.unmerge_adapter()
    assert all(base_of(layer).packed == kept[name] for name, layer in layers.items())
    assert logits_of(model).equal(expected)


def test_layer_with_permuted_columns_is_merged_in_their_order() -> None:
    layer = nn.Linear(64, 24)
    order = torch.randperm(64).to(torch.int32)
    sorted_columns = lowbit_rs.quantize(layer.weight.detach()[:, order], "int4", 16)
    packed = PackedWeight.from_tensors(
        sorted_columns.spec, (24, 64), torch.float32, sorted_columns.tensors() | {"permutation": order}
    )
    base = QuantLinear.from_packed(packed, layer.bias)
    model: Any = get_peft_model(nn.Sequential(base), LoraConfig(r=4, target_modules=["0"]))
    randomized(model)
    adapter = layers_of(model)["base_model.model.0"]
    kept = copy.deepcopy(base.packed)
    total = kept.dequantize() + adapter.get_delta_weight("default")
    model.merge_adapter()
    assert torch.equal(base.packed.permutation, order)  # type: ignore[arg-type]
    blocks = total[:, order].unflatten(1, (-1, 16))
    step = blocks.abs().amax(2, keepdim=True) / 7  # int4 reaches -8, so that no value is beyond the table
    error = (base.packed.dequantize()[:, order].unflatten(1, (-1, 16)) - blocks).abs()
    assert (error <= 0.5001 * step).all()
    model.unmerge_adapter()
    assert base.packed == kept


def test_bias_of_an_adapter_is_merged(tmp_path: Path) -> None:
    make_model("opt").save_pretrained(tmp_path)
    model = randomized(adapted(tmp_path, {"format": "int8", "block_size": 16}, target_modules=["fc1"], lora_bias=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.default.bias"):
                parameter.fill_(0.5)
    expected = logits_of(model)
    model.merge_adapter()
    assert (logits_of(model) - expected).norm() < 0.02 * expected.norm()
    model.unmerge_adapter()
    assert logits_of(model).equal(expected)


def test_several_adapters_merge_and_leave_together(directory: Path) -> None:
    model = randomized(adapted(directory))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    base = base_of(next(iter(layers_of(model).values())))
    original = base.packed.dequantize()
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="Already following adapters were merged default"):
        model.merge_adapter(["second"])
    assert not base.packed.dequantize().equal(original)
    model.unmerge_adapter()
    assert base.packed.dequantize().equal(original)


def test_broken_adapter_leaves_the_layer_as_it_was(directory: Path) -> None:
    model = randomized(adapted(directory))
    layer = next(iter(layers_of(model).values()))
    before = copy.deepcopy(base_of(layer).packed)
    layer.lora_B["default"].weight.data.fill_(torch.nan)  # type: ignore[operator]
    for safe in (True, False):
        with pytest.raises(ValueError, match="NaN"):
            layer.merge(safe_merge=safe)
        assert base_of(layer).packed == before
        assert layer.base_layer is base_of(layer)
        assert not layer.merged


def test_merged_and_unloaded_model_saves(directory: Path, tmp_path: Path) -> None:
    model = randomized(adapted(directory)).merge_and_unload()
    assert not layers_of(model)
    model.save_pretrained(tmp_path / "merged")
    assert logits_of(load(tmp_path / "merged")).equal(logits_of(model))


def test_dequantized_model_merges_without_rounding(directory: Path) -> None:
    model = randomized(adapted(directory))
    expected = logits_of(model)
    model.base_model.model.dequantize()
    model.merge_adapter()
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert not [module for module in merged.modules() if isinstance(module, QuantLinear | LoraQuantLinear)]


def test_adapter_is_saved_by_itself(directory: Path, tmp_path: Path) -> None:
    model = randomized(adapted(directory, use_dora=True))
    model.save_pretrained(tmp_path / "adapter")
    base = load(directory, quantization_config=LowbitConfig())
    loaded: Any = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert logits_of(loaded.eval()).equal(logits_of(model))
    again = load(directory, quantization_config=LowbitConfig())
    again.load_adapter(str(tmp_path / "adapter"))
    assert logits_of(again.eval()).equal(logits_of(model))


def test_conv1d_layers_take_adapters(tmp_path: Path) -> None:
    make_model("gpt2").save_pretrained(tmp_path)
    model = randomized(adapted(tmp_path, {"format": "int8", "block_size": 16}, target_modules=["c_attn", "c_fc"]))
    assert len(layers_of(model)) == 4
    expected = logits_of(model)
    model.merge_adapter()
    assert (logits_of(model) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prepare_model_for_kbit_training(directory: Path, dtype: torch.dtype) -> None:
    config = LowbitConfig(scale_dtype=torch.bfloat16)
    model = load(directory, quantization_config=config, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".weight" in name}
    prepare: Any = prepare_model_for_kbit_training
    model = prepare(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items() if name in before)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_trainer(directory: Path, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = adapted(directory)
    rows = [{"input_ids": row, "labels": row} for row in tokens()]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=6,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_steps=6,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    files = {path.name for path in (tmp_path / "out" / "checkpoint-6").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files


def test_trainer_refuses_packed_weights_without_adapters(directory: Path, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = load(directory, quantization_config=LowbitConfig())
    with pytest.raises(ValueError, match="purely quantized models"):
        Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]))
