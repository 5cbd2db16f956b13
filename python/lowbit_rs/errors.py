"""The exceptions of this package, and how to make one.

Every message has the form ``argument: got <value>, expected <what it takes>``. The classes are created by the native
module, so that an error of the Rust core and one of the Python layer are the same class.
"""

from __future__ import annotations

from lowbit_rs._native import CudaError, InvalidArgument, LowbitError, Unsupported

__all__ = ["CudaError", "InvalidArgument", "LowbitError", "Unsupported"]


def invalid(argument: str, got: object, expected: str) -> InvalidArgument:
    """An :class:`InvalidArgument` for ``argument``, to be raised by the caller.

    ``got`` is put into the message as it is: pass ``repr(value)`` for strings.
    """
    return InvalidArgument(f"{argument}: got {got}, expected {expected}")


def unsupported(what: str, reason: str) -> Unsupported:
    """An :class:`Unsupported` for something well formed that is not served; ``reason`` says what to use instead."""
    return Unsupported(f"{what}: not supported: {reason}")
