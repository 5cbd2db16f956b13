"""Draws what benches/python/gpu_llm.py has measured: tokens a second of a 7B-shape model.

    python benches/python/gpu_llm_plot.py [--out docs/gpu-llm]

Reads benches/results/gpu_llm.json; writes <out>-light.png and <out>-dark.png.
"""

from __future__ import annotations

from typing import Any

from matplotlib import pyplot as plt

from panels import Colors, draw_themes, dress, label

_COLORS = {
    "bf16": "#8c8c8c",
    "bitsandbytes nf4": "#d98c3f",
    "nf4": "#2a9d6f",
    "nf4 fused": "#1b6e8c",
    "nf4-dq": "#8a6fb8",
}
_PANELS = {"decode": "decoding, CUDA graph", "prompt": "prompt, eager"}


def main() -> None:
    """Draw both themes."""
    draw_themes(__doc__, "gpu_llm", "docs/gpu-llm", draw)


def draw(results: dict[str, Any], colors: Colors) -> Any:
    """A panel for decoding and one for prompts: a group of bars for each number of tokens."""
    background, ink = colors
    figure, axes = plt.subplots(1, len(_PANELS), figsize=(10, 3.6), facecolor=background)
    for axis, (kind, title) in zip(axes, _PANELS.items(), strict=True):
        _draw_panel(axis, [row for row in results["rows"] if row["kind"] == kind])
        dress(axis, title, colors, 8)
    axes[0].set_xlabel("sequences", color=ink, fontsize=9)
    axes[1].set_xlabel("tokens of the prompt", color=ink, fontsize=9)
    label(
        figure, axes[0], f"Llama-2-7B's shape, random weights, transformers, {results['device']}", "tokens / s", colors
    )
    return figure


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
