"""Pictures of several panels side by side, in the two themes of the documentation."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

from environment import RESULTS

mpl.use("agg")

from matplotlib import pyplot as plt

#: Background and ink.
Colors = tuple[str, str]
_THEMES: dict[str, Colors] = {"light": ("white", "#222222"), "dark": ("#0d1117", "#e6e6e6")}


def draw_themes(doc: str | None, name: str, out: str, draw: Callable[[dict[str, Any], Colors], Any]) -> None:
    """Draws the results ``name`` in both themes; ``draw`` makes a figure. ``--out`` takes the place of ``out``."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(out))
    arguments = parser.parse_args()
    results = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    for theme, colors in _THEMES.items():
        path = arguments.out.with_name(f"{arguments.out.name}-{theme}.png")
        figure = draw(results, colors)
        figure.tight_layout()
        figure.savefig(path, dpi=150, facecolor=colors[0])
        plt.close(figure)
        print(f"wrote {path}")


def dress(axis: Any, title: str, colors: Colors, label_size: int) -> None:
    """Gives a panel its title and colours."""
    background, ink = colors
    axis.set_title(title, color=ink, fontsize=10)
    axis.set_facecolor(background)
    axis.tick_params(colors=ink, labelsize=label_size)
    for spine in axis.spines.values():
        spine.set_color(ink)


def label(figure: Any, axis: Any, title: str, y: str, colors: Colors) -> None:
    """The title of a figure, and what its first panel says for all: the vertical axis and the legend."""
    background, ink = colors
    axis.set_ylabel(y, color=ink, fontsize=9)
    axis.legend(fontsize=7, labelcolor=ink, facecolor=background, edgecolor=ink)
    figure.suptitle(title, color=ink, fontsize=10)
