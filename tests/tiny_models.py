"""Models of transformers with random weights and few of them, for tests of what happens to a whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY, WIDTH, LAYERS = 96, 64, 2

_IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **_IDS,
}

ARCHITECTURES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": lambda **changes: LlamaForCausalLM(LlamaConfig(**_LLAMA | changes)),
    "gpt2": lambda **changes: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=128, **_IDS | changes)
    ),
    "opt": lambda **changes: OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            ffn_dim=128,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=WIDTH,
            **_IDS | changes,
        )
    ),
    "bloom": lambda **changes: BloomForCausalLM(
        BloomConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=LAYERS, n_head=4, **_IDS | changes)
    ),
    "t5": lambda **changes: T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            d_kv=16,
            d_ff=128,
            num_layers=LAYERS,
            num_heads=4,
            **_IDS | {"decoder_start_token_id": 0} | changes,
        )
    ),
    "bert": lambda **changes: BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=128,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=128,
            **_IDS | changes,
        )
    ),
    "mixtral": lambda **changes: MixtralForCausalLM(MixtralConfig(**_LLAMA | {"num_local_experts": 4} | changes)),
    "qwen3_moe": lambda **changes: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **_LLAMA
            | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
            | changes
        )
    ),
}
"""A model of each architecture, by its ``model_type``; keywords change its config."""


def make_model(architecture: str, **changes: Any) -> PreTrainedModel:
    """A model with weights of a seed that is the same on every call, in evaluation mode."""
    torch.manual_seed(0)
    model: PreTrainedModel = ARCHITECTURES[architecture](**changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Larger than they are initialized, so that the model's outputs depend on every layer.
            if parameter.dim() > 1:
                parameter.mul_(4.0)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.eval()
    return model


def inputs_of(model: PreTrainedModel, tokens: int = 9) -> dict[str, torch.Tensor]:
    """What the model takes."""
    torch.manual_seed(1)
    inputs = {"input_ids": torch.randint(2, VOCABULARY, (2, tokens))}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(2, VOCABULARY, (2, 5))
    return inputs


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    """The logits of ``inputs_of`` the model."""
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs_of(model)).logits
    return logits


def load(path: Path | str, **keywords: Any) -> Any:
    """``from_pretrained`` of the class that the saved config names, in float32 unless told otherwise."""
    config = transformers.AutoConfig.from_pretrained(path)
    kind = getattr(transformers, config.architectures[0])
    return kind.from_pretrained(path, **{"dtype": torch.float32, **keywords}).eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words w0 to w95."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer = Tokenizer(WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w0", bos_token="w1")
