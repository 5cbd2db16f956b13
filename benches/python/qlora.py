"""LoRA on a packed language model: the loss as it trains, and what merging changes. Writes benches/results/qlora.json.

    python benches/python/qlora.py [--steps N]

SmolLM2-135M-Instruct is packed to NF4 with double quantization. Adapters of rank 8 on every packed layer are trained
with AdamW on the text that the demo scores models with, a window of 128 tokens a step. Four windows, one in ten, are
not trained on: the perplexity on these is what counts. At last the adapters are merged into the packed weights. The
picture is docs/qlora.svg.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor

import lowbit_rs
from environment import REPOSITORY, save
from lowbit_rs.demo.evaluate import score
from lowbit_rs.demo.model import load_model, load_tokenizer, model_file, token_ids

WINDOW, ONE_IN, HELD_OUT = 128, 10, 4
PICTURE = REPOSITORY / "docs" / "qlora.svg"


def windows() -> tuple[Tensor, Tensor]:
    """Token windows [n, WINDOW] to train on, and those held out."""
    text = (Path(lowbit_rs.__file__).parent / "demo" / "python_documentation.txt").read_text(encoding="utf-8")
    tokens = token_ids(load_tokenizer(model_file()), text)
    rows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    held_out = torch.arange(len(rows)) % ONE_IN == ONE_IN - 1
    return rows[~held_out], rows[held_out][:HELD_OUT]


def perplexity(model: Any, rows: Tensor) -> float:
    """That of all windows together."""
    model.eval()
    value = score(model, rows.reshape(-1), WINDOW).perplexity
    model.train()
    return value


def plot(losses: list[float], marks: list[dict[str, float]]) -> None:
    """The training loss and that of the windows held out, as an SVG."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    axes.plot(range(1, len(losses) + 1), losses, color="#9aa5b1", linewidth=1, label="window of the step")
    steps = [mark["step"] for mark in marks]
    held_out = [math.log(mark["perplexity"]) for mark in marks]
    axes.plot(steps, held_out, color="#c0392b", linewidth=2, marker="o", label="windows held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss a token")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})


def train(steps: int) -> dict[str, Any]:
    """Trains, merges and measures."""
    rows, held_out = windows()
    model: Any = load_model(model_file())
    before = perplexity(model, held_out)
    lowbit_rs.quantize_model(model, "nf4", 64, double_quant=True, progress=False)
    torch.manual_seed(0)
    prepare: Any = prepare_model_for_kbit_training
    model = get_peft_model(prepare(model), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    marks = [{"step": 0, "perplexity": perplexity(model, held_out)}]
    losses = []
    for step in range(1, steps + 1):
        row = rows[(step - 1) % len(rows)][None]
        loss = model(input_ids=row, labels=row).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step % (steps // 5) == 0:
            marks.append({"step": step, "perplexity": perplexity(model, held_out)})
            print(f"step {step:4}  loss {losses[-1]:.3f}  held out: perplexity {marks[-1]['perplexity']:.2f}")
    merged = model.merge_and_unload()
    result = {
        "losses": losses,
        "held_out": marks,
        "perplexity_float": before,
        "perplexity_packed": marks[0]["perplexity"],
        "perplexity_with_adapter": marks[-1]["perplexity"],
        "perplexity_merged": perplexity(merged, held_out),
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "windows": len(rows),
        "windows_held_out": len(held_out),
    }
    plot(losses, marks)
    return result


def main() -> None:
    """Runs it, prints the result and writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    result = train(steps)
    for name in ("float", "packed", "with_adapter", "merged"):
        print(f"perplexity {name:13} {result[f'perplexity_{name}']:.2f}")
    print(save("qlora", [result], steps=steps, threads=torch.get_num_threads()))


if __name__ == "__main__":
    main()
