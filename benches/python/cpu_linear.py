"""Linear layers on the CPU side by side: torch, bitsandbytes, lowbit_rs; one process, one run, weights out of caches.

    python benches/python/cpu_linear.py [--shapes 4096x4096] [--tokens 1,16] [--rivals "torch bf16;nf4"] [--quick]
    python benches/python/cpu_linear.py --threads 1 --name cpu_linear_1_thread
    python benches/python/cpu_linear.py --isa avx2 --name cpu_linear_avx2

Each call takes another copy of the weight, and the copies together exceed the last-level cache, as the layers of a
large model do. Rivals take turns in rounds, so that a slow moment of the machine meets all of them; the median over
all rounds is shown, with its ratio to torch bf16. `error` is the relative error of the result against float64.
Writes benches/results/<name>.json, with the read bandwidth of memory measured in the same run.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from arguments import numbers, shapes
from bitsandbytes_layers import MissingError
from environment import save
from llama_layers import LlamaLinear
from lowbit_rs import _native
from lowbit_rs.demo.machine import last_level_cache
from rivals import RIVALS, Rival

BASELINE = "torch bf16"
_SHAPES = "4096x4096,14336x4096,4096x14336,576x1536,1000x1111"
_TOKENS = "1,4,16,64,512"
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_WARM_UP = 3
_ROUNDS = 3
#: Between two uses of a copy of a weight at least this many bytes are read, and this many times the last-level cache.
_TOUCHED, _BEYOND_CACHE = 600 << 20, 1.25


def main() -> None:
    """Measure, print a table for each shape, save."""
    arguments = _arguments()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 160)
    bandwidth = read_bandwidth()
    if arguments.isa is not None:
        _native.force_isa(arguments.isa)
    threads, isa = torch.get_num_threads(), _native.isa()
    console.print(f"{threads} threads, {isa}, {bandwidth / 1e9:.1f} GB/s read from memory")
    more = {"read_bandwidth_bytes_per_second": bandwidth, "threads": threads, "isa": isa}
    rows: list[dict[str, Any]] = []
    for shape in arguments.shapes:
        measured = measure_shape(shape, arguments, console)
        rows += measured
        console.print(_table(measured, f"{shape[0]} x {shape[1]}: milliseconds, and times as fast as {BASELINE}"))
        console.print(f"wrote {save(arguments.name, rows, **more)}")


@torch.inference_mode()
def measure_shape(shape: tuple[int, int], arguments: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """A row for each rival and number of tokens, for a weight [N, K]."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / math.sqrt(shape[1])
    layers: dict[Rival, nn.Module] = {}
    for rival in arguments.rivals:
        layer = _make(rival, weight.to(rival.dtype or arguments.dtype), console)
        if layer is not None:
            layers[rival] = layer
    inputs = {tokens: torch.randn(tokens, shape[1]) for tokens in arguments.tokens}
    rows = {
        (rival, tokens): _describe(rival, layer, weight, x.to(rival.dtype or arguments.dtype))
        for rival, layer in layers.items()
        for tokens, x in inputs.items()
    }
    rounds = 1 if arguments.quick else arguments.rounds
    samples: dict[tuple[Rival, int], list[float]] = {key: [] for key in rows}
    for _ in range(rounds):
        for rival, layer in layers.items():
            copies = _copies(layer, rows[rival, arguments.tokens[0]]["weight_bytes"])
            for tokens, x in inputs.items():
                argument = x.to(rival.dtype or arguments.dtype)
                samples[rival, tokens] += _seconds(copies, argument, math.ceil(arguments.repeats / rounds))
    return [{**rows[key], **_statistics(values)} for key, values in samples.items()]


def _make(rival: Rival, weight: Tensor, console: Console) -> nn.Module | None:
    try:
        layer = rival.make(weight)
        layer(torch.zeros(1, weight.shape[1], dtype=weight.dtype))
        return layer
    except MissingError as error:
        console.print(f"{rival.name} is left out: {error}")
        return None
    except (AssertionError, RuntimeError, ValueError) as error:  # shapes that a rival does not take
        console.print(f"{rival.name} fails for {list(weight.shape)}: {error}")
        return None


def read_bandwidth() -> float:
    """Bytes a second of memory that all threads together read: the best of some sums over a tensor beyond the cache."""
    numbers = torch.ones(2 * _bytes_to_touch() // 4)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - start)
    return numbers.nbytes / min(seconds)


def _bytes_to_touch() -> int:
    """What must be read between two uses of a weight for it to be gone from the caches."""
    return max(_TOUCHED, round(_BEYOND_CACHE * (last_level_cache() or 0)))


def _copies(layer: nn.Module, weight_bytes: int) -> list[nn.Module]:
    return [copy.deepcopy(layer) for _ in range(2 + _bytes_to_touch() // weight_bytes)]


def _seconds(copies: Sequence[nn.Module], x: Tensor, repeats: int) -> list[float]:
    """Times of ``repeats`` calls, each of the copy that has rested longest."""
    layers = cycle(copies)
    for layer in copies if isinstance(copies[0], LlamaLinear) else islice(layers, _WARM_UP):
        layer(x)  # one of llama.cpp sets itself up for a number of tokens
    seconds = []
    for layer in islice(layers, repeats):
        start = time.perf_counter()
        layer(x)
        seconds.append(time.perf_counter() - start)
    return seconds


def _describe(rival: Rival, layer: nn.Module, weight: Tensor, x: Tensor) -> dict[str, Any]:
    """What a row says beside times; calls the layer once, after which it has taken its path."""
    exact = nn.functional.linear(x.double(), weight.double())
    y = layer(x).double()
    error = (y - exact).norm() / exact.norm() if rival.is_linear else None
    return {
        "rival": rival.name,
        "shape": list(weight.shape),
        "tokens": x.shape[0],
        "dtype": str(x.dtype).removeprefix("torch."),
        "path": rival.path(layer),
        "weight_bytes": rival.weight_bytes(layer),
        "error": None if error is None else error.item(),
    }


def _statistics(seconds: Sequence[float]) -> dict[str, float | int]:
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "samples": len(seconds)}


def _table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """A line for each rival, two columns for each number of tokens."""
    tokens = sorted({row["tokens"] for row in rows})
    median = {(row["rival"], row["tokens"]): row["median_s"] for row in rows}
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("rival")
    table.add_column("MB", justify="right")
    table.add_column("error", justify="right")
    for count in tokens:
        table.add_column(f"M = {count}", justify="right")
        table.add_column("", justify="right")
    for row in {row["rival"]: row for row in rows}.values():
        name = row["rival"]
        cells = [name + (f": {row['path']}" if row["path"] else ""), f"{row['weight_bytes'] / 1e6:.1f}"]
        cells.append("" if row["error"] is None else f"{row['error']:.4f}")
        for count in tokens:
            seconds, baseline = median[name, count], median.get((BASELINE, count))
            cells += [f"{seconds * 1e3:.3f}", "" if baseline is None else f"{baseline / seconds:.2f} x"]
        table.add_row(*cells)
    return table


def _arguments() -> argparse.Namespace:
    names = "; ".join(rival.name for rival in RIVALS)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", type=shapes, default=shapes(_SHAPES), help=f"N x K; by default {_SHAPES}")
    parser.add_argument("--tokens", type=numbers, default=numbers(_TOKENS), help=f"M; by default {_TOKENS}")
    parser.add_argument(
        "--rivals", type=_rivals, default=list(RIVALS), help=f"apart by semicolons; by default all: {names}"
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16", help="of activations, where a rival has no own")
    parser.add_argument("--repeats", type=int, default=30, help="calls for each figure")
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help="in which rivals take turns")
    parser.add_argument("--threads", type=int, help="by default as many as torch uses")
    parser.add_argument("--isa", help="instruction set that lowbit_rs is held to")
    parser.add_argument("--name", default="cpu_linear", help="of the file with the results")
    parser.add_argument("--quick", action="store_true", help="10 calls in one round, first shape only")
    arguments = parser.parse_args()
    arguments.dtype = _DTYPES[arguments.dtype]
    if arguments.quick:
        arguments.repeats, arguments.shapes = 10, arguments.shapes[:1]
    return arguments


def _rivals(text: str) -> list[Rival]:
    known = {rival.name: rival for rival in RIVALS}
    return [known[name.strip()] for name in text.split(";")]


if __name__ == "__main__":
    main()
