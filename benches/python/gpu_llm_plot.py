"""Draws what benches/python/gpu_llm.py has measured: tokens a second of a 7B-shape model.

    python benches/python/gpu_llm_plot.py [--out docs/gpu-llm]

Reads benches/results/gpu_llm.json; writes <out>-light.png and <out>-dark.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

from environment import RESULTS

mpl.use("agg")

from matplotlib import pyplot as plt

_COLORS = {
    "bf16": "#8c8c8c",
    "bitsandbytes nf4": "#d98c3f",
    "nf4": "#2a9d6f",
    "nf4 fused": "#1b6e8c",
    "nf4-dq": "#8a6fb8",
}
_PANELS = {"decode": "decoding, CUDA graph", "prompt": "prompt, eager"}
_THEMES = {"light": ("white", "#222222"), "dark": ("#0d1117", "#e6e6e6")}


def main() -> None:
    """Draw both themes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/gpu-llm"))
    arguments = parser.parse_args()
    results = json.loads((RESULTS / "gpu_llm.json").read_text(encoding="utf-8"))
    for theme, colors in _THEMES.items():
        path = arguments.out.with_name(f"{arguments.out.name}-{theme}.png")
        draw(results, colors, path)
        print(f"wrote {path}")


def draw(results: dict[str, Any], colors: tuple[str, str], path: Path) -> None:
    """A panel for decoding and one for prompts: a group of bars for each number of tokens."""
    background, ink = colors
    figure, axes = plt.subplots(1, len(_PANELS), figsize=(10, 3.6), facecolor=background)
    for axis, (kind, title) in zip(axes, _PANELS.items(), strict=True):
        _draw_panel(axis, [row for row in results["rows"] if row["kind"] == kind])
        axis.set_title(title, color=ink, fontsize=10)
        axis.set_facecolor(background)
        axis.tick_params(colors=ink, labelsize=8)
        for spine in axis.spines.values():
            spine.set_color(ink)
    axes[0].set_xlabel("sequences", color=ink, fontsize=9)
    axes[1].set_xlabel("tokens of the prompt", color=ink, fontsize=9)
    axes[0].set_ylabel("tokens / s", color=ink, fontsize=9)
    axes[0].legend(fontsize=7, labelcolor=ink, facecolor=background, edgecolor=ink)
    title = f"Llama-2-7B's shape, random weights, transformers, {results['device']}"
    figure.suptitle(title, color=ink, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150, facecolor=background)
    plt.close(figure)


def _draw_panel(axis: Any, rows: list[dict[str, Any]]) -> None:
    groups = sorted({row["tokens"] for row in rows})
    settings = [name for name in _COLORS if any(row["setting"] == name for row in rows)]
    width = 0.8 / max(len(settings), 1)
    for index, name in enumerate(settings):
        own = {
            row["tokens"]: row["tokens"] / row.get("graph_s", row["eager_s"]) for row in rows if row["setting"] == name
        }
        places = [groups.index(tokens) + (index - (len(settings) - 1) / 2) * width for tokens in own]
        axis.bar(places, list(own.values()), width, color=_COLORS[name], label=name)
    axis.set_xticks(range(len(groups)), [str(tokens) for tokens in groups])


if __name__ == "__main__":
    main()
