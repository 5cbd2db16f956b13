"""The picture of the demo: perplexity against size, one for light and one for dark pages."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING

from lowbit_rs.demo.report import notes
from lowbit_rs.files.output import atomic_file

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

    from lowbit_rs.demo.report import Row

#: What points to the footnotes, and their width in characters.
_MARK, _FOOTNOTE_COLUMNS = "*", 150

#: Offset from a point in typographic points, then the alignment of the text there, horizontal and vertical.
Place = tuple[tuple[int, int], str, str]


@dataclass(frozen=True)
class Theme:
    """Colours of one picture."""

    background: str
    ink: str
    muted: str
    grid: str
    formats: str
    original: str


THEMES = {
    "light": Theme("#ffffff", "#1f2328", "#59636e", "#d8dee4", "#0969da", "#bc4c00"),
    "dark": Theme("#0d1117", "#f0f6fc", "#9198a1", "#2a313c", "#58a6ff", "#f0883e"),
}

#: Formats of up to this many bits a weight stand in the left panel: on one scale with the others they would coincide.
_SMALL_BITS = 6.5

#: Where a label may stand, the best places first.
_LABEL_PLACES: tuple[Place, ...] = (
    ((8, 0), "left", "center"),
    ((-8, 0), "right", "center"),
    ((0, 8), "center", "bottom"),
    ((0, -8), "center", "top"),
    ((7, 8), "left", "bottom"),
    ((7, -8), "left", "top"),
    ((-7, 8), "right", "bottom"),
    ((-7, -8), "right", "top"),
)


def save_pictures(folder: Path, rows: Sequence[Row], title: str) -> list[Path]:
    """Draw ``quality-light.png`` and ``quality-dark.png`` into ``folder``; returns their paths."""
    paths = []
    for name, theme in THEMES.items():
        path = folder / f"quality-{name}.png"
        figure = draw(rows, title, theme)
        with atomic_file(path, force=True) as partial:
            figure.savefig(partial, format="png", dpi=160)
        paths.append(path)
    return paths


def draw(rows: Sequence[Row], title: str, theme: Theme) -> Figure:
    """A figure of the rows: model size to the right, perplexity upwards, the fp32 original as a line.

    Sizes near four bits a weight have a panel of their own, with its own scale.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    footnotes = _footnotes(rows)
    below = 0.04 * len(footnotes)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.02, rect=(0, below, 1, 1 - below))
    figure = Figure(figsize=(9, 5), facecolor=theme.background, layout=layout)
    FigureCanvasAgg(figure)
    figure.text(0.015, 0.02, "\n".join(footnotes), color=theme.muted, fontsize=8, va="bottom")
    reference = max((row for row in rows if row.original), key=lambda row: row.bits_per_weight)
    small = [row for row in rows if row.bits_per_weight <= _SMALL_BITS]
    large = [row for row in rows if row.bits_per_weight > _SMALL_BITS and row is not reference]
    panels = [panel for panel in (small, large) if panel]
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False, width_ratios=_widths(panels))[0]
    figure.suptitle(title, x=0.015, ha="left", color=theme.ink, fontsize=13, fontweight="bold")
    axes[0].set_xlabel("size of the whole model, MB", loc="left", color=theme.muted, fontsize=10)
    axes[0].set_ylabel("perplexity (lower is better)", color=theme.muted, fontsize=10)
    for panel, axis in zip(panels, axes, strict=True):
        _style(axis, theme)
        heading = "four bits" if panel is small else "eight bits, and the original"
        axis.set_title(heading, loc="left", color=theme.muted, fontsize=10)
        _points(axis, panel, theme)
        axis.axhline(reference.perplexity, color=theme.original, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    figure.draw_without_rendering()  # labels are placed by what the text measures
    words = _reference_label(axes[0], reference, theme)
    for panel, axis in zip(panels, axes, strict=True):
        _labels(axis, panel, theme, [words.get_window_extent(), _line_box(axis, reference.perplexity)])
    return figure


def _footnotes(rows: Sequence[Row]) -> list[str]:
    """The notes of the rows as lines of a footnote."""
    return [line for note in notes(rows) for line in wrap(f"{_MARK} {note}", _FOOTNOTE_COLUMNS)]


def _widths(panels: Sequence[Sequence[Row]]) -> list[int]:
    return [5, 3] if len(panels) == 2 else [1]


def _style(axis: Axes, theme: Theme) -> None:
    axis.set_facecolor(theme.background)
    axis.grid(color=theme.grid, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=theme.muted, length=0, labelsize=9)
    axis.margins(x=0.14, y=0.12)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _points(axis: Axes, rows: Sequence[Row], theme: Theme) -> None:
    axis.scatter(
        [row.megabytes for row in rows],
        [row.perplexity for row in rows],
        s=52,
        c=[theme.original if row.original else theme.formats for row in rows],
        edgecolors=theme.background,
        linewidths=1.2,
        zorder=3,
    )


def _reference_label(axis: Axes, reference: Row, theme: Theme) -> Annotation:
    return axis.annotate(
        f"{reference.label}: {reference.perplexity:.2f}",
        (0, reference.perplexity),
        xytext=(2, 4),
        xycoords=axis.get_yaxis_transform(),
        textcoords="offset points",
        color=theme.original,
        fontsize=9,
    )


def _line_box(axis: Axes, height: float) -> Bbox:
    from matplotlib.transforms import Bbox

    y = axis.transData.transform((0, height))[1]
    return Bbox.from_extents(axis.bbox.x0, y - 3, axis.bbox.x1, y + 3)


def _labels(axis: Axes, rows: Sequence[Row], theme: Theme, taken: list[Bbox]) -> None:
    """Write each label in the first place beside its point where it covers nothing; ``taken`` is covered already."""
    from matplotlib.transforms import Bbox

    points = axis.transData.transform([(row.megabytes, row.perplexity) for row in rows])
    radius = axis.figure.dpi / 12
    taken = [*taken, *(Bbox.from_bounds(x - radius, y - radius, 2 * radius, 2 * radius) for x, y in points)]
    for row in sorted(rows, key=lambda row: row.perplexity):
        label = row.label if row.note is None else f"{row.label} {_MARK}"
        text = axis.annotate(
            label, (row.megabytes, row.perplexity), (0, 0), textcoords="offset points", color=theme.ink, fontsize=9
        )
        covered = {place: _covered(axis, text, place, taken) for place in _LABEL_PLACES}
        taken.append(_move(text, min(_LABEL_PLACES, key=covered.__getitem__)))


def _covered(axis: Axes, text: Annotation, place: Place, taken: Sequence[Bbox]) -> float:
    """How much of ``taken``, and of what lies outside the panel, a label would cover at a place: an area in pixels."""
    from matplotlib.transforms import Bbox

    box = _move(text, place)
    shared = (Bbox.intersection(box, other) for other in (*taken, axis.bbox))
    *others, inside = (part.width * part.height if part is not None else 0.0 for part in shared)
    return sum(others) + box.width * box.height - inside


def _move(text: Annotation, place: Place) -> Bbox:
    offset, horizontal, vertical = place
    text.set_position(offset)
    text.set(horizontalalignment=horizontal, verticalalignment=vertical)
    return text.get_window_extent()
