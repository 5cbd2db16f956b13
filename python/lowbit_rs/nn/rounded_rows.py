"""How a norm hands its result to the layers behind it in int8.

Layers that round the same activations to 8 bits ask the norm that made them, with their first product, to round its
result the next time: the kernel of the norm has the row in registers then. Nobody has to know which norm stands in
front of which layers. A norm that is asked rounds once; whoever takes the rows asks again.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from lowbit_rs._backends import backend_of


class Wish(NamedTuple):
    """What layers ask of a norm: rows in int8 but for magnitudes of ``threshold`` or more, from so many tokens on."""

    threshold: float
    least_tokens: int


@dataclass(slots=True)
class Origin:
    """Who made a tensor, and its rows in int8 where that was asked for."""

    tensor: weakref.ref[Tensor]
    norm: Any  # a module with the attribute `wish`
    version: int | None
    queue: Any
    threshold: float | None
    rows: Any


#: The result of the norm that each thread ran last. Notes on the tensor itself would be copied and saved with it.
_last = threading.local()


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place; None where nobody counts."""
    return None if tensor.is_inference() else tensor._version


def note_origin(y: Tensor, norm: Any, threshold: float | None, rows: Any) -> None:
    """Notes that ``norm`` made ``y``, and the rows that it made beside it."""
    queue = backend_of(y.device).queue(y.device)
    _last.origin = Origin(weakref.ref(y), norm, version_of(y), queue, threshold, rows)


def rows_of_origin(x: Tensor, wish: Wish) -> Any:
    """x in int8 as wished, if the norm that made it left that; and asks that norm for it the next time."""
    origin: Origin | None = getattr(_last, "origin", None)
    if origin is None or origin.tensor() is not x:
        return None
    origin.norm.wish = wish
    is_same = origin.version == version_of(x) and origin.queue == backend_of(x.device).queue(x.device)
    return origin.rows if is_same and origin.threshold == wish.threshold else None
