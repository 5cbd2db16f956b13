"""Draws what benches/python/gpu_linear.py has measured: times of a product with few tokens, beside its rivals.

    python benches/python/gpu_plot.py [--out docs/gpu-linear]

Reads benches/results/gpu_linear.json; writes <out>-light.png and <out>-dark.png.
"""

from __future__ import annotations

from typing import Any

from matplotlib import pyplot as plt

from panels import Colors, draw_themes, dress, label

_RIVALS = {"torch bf16": "#8c8c8c", "bitsandbytes nf4": "#d98c3f", "tinygemm int4-64": "#6a9fd4", "nf4": "#2a9d6f"}
_TOKENS = (1, 8, 16)


def main() -> None:
    """Draw both themes."""
    draw_themes(__doc__, "gpu_linear", "docs/gpu-linear", draw)


def draw(results: dict[str, Any], colors: Colors) -> Any:
    """One panel for each number of tokens, a group of bars for each shape, a line where the memory's roof is."""
    cells = {(row["rival"], tuple(row["shape"]), row["tokens"]): row for row in results["rows"]}
    shapes = sorted({tuple(row["shape"]) for row in results["rows"]}, key=lambda shape: shape[0] * shape[1])
    tokens = [count for count in _TOKENS if any(key[2] == count for key in cells)]
    figure, axes = plt.subplots(1, len(tokens), figsize=(4.2 * len(tokens), 3.6), facecolor=colors[0], squeeze=False)
    for axis, count in zip(axes[0], tokens, strict=True):
        _draw_panel(axis, cells, shapes, count)
        dress(axis, f"{count} token{'s' if count > 1 else ''}", colors, 7)
    label(figure, axes[0][0], f"x @ W.T on an {results['device']}, W [N, K] in memory", "microseconds", colors)
    return figure


def _draw_panel(axis: Any, cells: dict[Any, Any], shapes: list[Any], tokens: int) -> None:
    width = 0.8 / len(_RIVALS)
    for index, (rival, color) in enumerate(_RIVALS.items()):
        for group, shape in enumerate(shapes):
            row = cells.get((rival, shape, tokens))
            if row is None:
                continue
            x, height = group + (index - 1.5) * width, row["graph_s"] * 1e6
            axis.bar(x, height, width, color=color, label=rival if group == 0 else None)
            if rival == "nf4":
                roof = row["roof"] * height
                axis.plot([x - width / 2, x + width / 2], [roof, roof], color="#d62828", linewidth=1.5)
    axis.set_yscale("log")
    axis.set_xticks(range(len(shapes)), [f"{n}\n{k}" for n, k in shapes])


if __name__ == "__main__":
    main()
