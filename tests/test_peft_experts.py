"""LoRA on the packed experts of a mixture: PEFT's target_parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel

from adapters import randomized
from lowbit_rs import InvalidArgument, LowbitConfig, Unsupported
from lowbit_rs.integrations.peft import LoraQuantExperts
from lowbit_rs.nn import QuantExperts
from lowbit_rs.nn.experts import matrices
from tiny_models import VOCABULARY, load, logits_of, make_model

#: From transformers, in what PEFT calls.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def gpt_oss() -> PreTrainedModel:
    """A model whose float stacks are [experts, inputs, outputs], with biases."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8}
    sizes |= {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return GptOssForCausalLM(GptOssConfig(vocab_size=VOCABULARY, num_key_value_heads=2, pad_token_id=0, **sizes))


@pytest.fixture(params=["mixtral", "qwen3_moe", "gpt_oss"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model = gpt_oss() if request.param == "gpt_oss" else make_model(request.param)
    model.save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def adapted(path: Path, *, floats: bool = False, **options: Any) -> Any:
    """A packed mixture, or the float one of the same values, with adapters that do something."""
    model = load(path, quantization_config=LowbitConfig(**options))
    if floats:
        model.dequantize()
    torch.manual_seed(0)
    return randomized(get_peft_model(model, LoraConfig(r=4, target_modules=[], target_parameters=TARGETS)))


def experts_of(model: Any) -> list[QuantExperts]:
    return [module for module in model.modules() if isinstance(module, QuantExperts)]


def stored(model: Any) -> list[Tensor]:
    return [tensor.clone() for module in experts_of(model) for tensor in module.state_dict().values()]


def test_adapters_compute_what_they_do_on_float_experts(directory: Path) -> None:
    model = adapted(directory)
    assert sum(isinstance(module, LoraQuantExperts) for module in model.modules()) == 4
    expected = logits_of(adapted(directory, floats=True))
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    with model.disable_adapter():
        assert logits_of(model).equal(logits_of(load(directory, quantization_config=LowbitConfig())))


def test_training_changes_adapters_alone_and_the_loss_falls(directory: Path) -> None:
    model = adapted(directory, double_quant=True).train()
    before = stored(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    torch.manual_seed(3)
    tokens, losses = torch.randint(2, VOCABULARY, (4, 12)), []
    for _ in range(12):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        assert all((parameter.grad is not None) == ("lora_" in name) for name, parameter in model.named_parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(*pair) for pair in zip(before, stored(model), strict=True))


def test_merged_experts_are_the_packed_sum_and_come_out_again(directory: Path) -> None:
    model = adapted(directory, format="int8", block_size=16)
    floats = adapted(directory, floats=True, format="int8", block_size=16)
    before, logits = stored(model), logits_of(model)
    model.merge_adapter()
    floats.merge_adapter()
    for name, module in model.named_modules():
        if isinstance(module, QuantExperts):
            for key, stack in module.stacks.items():
                wanted = matrices(module, floats.get_submodule(name).get_parameter(key))
                # Half a step of the block's scale, which is at most the largest weight over 127.
                step = float(wanted.abs().max()) / 127
                torch.testing.assert_close(stack.dequantize(), wanted, rtol=0, atol=0.501 * step)
    assert not logits_of(model).equal(logits)
    model.unmerge_adapter()
    assert all(torch.equal(*pair) for pair in zip(before, stored(model), strict=True))
    assert logits_of(model).equal(logits)
    merged = model.merge_and_unload()
    assert len(experts_of(merged)) == 2
    assert not any("lora_" in name for name, _ in merged.named_parameters())


def test_adapters_are_saved_by_themselves(directory: Path, tmp_path: Path) -> None:
    model = adapted(directory)
    model.save_pretrained(tmp_path / "adapter")
    again: Any = PeftModel.from_pretrained(load(directory, quantization_config=LowbitConfig()), tmp_path / "adapter")
    assert logits_of(again.eval()).equal(logits_of(model))


def test_adapter_that_is_not_finite_leaves_its_stack_as_it_was(tmp_path: Path) -> None:
    make_model("mixtral").save_pretrained(tmp_path / "float")
    model = adapted(tmp_path / "float")
    before = stored(model)
    wrapper = next(module for module in model.modules() if isinstance(module, LoraQuantExperts))
    with torch.no_grad():
        wrapper.lora_B["default"].get_parameter("weight").fill_(torch.nan)
    with pytest.raises(InvalidArgument, match="is NaN, expected finite values"):
        wrapper.merge()
    assert wrapper.merged_adapters == []
    assert all(torch.equal(*pair) for pair in zip(before, stored(model), strict=True))


@pytest.mark.parametrize("target", ["self_attn.q_proj.weight", "mlp.experts.gate_up_proj_scale"])
def test_parameters_that_are_no_stacks_are_refused(target: str, tmp_path: Path) -> None:
    make_model("mixtral").save_pretrained(tmp_path / "float")
    model = load(tmp_path / "float", quantization_config=LowbitConfig())
    with pytest.raises(Unsupported, match=f"target_parameters with {target.rpartition('.')[2]} of a Quant"):
        get_peft_model(model, LoraConfig(r=4, target_modules=[], target_parameters=[target]))
