"""Fused layers in models of transformers: loading, saving, offload, adapters, generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

import lowbit_rs
from counted_products import count_products
from lowbit_rs import LowbitConfig, fuse_model, quantize_model
from lowbit_rs._backends import cpu
from tiny_models import LAYERS, VOCABULARY, inputs_of, load, logits_of, make_model

#: From transformers, in what PEFT calls.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

#: Layers of the tiny Llama that are products of their own, and the products that are left of them.
SEPARATE, FUSED = 7 * LAYERS, 4 * LAYERS


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make_model("llama").save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return count_products(monkeypatch, cpu)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Equal but for the order of sums in fp32."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "opt", "mixtral", "qwen3_moe", "bert", "bloom"])
def test_every_architecture_gives_the_same(architecture: str, products: list[int]) -> None:
    fused, plain = make_model(architecture), make_model(architecture)
    fusion = quantize_model(fused, progress=False, fuse=True).fusion
    quantize_model(plain, progress=False)
    assert fusion is not None
    groups = {"llama": 2 * LAYERS, "opt": LAYERS, "mixtral": LAYERS, "qwen3_moe": LAYERS}.get(architecture, 0)
    assert len(fusion.groups) == groups
    products.clear()
    ours = logits_of(fused)
    count = len(products)
    products.clear()
    assert_close(ours, logits_of(plain))
    saved = sum(len(names) - 1 for names in fusion.groups)
    assert len(products) - count == saved


def test_loading_and_saving(directory: Path, tmp_path: Path, products: list[int]) -> None:
    plain = load(directory, quantization_config=LowbitConfig())
    fused = load(directory, quantization_config=LowbitConfig(fuse=True))
    assert len(fused.hf_quantizer.report.fusion.groups) == 2 * LAYERS
    products.clear()
    expected = logits_of(fused)
    assert len(products) == FUSED
    assert_close(expected, logits_of(plain))
    fused.save_pretrained(tmp_path / "fused")
    plain.save_pretrained(tmp_path / "plain")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("fused", "plain")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    for again in (load(tmp_path / "fused"), lowbit_rs.from_pretrained(tmp_path / "fused", dtype=torch.float32)):
        assert again.config.quantization_config.fuse is True
        products.clear()
        assert torch.equal(logits_of(again), expected)
        assert len(products) == FUSED
    Accelerator().save_model(fused, tmp_path / "accelerate")
    saved = load_file(tmp_path / "accelerate" / "model.safetensors")
    assert saved.keys() == plain.state_dict().keys()
    with pytest.raises(lowbit_rs.InvalidArgument, match="fuse"):
        LowbitConfig(fuse="yes")


def test_offload_of_accelerate(directory: Path, products: list[int]) -> None:
    """Weights come one layer at a time: what is not there cannot be multiplied with."""
    model = load(directory, quantization_config=LowbitConfig(fuse=True))
    expected = logits_of(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    products.clear()
    assert_close(logits_of(model), expected)
    assert len(products) == SEPARATE


def test_generation(directory: Path) -> None:
    prompt = inputs_of(make_model("llama"))["input_ids"]
    texts = []
    for fuse in (False, True):
        model = load(directory, quantization_config=LowbitConfig(fuse=fuse))
        texts.append(model.generate(prompt, max_new_tokens=8, do_sample=False))
    assert torch.equal(*texts)


@pytest.mark.parametrize("after", [False, True], ids=["fused-then-adapted", "adapted-then-fused"])
def test_adapters(directory: Path, after: bool, products: list[int]) -> None:
    """Adapters train beside fused layers, merge into them, and come out again."""
    torch.manual_seed(0)
    models: list[Any] = []
    for fuse in (not after, False):
        model = load(directory, quantization_config=LowbitConfig(fuse=fuse))
        torch.manual_seed(0)
        models.append(get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)))
    if after:
        assert len(fuse_model(models[0]).groups) == 2 * LAYERS
    fused, plain = models
    tokens = torch.randint(2, VOCABULARY, (2, 9))
    for model in models:
        model(input_ids=tokens, labels=tokens).loss.backward()
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None and theirs.grad is not None:
            assert torch.equal(ours.grad, theirs.grad)
    expected = logits_of(plain.eval())
    products.clear()
    assert_close(logits_of(fused.eval()), expected)
    assert len(products) == FUSED
    for change in ("merge_adapter", "unmerge_adapter"):
        for model in models:
            getattr(model, change)()
        products.clear()
        ours = logits_of(fused)
        assert len(products) == FUSED
        assert_close(ours, logits_of(plain))


def test_compiled_model_is_one_graph(directory: Path) -> None:
    model = load(directory, quantization_config=LowbitConfig(fuse=True))
    expected = logits_of(model)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(logits_of(compiled), expected)
    torch._dynamo.reset()
