"""What the demo shows and saves: one row for each format, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from lowbit_rs.files.output import atomic_file, write_bytes

_HEADINGS = ("bits/\nweight", "\nMB", "\nperplexity", "\nagreement", "decode\ntokens/s", "prefill\ntokens/s")

#: Up to how many bits a weight :func:`closest` compares.
SMALL_BITS = 4.6


@dataclass(frozen=True)
class Row:
    """What was measured of one format."""

    #: The name that ``--formats`` takes, and the words of the table.
    name: str
    label: str
    #: Bits of a weight of the quantized layers, with its share of scales, shifts and codebooks.
    bits_per_weight: float
    #: The whole model, in 10^6 bytes: embedding and normalisation too.
    megabytes: float
    perplexity: float
    #: Share of positions, 0 to 1, at which the greedy next token is that of the fp32 model.
    agreement: float
    #: Tokens a second.
    decode: float
    prefill: float
    #: Seconds that quantizing took; 0 for the original.
    quantize_seconds: float = 0.0
    #: Whether this row is a float model, and no format of lowbit_rs.
    original: bool = False
    #: What a reader must know of this row; it goes under the table.
    note: str | None = None


def table(rows: Sequence[Row], title: str) -> Table:
    """The rows as a table of 78 columns; a row with a note is marked with its number, as :func:`notes` orders them.

    For a console without markup: labels are printed as they are.
    """
    result = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE, show_edge=False)
    result.pad_edge, result.collapse_padding = False, True  # for the 78 columns
    result.add_column("format", no_wrap=True)
    for heading in _HEADINGS:
        result.add_column(heading, justify="right", no_wrap=True)
    numbers = {note: number for number, note in enumerate(notes(rows), 1)}
    originals = [row for row in rows if row.original]
    for row in rows:
        result.add_row(
            row.label if row.note is None else f"{row.label} [{numbers[row.note]}]",
            f"{row.bits_per_weight:.2f}",
            f"{row.megabytes:.1f}",
            f"{row.perplexity:.2f}",
            f"{row.agreement:.1%}",
            f"{row.decode:.1f}",
            f"{row.prefill:.0f}",
            end_section=row in originals[-1:],
        )
    return result


def notes(rows: Sequence[Row]) -> list[str]:
    """The notes of the rows in the order of their first appearance, each once."""
    return list(dict.fromkeys(row.note for row in rows if row.note is not None))


def closest(rows: Sequence[Row]) -> str | None:
    """Which small format comes closest to fp32, and by how much closer than NF4 in blocks of 64, in a sentence.

    Formats with a note do not compete. None without that NF4, without fp32 or where no format comes closer.
    """
    named = {row.name: row for row in rows}
    small = [row for row in rows if row.bits_per_weight <= SMALL_BITS and row.note is None]
    if "fp32" not in named or "nf4" not in named:
        return None
    best = min(small, key=lambda row: row.perplexity)
    loss, loss_of_nf4 = (row.perplexity - named["fp32"].perplexity for row in (best, named["nf4"]))
    if loss >= loss_of_nf4:
        return None
    share = f"{1 - loss / loss_of_nf4:.0%}"
    return (
        f"closest to fp32 with {SMALL_BITS} bits/weight or less: {best.label}, {share} closer than {named['nf4'].label}"
    )


def save_json(path: Path, rows: Sequence[Row], context: Mapping[str, Any]) -> None:
    """Write the rows, and ``context`` beside them, as JSON. The file is replaced whole or left alone."""
    content = {**context, "rows": [asdict(row) for row in rows]}
    with atomic_file(path, force=True) as partial:
        write_bytes(partial, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
