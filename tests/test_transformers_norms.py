"""fuse_norms on models of transformers: what each becomes, and that outputs and keys stay."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.bert.modeling_bert import BertModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import lowbit_rs
import tiny_models
from lowbit_rs import LowbitConfig
from lowbit_rs._norm_ops import NormKind
from lowbit_rs.nn import LayerNorm, RMSNorm
from lowbit_rs.nn.fused_norms import fused

LLAMA = NormKind(1e-5, cast_before_weight=True)
NORMS: dict[type[nn.Module], NormKind] = {
    LlamaRMSNorm: LLAMA,
    MistralRMSNorm: LLAMA,
    Qwen3RMSNorm: LLAMA,
    Gemma3RMSNorm: NormKind(1e-5, unit_offset=True),
    Olmo2RMSNorm: NormKind(1e-5),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("width", [16, 640])
def test_norms_are_recognized(norm: type[nn.Module], width: int) -> None:
    new = fused(norm(width, 1e-5))
    assert isinstance(new, RMSNorm)
    assert new.kind == NORMS[norm]


def test_a_norm_with_other_dtypes_is_left_alone() -> None:
    """T5's gives float32 for a bfloat16 x beside a float32 weight, without a rounding in between."""
    assert isinstance(fused(T5LayerNorm(16)), str)


@pytest.mark.parametrize("architecture", ["llama", "opt", "bloom", "bert"])
def test_outputs_and_keys_stay(architecture: str, dtype: torch.dtype) -> None:
    model = tiny_models.make_model(architecture)
    nn.Module.to(model, dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln" in name:
            nn.init.normal_(parameter, 1.0, 0.3)
    plain = copy.deepcopy(model)
    lowbit_rs.quantize_model(plain, progress=False)
    report = lowbit_rs.quantize_model(model, progress=False, fuse_norms=True)
    assert report.fused_norms
    assert not [name for name in report.skipped if "norm" in name.lower()]
    assert list(model.state_dict()) == list(plain.state_dict())
    own = [type(model.get_submodule(name)) for name in report.fused_norms]
    assert set(own) <= {RMSNorm, LayerNorm}
    wanted, mine = tiny_models.logits_of(plain), tiny_models.logits_of(model)
    # As far as another order of sums carries through two layers.
    tolerance = 32 * torch.finfo(dtype).eps * float(wanted.abs().max())
    torch.testing.assert_close(mine, wanted, rtol=0, atol=tolerance)


def test_training_goes_on() -> None:
    model = tiny_models.make_model("llama")
    plain = copy.deepcopy(model)
    lowbit_rs.quantize_model(plain, progress=False)
    lowbit_rs.quantize_model(model, progress=False, fuse_norms=True)
    tokens = torch.arange(12).reshape(1, 12)
    for one in (plain, model):
        one(input_ids=tokens, labels=tokens).loss.backward()
    gradients = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("architecture", ["llama", "opt", "bert"])
def test_norms_are_fused_while_a_model_loads(architecture: str, tmp_path: Path) -> None:
    """And again when it is loaded from the files that it was saved to."""
    model = tiny_models.make_model(architecture)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln" in name:
            nn.init.normal_(parameter, 1.0, 0.3)
    model.save_pretrained(tmp_path / "float")
    plain = tiny_models.load(tmp_path / "float", quantization_config=LowbitConfig())
    fused = tiny_models.load(tmp_path / "float", quantization_config=LowbitConfig(fuse_norms=True))
    names = fused.hf_quantizer.report.fused_norms
    assert names
    assert {type(fused.get_submodule(name)) for name in names} <= {RMSNorm, LayerNorm}
    assert not [name for name, value in fused.named_parameters() if value.is_meta]
    wanted = tiny_models.logits_of(plain)
    tolerance = 32 * torch.finfo(wanted.dtype).eps * float(wanted.abs().max())
    torch.testing.assert_close(tiny_models.logits_of(fused), wanted, rtol=0, atol=tolerance)
    fused.save_pretrained(tmp_path / "packed")
    assert json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]["fuse_norms"] is True
    again = tiny_models.load(tmp_path / "packed")
    assert again.hf_quantizer.report.fused_norms == names
    assert list(again.state_dict()) == list(fused.state_dict()) == list(plain.state_dict())
    assert torch.equal(tiny_models.logits_of(again), tiny_models.logits_of(fused))


def test_skipped_norms_and_wrong_flags(tmp_path: Path) -> None:
    tiny_models.make_model("llama").save_pretrained(tmp_path)
    config = LowbitConfig(fuse_norms=True, skip_modules=["lm_head", "model.norm"])
    report = tiny_models.load(tmp_path, quantization_config=config).hf_quantizer.report
    assert report.fused_norms
    assert "model.norm" not in report.fused_norms
    assert report.skipped["model.norm"] == "matches skip='model.norm'"
    with pytest.raises(lowbit_rs.InvalidArgument, match="fuse_norms"):
        LowbitConfig(fuse_norms=1)


def test_bert_has_torchs_norms() -> None:
    model = tiny_models.make_model("bert")
    assert any(isinstance(module, BertModel) for module in model.modules())
    report = lowbit_rs.quantize_model(model, progress=False, fuse_norms=True)
    norms = [model.get_submodule(name) for name in report.fused_norms]
    assert norms
    assert all(isinstance(norm, LayerNorm) for norm in norms)
