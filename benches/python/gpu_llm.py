"""A language model of the shape of Llama-2-7B, random weights, in transformers: tokens a second, and memory.

    python benches/python/gpu_llm.py [--layers 32] [--batches 1,16,64] [--prompts 512,2048,8192]
    python benches/python/gpu_llm.py --settings "bf16,bitsandbytes int8,int8,int8 fused" --output gpu_llm_int8

Decoding is a step with a static cache of 512 tokens, called eagerly and replayed as a CUDA graph (gpu_decode_step.py);
a prompt is read eagerly, one sequence, with a cache made on the way and logits of the last token. In each setting all
linear layers but the head are packed. 8-bit settings round activations with a threshold of 6, and 0.5 % of the columns
that norms give have outliers. Settings are measured one after another in one process. Writes
benches/results/gpu_llm.json, which gpu_llm_plot.py draws, or another of this folder.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from arguments import numbers, parse_for_gpu
from bitsandbytes_layers import MissingError, eight_bit, replace_layers
from environment import save
from gpu_decode_step import bitsandbytes, decode_step, lowbit, make_model, nothing
from gpu_timing import graph_seconds

#: Eager calls that are timed, of a step and of a prompt.
_STEPS, _PROMPTS = 20, 3

_INT8: dict[str, Any] = {"format": "int8", "block_size": "row", "activation": "auto", "threshold": 6.0}
#: A column in so many has outliers, this many times the others.
_OUTLIER_STEP, _OUTLIER = 200, 20.0


def _bitsandbytes_int8(model: nn.Module) -> None:
    replace_layers(model, lambda weight: eight_bit(weight, 6.0, device="cuda"))


_SETTINGS: dict[str, Callable[[nn.Module], None]] = {
    "bf16": nothing,
    "bitsandbytes nf4": bitsandbytes,
    "nf4": lowbit(),
    "nf4 fused": lowbit(fuse=True),
    "nf4-dq": lowbit(double_quant=True),
    "bitsandbytes int8": _bitsandbytes_int8,
    "int8": lowbit(**_INT8),
    "int8 fused": lowbit(**_INT8, fuse=True, fuse_norms=True),
}
#: Those that wait for the GPU, so that they cannot be captured.
_WAITING = ("bitsandbytes int8",)
#: Those that are measured unless others are asked for.
_DEFAULT = [name for name in _SETTINGS if "int8" not in name]


def main() -> None:
    """Measure, print a table, save."""
    arguments = _arguments()
    rows: list[dict[str, Any]] = []
    for name in arguments.settings:
        try:
            rows += measure(name, arguments)
            print(name, "done", flush=True)
        except MissingError as error:
            print(f"{name} is left out: {error}")
        gc.collect()
        torch.cuda.empty_cache()
    Console(markup=False, highlight=False, width=100).print(_table(rows))
    more = {"layers": arguments.layers, "device": torch.cuda.get_device_name(), "weights": "random"}
    print(f"wrote {save(arguments.output, rows, **more)}")


@torch.no_grad()
def measure(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each batch of decoding and each length of a prompt."""
    before = torch.cuda.memory_allocated()  # workspaces that libraries keep
    model = make_model(arguments.layers, "cuda")
    plant_outliers(model)
    _SETTINGS[name](model)
    gc.collect()
    same = {"setting": name, "memory_bytes": torch.cuda.memory_allocated() - before}
    rows = []
    for batch in arguments.batches:
        step = decode_step(model, batch)
        times = {} if name in _WAITING else {"graph_s": graph_seconds([step])}
        times["eager_s"] = seconds_of(step, _STEPS)
        rows.append({**same, "kind": "decode", "tokens": batch, **times})
    for tokens in arguments.prompts:
        read = prompt(model, tokens)
        torch.cuda.reset_peak_memory_stats()
        seconds = seconds_of(read, _PROMPTS)
        peak = torch.cuda.max_memory_allocated() - before
        rows.append({**same, "kind": "prompt", "tokens": tokens, "eager_s": seconds, "peak_bytes": peak})
    return rows


def plant_outliers(model: nn.Module) -> None:
    """Makes norms give numbers of about 1, and of about ``_OUTLIER`` in some columns."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
            parameter[::_OUTLIER_STEP] = _OUTLIER


def prompt(model: Any, tokens: int) -> Callable[[], object]:
    """The call that reads a prompt of so many tokens."""
    ids = torch.randint(0, 32000, (1, tokens), device="cuda")
    return lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1).logits


def seconds_of(call: Callable[[], object], calls: int) -> float:
    """The mean time of some calls in a row, after two that are not timed."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Llama-2-7B's shape", title_justify="left", title_style="bold")
    for column in ("setting", "GB", "kind", "tokens", "graph ms", "eager ms", "tokens/s"):
        table.add_column(column, justify="left" if column in ("setting", "kind") else "right")
    for row in rows:
        best = min(row.get("graph_s", row["eager_s"]), row["eager_s"])
        graph = f"{row['graph_s'] * 1e3:.2f}" if "graph_s" in row else ""
        figures = graph, f"{row['eager_s'] * 1e3:.2f}", f"{row['tokens'] / best:.0f}"
        table.add_row(row["setting"], f"{row['memory_bytes'] / 1e9:.2f}", row["kind"], str(row["tokens"]), *figures)
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batches", type=numbers, default=[1, 16, 64])
    parser.add_argument("--prompts", type=numbers, default=[512, 2048, 8192])
    parser.add_argument("--settings", type=lambda text: text.split(","), default=_DEFAULT)
    parser.add_argument("--output", default="gpu_llm", help="name in benches/results")
    return parse_for_gpu(parser)


if __name__ == "__main__":
    main()
