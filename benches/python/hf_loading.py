"""Memory while transformers loads a sharded model and packs it. Writes benches/results/hf_loading.json.

    python benches/python/hf_loading.py [--layers N]

The model is a Llama of random bfloat16 weights with layers of the width of Llama 3.2 1B, in shards of 200 MB. Each case
loads it in a process of its own, which reports the memory before loading, after it, and the highest in between, sampled
every millisecond: VmRSS of /proc/self/status less RssFile, since pages of files that are mapped, as those of tensors
that are taken as they are, can be dropped at any time. What loading needs at best is the final model and the largest
tensor of the checkpoint beside it; embeddings and norms stay mapped here and count nothing. bitsandbytes is measured
the same way where it is installed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from environment import save

CASES: dict[str, str] = {
    "bfloat16": "None",
    "lowbit_rs nf4, double quantization": 'LowbitConfig(format="nf4", double_quant=True)',
    "lowbit_rs int8": 'LowbitConfig(format="int8", block_size="row")',
    "lowbit_rs nf4, saved packed": "None",
    "bitsandbytes nf4, double quantization": (
        'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)'
    ),
}

CHILD = """
import gc, json, sys, threading, time
import torch, transformers
import lowbit_rs
from lowbit_rs import LowbitConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
import accelerate
import transformers.models.llama.modeling_llama

transformers.utils.logging.disable_progress_bar()

def anonymous():
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return 1024 * (int(fields["VmRSS"].split()[0]) - int(fields["RssFile"].split()[0]))

config = eval(sys.argv[2])
options = {} if config is None else {"quantization_config": config}  # None itself would mean not to be packed
gc.collect()
before, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, **options)
seconds = time.perf_counter() - start
done = True
thread.join()
grown = anonymous() - before
if sys.argv[3]:
    model.save_pretrained(sys.argv[3])
print(json.dumps({
    "seconds": seconds,
    "footprint_bytes": model.get_memory_footprint(),
    "packed_bytes": sum(p.nbytes for p in model.parameters() if not p.is_floating_point())
    + sum(p.nbytes for name, p in model.named_parameters() if "_scale" in name and p.is_floating_point()),
    "grown_bytes": grown,
    "peak_bytes": peak - before,
}))
"""


def write_model(path: Path, layers: int) -> int:
    """Writes the float model; gives the bytes of its largest tensor."""
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    model.save_pretrained(path, max_shard_size="200MB")
    return max(int(parameter.nbytes) for parameter in model.parameters())


def load(path: Path, config: str, save_to: Path | None = None) -> dict[str, Any]:
    """One load in a process of its own."""
    command = [sys.executable, "-c", CHILD, str(path), config, str(save_to or "")]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def main() -> None:
    """Measures all cases, prints them and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    layers = parser.parse_args().layers
    rows = []
    with tempfile.TemporaryDirectory(prefix="hf-loading-") as directory:
        source, packed = Path(directory) / "float", Path(directory) / "packed"
        largest = write_model(source, layers)
        for name, config in CASES.items():
            if name.startswith("bitsandbytes") and find_spec("bitsandbytes") is None:
                continue
            path = packed if name.endswith("packed") else source
            result = load(path, config, packed if "double" in name and "lowbit" in name else None)
            over = result["peak_bytes"] - result["grown_bytes"]
            rows.append({"case": name, **result, "peak_over_final_bytes": over, "largest_tensor_bytes": largest})
            print(
                f"{name:40} {result['seconds']:6.1f} s  model {result['footprint_bytes'] / 1e6:7.1f} MB  "
                f"packed {result['packed_bytes'] / 1e6:7.1f}  grown {result['grown_bytes'] / 1e6:7.1f}  "
                f"peak {result['peak_bytes'] / 1e6:7.1f}, {over / 1e6:6.1f} over it "
                f"(largest tensor {largest / 1e6:.1f})"
            )
    print(save("hf_loading", rows, layers=layers, shard_megabytes=200, threads=torch.get_num_threads()))


if __name__ == "__main__":
    main()
