"""One decode step of a language model of the shape of Llama-2-7B, random weights, in transformers: memory and time.

    python benches/python/gpu_decode_step.py [--layers 32] [--batches 1,16]

The model is made in bf16 on the CPU, layer by layer, and packed on its way to the GPU; peak memory is that of the GPU
while packing. A step has a static cache of 512 tokens; it is replayed as a CUDA graph, and called eagerly. Writes
benches/results/gpu_decode_step.json.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import lowbit_rs
from arguments import numbers, parse_for_gpu
from bitsandbytes_layers import MissingError, four_bit, replace_layers
from environment import save
from gpu_timing import eager_seconds, graph_seconds

_CACHE_LENGTH = 512


def main() -> None:
    """Measure, print a table, save."""
    arguments = _arguments()
    rows: list[dict[str, Any]] = []
    for name in arguments.settings:
        pack = _SETTINGS[name]
        try:
            rows += measure(name, pack, arguments)
        except MissingError as error:
            print(f"{name} is left out: {error}")
        gc.collect()
        torch.cuda.empty_cache()
    Console(markup=False, highlight=False).print(_table(rows))
    more = {"layers": arguments.layers, "cache_length": _CACHE_LENGTH, "device": torch.cuda.get_device_name()}
    more["dependent_launch"] = os.environ.get("LOWBIT_DEPENDENT_LAUNCH") == "1"
    print(f"wrote {save('gpu_decode_step', rows, **more)}")


def make_model(layers: int, device: str = "cpu") -> nn.Module:
    """Random weights in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(num_hidden_layers=layers, max_position_embeddings=4096)
    model: Any
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).to_empty(device=device)
    count = max(parameter.numel() for parameter in model.parameters())
    noise = torch.empty(count, dtype=torch.bfloat16, device=device)
    noise.uniform_(-0.02, 0.02)
    for parameter in model.parameters():
        parameter.data.copy_(noise[: parameter.numel()].view_as(parameter))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # its buffers are no parameters
    model.eval()
    return model  # type: ignore[no-any-return]


def measure(name: str, pack: Callable[[nn.Module], None], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each batch size."""
    model = make_model(arguments.layers)
    before = torch.cuda.memory_allocated()  # workspaces that libraries keep
    torch.cuda.reset_peak_memory_stats()
    pack(model)
    peak = torch.cuda.max_memory_allocated() - before
    model.to("cuda")
    memory = torch.cuda.memory_allocated() - before
    rows = []
    for batch in arguments.batches:
        step = decode_step(model, batch)
        with torch.inference_mode():
            graph, eager = graph_seconds([step]), eager_seconds(step, 50)
        rows.append(
            {
                "setting": name,
                "batch": batch,
                "memory_bytes": memory,
                "peak_while_packing_bytes": peak,
                "graph_s": graph,
                "eager_s": eager,
            }
        )
    return rows


def decode_step(model: Any, batch: int) -> Callable[[], object]:
    """The step of one more token for each sequence, at a fixed place of a static cache."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=_CACHE_LENGTH)
    tokens = torch.randint(0, 32000, (batch, 1), device="cuda")
    place = torch.tensor([_CACHE_LENGTH // 2], device="cuda")
    position = place.expand(batch, 1)

    def step() -> object:
        return model(
            input_ids=tokens, position_ids=position, cache_position=place, past_key_values=cache, use_cache=True
        ).logits

    return step


def lowbit(**options: Any) -> Callable[[nn.Module], None]:
    """Packs with lowbit_rs."""

    def pack(model: nn.Module) -> None:
        lowbit_rs.quantize_model(model, progress=False, device="cuda", **options)

    return pack


def bitsandbytes(model: nn.Module) -> None:
    """Packs in NF4 with bitsandbytes, all layers but the last, as transformers does."""
    replace_layers(model, lambda weight: four_bit(weight, "nf4", device="cuda"))


def nothing(_model: nn.Module) -> None:
    """Leaves the weights in bf16."""


_SETTINGS: dict[str, Callable[[nn.Module], None]] = {
    "bf16": nothing,
    "bitsandbytes nf4": bitsandbytes,
    "nf4": lowbit(),
    "nf4-dq": lowbit(double_quant=True),
    "nf4-dq, embeddings": lowbit(double_quant=True, embeddings=True, skip=()),
}


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="one decode step", title_justify="left", title_style="bold")
    for column in ("setting", "batch", "GB", "peak GB", "graph ms", "eager ms"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for row in rows:
        sizes = [f"{row[key] / 1e9:.2f}" for key in ("memory_bytes", "peak_while_packing_bytes")]
        times = [f"{row[key] * 1e3:.2f}" for key in ("graph_s", "eager_s")]
        table.add_row(row["setting"], str(row["batch"]), *sizes, *times)
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batches", type=numbers, default=[1, 16])
    parser.add_argument("--settings", type=lambda text: text.split(","), default=list(_SETTINGS))
    return parse_for_gpu(parser)


if __name__ == "__main__":
    main()
