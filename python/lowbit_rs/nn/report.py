"""What quantize_model did, as data and as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit_rs.functional import embedding
from lowbit_rs.packed import PackedWeight, format_bytes

#: Weights that are compared at a time: 4 MB of fp32 for each operand.
_CHUNK = 1 << 20


@dataclass
class Fusion:
    """What fuse_model did: names of the layers of each group, and the groups that it left alone, with the reason."""

    groups: list[tuple[str, ...]] = field(default_factory=list)
    #: Reason by names.
    skipped: dict[tuple[str, ...], str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"fused {', '.join(names)}" for names in self.groups]
        return "\n".join([*lines, *(f"not fused {', '.join(names)}: {why}" for names, why in self.skipped.items())])


@dataclass(frozen=True)
class ReportRow:
    """One layer that was packed. Sizes are those of its weight, in bytes, without the bias.

    ``relative_error`` is ``||w - w'|| / ||w||`` in the Frobenius norm, w' being the dequantized weight in fp32; 0 for a
    weight of zeros, None where it was not computed.
    """

    name: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    relative_error: float | None = None


@dataclass
class Report:
    """The layers that were packed, and those that were not, with the reason. ``str()`` makes a table of it."""

    #: What the layers were packed as.
    scheme: str = ""
    rows: list[ReportRow] = field(default_factory=list)
    #: Reason by name of the layer.
    skipped: dict[str, str] = field(default_factory=dict)
    #: What was fused, where that was asked for.
    fusion: Fusion | None = None
    #: Names of the norms that were fused.
    fused_norms: list[str] = field(default_factory=list)

    @property
    def bytes_before(self) -> int:
        """Bytes of the packed layers' weights before."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of the packed layers' weights after."""
        return sum(row.bytes_after for row in self.rows)

    def __str__(self) -> str:
        cells: list[tuple[str, ...]] = [("layer", "shape", "before", "after", "relative error")]
        cells += [
            (
                row.name,
                " x ".join(map(str, row.shape)),
                format_bytes(row.bytes_before),
                format_bytes(row.bytes_after),
                "" if row.relative_error is None else f"{row.relative_error:.4f}",
            )
            for row in self.rows
        ]
        count = f"{len(self.rows)} layer{'' if len(self.rows) == 1 else 's'}"
        cells.append((count, "", format_bytes(self.bytes_before), format_bytes(self.bytes_after), ""))
        header, *rows, total = _align(cells)
        rule = "-" * len(header)
        skipped = [f"skipped {name}: {reason}" for name, reason in self.skipped.items()]
        norms = len(self.fused_norms)
        fused = [f"fused {norms} norm{'' if norms == 1 else 's'}"] if norms else []
        fused += [] if self.fusion is None else [str(self.fusion)]
        return "\n".join([f"packed as {self.scheme}", header, rule, *rows, rule, total, *skipped, *fused])


def _align(cells: list[tuple[str, ...]]) -> list[str]:
    """Rows of text with the first two columns to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def relative_error(weight: Tensor, packed: PackedWeight) -> float:
    """``||w - w'|| / ||w||`` for a weight and its packed form, without a copy of the whole of either.

    The weight is [N, K] or [experts, N, K]; of a stack the norm is that of all matrices together.
    """
    if len(packed.shape) == 3:
        parts = [_squares(matrix, packed[index]) for index, matrix in enumerate(weight)]
        error, norm = sum(part[0] for part in parts), sum(part[1] for part in parts)
    else:
        error, norm = _squares(weight, packed)
    return math.sqrt(error / norm) if norm else 0.0


def _squares(weight: Tensor, packed: PackedWeight) -> tuple[float, float]:
    """``||w - w'||^2`` and ``||w||^2`` of a matrix."""
    rows, cols = packed.shape
    step = max(1, _CHUNK // max(1, cols))
    error = norm = 0.0
    for start in range(0, rows, step):
        part = weight.detach()[start : start + step].float()
        indices = torch.arange(start, start + part.shape[0], device=packed.device)
        difference = embedding(indices, packed, torch.float32).sub_(part)
        error += float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
        norm += float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2
    return error, norm
