"""Draws what benches/python/cpu_linear.py has measured: the time of a linear layer against the number of tokens.

    python benches/python/cpu_plot.py [--shape 4096x4096] [--out docs/cpu-linear]

Reads benches/results/cpu_linear.json; writes <out>-light.png and <out>-dark.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

from environment import RESULTS
from lowbit_rs.demo.plot import THEMES, Theme

mpl.use("agg")

from matplotlib import pyplot as plt

#: Rivals that are drawn, with their style; ours in the accent colour of the theme.
_RIVALS = {
    "torch fp32": (":", "o"),
    "torch bf16": ("--", "o"),
    "bitsandbytes nf4": ("-", "s"),
    "bitsandbytes int8": ("-.", "s"),
    "torch int4pack": ("-", "^"),
    "llama.cpp Q4_0": ("-.", "^"),
}
_OURS = {"nf4": ("-", "o"), "int8-row": ("-.", "o"), "int8-row, activation int8": (":", "o")}
_GREYS = ("#6e7781", "#8c959f", "#bc4c00", "#e16f24", "#8250df", "#a475f9")


def main() -> None:
    """Draw both themes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="4096x4096", help="N x K")
    parser.add_argument("--out", type=Path, default=Path("docs/cpu-linear"))
    arguments = parser.parse_args()
    results = json.loads((RESULTS / "cpu_linear.json").read_text(encoding="utf-8"))
    shape = [int(part) for part in arguments.shape.split("x")]
    rows = [row for row in results["rows"] if row["shape"] == shape]
    for name, theme in THEMES.items():
        path = arguments.out.with_name(f"{arguments.out.name}-{name}.png")
        draw(rows, theme, f"x @ W.T on {results['threads']} cores, W [{shape[0]}, {shape[1]}], in memory", path)
        print(f"wrote {path}")


def draw(rows: list[dict[str, Any]], theme: Theme, title: str, path: Path) -> None:
    """Time against tokens, both logarithmic, a line for each rival."""
    figure, axis = plt.subplots(figsize=(8, 4.6), facecolor=theme.background)
    colors = [*zip(_RIVALS.items(), _GREYS, strict=True), *((ours, theme.formats) for ours in _OURS.items())]
    for (rival, (line, marker)), color in colors:
        points = sorted((row["tokens"], row["median_s"] * 1e3) for row in rows if row["rival"] == rival)
        if not points:
            continue
        label = f"lowbit_rs {rival}" if rival in _OURS else rival
        axis.plot(*zip(*points, strict=True), line, marker=marker, markersize=4, color=color, label=label)
    tokens = sorted({row["tokens"] for row in rows})
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds")
    axis.set_xticks(tokens, [str(count) for count in tokens])
    axis.minorticks_off()
    axis.set_title(title, color=theme.ink, fontsize=10)
    axis.set_facecolor(theme.background)
    axis.grid(color=theme.grid, linewidth=0.6)
    axis.tick_params(colors=theme.muted, labelsize=8)
    axis.xaxis.label.set_color(theme.ink)
    axis.yaxis.label.set_color(theme.ink)
    for spine in axis.spines.values():
        spine.set_color(theme.grid)
    axis.legend(fontsize=7, labelcolor=theme.ink, facecolor=theme.background, edgecolor=theme.grid)
    figure.tight_layout()
    figure.savefig(path, dpi=130, facecolor=theme.background)
    plt.close(figure)


if __name__ == "__main__":
    main()
