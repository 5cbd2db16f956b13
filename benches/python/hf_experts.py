"""The share of a mixture's parameters that is packed. Writes benches/results/hf_experts.json.

    python benches/python/hf_experts.py

Models of the published sizes are built on the meta device, without weights, and go through what transformers does to
them before it loads any: the quantizer of lowbit_rs, and that of bitsandbytes where it is installed. Counted are the
elements of float parameters that will be packed, of all that the model has.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from environment import save
from lowbit_rs import LowbitConfig
from lowbit_rs.integrations.transformers import LowbitQuantizer

MODELS: dict[str, PreTrainedConfig] = {
    "Mixtral 8x7B": MixtralConfig(),
    "Qwen3 30B-A3B": Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        num_experts=128,
        num_experts_per_tok=8,
        head_dim=128,  # type: ignore[call-arg]  # of the published model; the class declares it elsewhere
    ),
    "gpt-oss 20B": GptOssConfig(num_hidden_layers=24, num_local_experts=32),
    "Llama 3 8B, no mixture": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
}


def empty_model(config: PreTrainedConfig) -> Any:
    """The model without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def packed_by_lowbit(model: Any) -> tuple[int, int]:
    """Parameters that are packed, and the bytes of the whole model then."""
    quantizer = LowbitQuantizer(LowbitConfig(double_quant=True), pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map=None)
    packed = sum(torch.Size(row.shape).numel() for row in quantizer.report.rows)
    sizes = (
        parameter.numel() * quantizer.param_element_size(model, name, parameter)
        for name, parameter in model.named_parameters()
    )
    return packed, round(sum(sizes))


def packed_by_bitsandbytes(model: Any) -> tuple[int, int]:
    """The same for bitsandbytes; a packed element counts half a byte and its double-quantized scale 0.127 bits."""
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    quantizer: Any = Bnb4BitHfQuantizer(config, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map=None)
    packed = rest = 0
    for name, parameter in model.named_parameters():
        if quantizer.param_needs_quantization(model, name):
            packed += parameter.numel()
        else:
            rest += parameter.nbytes
    return packed, rest + round(packed * (4 + 0.127) / 8)


def main() -> None:
    """Counts all models, prints them and writes the results."""
    methods = {"lowbit_rs": packed_by_lowbit}
    if find_spec("bitsandbytes") is not None:
        methods["bitsandbytes"] = packed_by_bitsandbytes
    rows = []
    for name, config in MODELS.items():
        for method, count in methods.items():
            model = empty_model(config)
            total = sum(parameter.numel() for parameter in model.parameters())
            packed, nbytes = count(model)
            rows.append(
                {
                    "model": name,
                    "method": method,
                    "parameters": total,
                    "packed": packed,
                    "share": packed / total,
                    "bytes_bfloat16": 2 * total,
                    "bytes": nbytes,
                }
            )
            print(
                f"{name:24} {method:14} {100 * packed / total:6.2f} % of {total / 1e9:6.2f} G packed, "
                f"{nbytes / 1e9:6.2f} GB"
            )
    print(save("hf_experts", rows))


if __name__ == "__main__":
    main()
