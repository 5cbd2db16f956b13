"""Outputs that are complete or absent: written beside their place, flushed to disk, then renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit_rs.errors import invalid

if TYPE_CHECKING:
    from collections.abc import Iterator

_MARK = "lowbit-partial"


def check_apart(source: Path, destination: Path) -> None:
    """Refuses with ``InvalidArgument`` a destination that is the source, lies in it or holds it."""
    real_source, real_destination = source.resolve(), destination.resolve()
    same = real_source == real_destination or (destination.exists() and source.samefile(destination))
    if same or real_source in real_destination.parents or real_destination in real_source.parents:
        raise invalid("destination", str(destination), f"a path apart from the source {source}")


def check_destination(destination: Path, *, directory: bool, force: bool) -> None:
    """Refuses a destination that cannot be written, or whose replacement would destroy something else.

    Raises:
        InvalidArgument: where its directory does not exist; where it exists and ``force`` is not given; where it is a
            file and ``directory`` is given, or the reverse; where it is a directory without safetensors files.
    """
    if not destination.parent.is_dir():
        raise invalid("destination", str(destination), "a path in a directory that exists")
    if not os.path.lexists(destination):
        return
    if not force:
        raise invalid("destination", f"{destination}, which exists", "a new path, or force")
    kind = "directory" if directory else "file"
    if destination.is_symlink() or destination.is_dir() != directory:
        raise invalid("destination", f"{destination}, which is no {kind}", f"a {kind} to replace")
    if directory and any(destination.iterdir()) and not any(destination.glob("*.safetensors")):
        # What is replaced is deleted: a mistyped path must not cost a directory of something else.
        raise invalid("destination", f"{destination}, which holds no safetensors file", "a model directory to replace")


def leftovers(destination: Path) -> list[Path]:
    """Partial outputs beside ``destination`` that earlier runs left because they were killed."""
    return sorted(destination.parent.glob(f".{_escape(destination.name)}.*.{_MARK}"))


def _escape(name: str) -> str:
    """``name`` with the characters that mean something to glob made plain."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _partial(destination: Path) -> Path:
    """A new name beside ``destination``, in the same file system and so one rename away from it."""
    return destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.{_MARK}")


@contextlib.contextmanager
def atomic_file(destination: Path, *, force: bool) -> Iterator[Path]:
    """Gives the path at which to write a file that becomes ``destination`` once the block has been left.

    The writer flushes the file to disk. After an error in the block, Ctrl-C included, nothing remains.
    """
    partial = _partial(destination)
    try:
        yield partial
        _check_absent(destination, force=force)
        partial.replace(destination)
        sync_directory(destination.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_directory(destination: Path, *, force: bool) -> Iterator[Path]:
    """Gives a new directory that becomes ``destination`` once the block has been left.

    With ``force`` an existing directory is moved aside first, and back if the new one cannot take its place: for that
    instant there is none at ``destination``. After an error in the block, Ctrl-C included, nothing remains.
    """
    partial = _partial(destination)
    partial.mkdir()
    try:
        yield partial
        _check_absent(destination, force=force)
        _replace_directory(partial, destination)
        sync_directory(destination.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_absent(destination: Path, *, force: bool) -> None:
    if not force and os.path.lexists(destination):
        raise invalid("destination", f"{destination}, which another program made meanwhile", "a new path, or force")


def _replace_directory(partial: Path, destination: Path) -> None:
    if not destination.exists():
        partial.rename(destination)
        return
    previous = _partial(destination)
    destination.rename(previous)
    try:
        partial.rename(destination)
    except BaseException:
        previous.rename(destination)
        raise
    shutil.rmtree(previous)


def sync_directory(path: Path) -> None:
    """Puts the names in a directory on disk, where the system can open directories."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """``sync_directory`` for a directory and all below it."""
    for parent, _, _ in os.walk(path):
        sync_directory(Path(parent))


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a new file and flushes it to disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def copy_file(source: Path, destination: Path) -> None:
    """Copies the bytes and the permissions of a file, whose directory is made, and flushes it to disk."""
    if not source.is_file():
        raise invalid(str(source), "a special file or a broken link", "a file that can be copied")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader, destination.open("xb") as writer:
        shutil.copyfileobj(reader, writer, 4 << 20)
        writer.flush()
        os.fsync(writer.fileno())
    shutil.copymode(source, destination)
