"""Names of bitsandbytes that are not offered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lowbit_rs.errors import Unsupported, unsupported


class NotOffered(Unsupported, AttributeError):  # noqa: N818  # as Unsupported
    """An Unsupported that ``hasattr`` and ``getattr`` with a default understand."""


def getattr_of(module: str, reasons: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module that raises with the reason for each name of bitsandbytes that it lacks."""

    def missing(name: str) -> Any:
        if name in reasons:
            raise NotOffered(str(unsupported(f"{module}.{name}", reasons[name])))
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return missing
