"""What fuse=True gives the demo's model on the CPU: tokens a second of decoding and of reading a prompt.

    python benches/python/fusion.py [--threads 2] [--rounds 10]

SmolLM2-135M, packed as nf4 in blocks of 64, float32 and bfloat16 activations. The model is called fused and as it is in
turns, and each figure is the best of its calls: what else the machine does only ever adds time. Writes
benches/results/fusion.json.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import lowbit_rs
from environment import save
from lowbit_rs.demo.model import load_model, model_file

#: Tokens that are read at once, and how many calls of each model make a round.
_CASES = {"decode": (1, 8), "prompt of 16": (16, 4), "prompt of 128": (128, 2), "prompt of 512": (512, 1)}
_CACHED = 128


def main() -> None:
    """Measure, print a table, save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rounds = arguments.rounds
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in measure(dtype, rounds)]
    table = Table(*("activations", "case", "separate, tokens/s", "fused, tokens/s", "ratio"))
    for row in rows:
        speeds = [row["tokens"] / row[f"{name}_s"] for name in ("separate", "fused")]
        table.add_row(row["dtype"], row["case"], *(f"{speed:.1f}" for speed in speeds), f"{speeds[1] / speeds[0]:.3f}")
    Console(markup=False, highlight=False).print(table)
    print(f"wrote {save('fusion', rows, rounds=rounds, threads=torch.get_num_threads(), cached_tokens=_CACHED)}")


@torch.no_grad()
def measure(dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """A row for each case."""
    separate: Any = load_model(model_file()).to(dtype)
    lowbit_rs.quantize_model(separate, progress=False)
    fused = copy.deepcopy(separate)
    groups = len(lowbit_rs.fuse_model(fused).groups)
    rows = []
    for case, (tokens, calls) in _CASES.items():
        steps = {name: step(model, tokens) for name, model in (("separate", separate), ("fused", fused))}
        best = dict.fromkeys(steps, float("inf"))
        for _ in range(rounds * calls):
            for name, run in steps.items():
                start = time.perf_counter()
                run()
                best[name] = min(best[name], time.perf_counter() - start)
        times = {f"{name}_s": best[name] for name in steps}
        rows.append(
            {"dtype": str(dtype).removeprefix("torch."), "case": case, "tokens": tokens, "groups": groups} | times
        )
    return rows


def step(model: Any, tokens: int) -> Callable[[], object]:
    """The call that reads ``tokens`` tokens; a single one after those of a cache."""
    ids = torch.randint(0, model.config.vocab_size, (1, _CACHED + 1))
    if tokens > 1:
        prompt = torch.randint(0, model.config.vocab_size, (1, tokens))
        return lambda: model(input_ids=prompt, use_cache=False, logits_to_keep=1)
    cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values

    def one_more() -> object:
        out = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return out

    return one_more


if __name__ == "__main__":
    main()
