"""Reading and writing safetensors files one tensor at a time.

The safetensors library maps a file into memory or takes all tensors at once; both make the resident memory of a
conversion grow with the file. Here data is read into a buffer that the caller reuses, and a file is written tensor by
tensor to places that are known before the first byte of data.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lowbit_rs.errors import Unsupported, invalid

from .safetensors_format import (
    DTYPE_BITS,
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    Header,
    TensorInfo,
    brief,
    encode_header,
    parse_header,
    safetensors_dtype,
    torch_dtype,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

_COPY_BYTES = 4 << 20
_NO_RESERVATION = frozenset((errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV))
"""What file systems answer that cannot reserve space: they tell of a full disk when they are written to."""


class Buffer:
    """Memory that is used for one tensor after another and grows to the largest."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def reserve(self, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The first ``nbytes`` of the buffer, uint8 [nbytes], content undefined."""
        if nbytes > self._bytes.nbytes:
            self._bytes = np.empty(0, np.uint8)  # frees the old memory before the new is taken
            self._bytes = np.empty(nbytes, np.uint8)
        return self._bytes[:nbytes]


class SafetensorsReader:
    """An open safetensors file whose header has been checked; a context manager.

    No part of the file stays mapped, so that only the buffers of the caller count as memory.

    Raises:
        InvalidArgument: naming the file and what is wrong with it.
        OSError: where the file cannot be opened or read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for a writer
            raise invalid(str(path), "a directory" if path.is_dir() else "a special file", "a safetensors file")
        self._file = path.open("rb", buffering=0)
        try:
            self.header = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _read_header(self) -> Header:
        size = os.fstat(self._file.fileno()).st_size
        if size < LENGTH_BYTES:
            raise invalid(str(self.path), f"{size} bytes", "a safetensors file, which has at least 8")
        length_field = bytearray(LENGTH_BYTES)
        self._fill(memoryview(length_field), 0)
        length = int.from_bytes(length_field, "little")
        limit = min(MAX_HEADER_BYTES, size - LENGTH_BYTES)
        if length > limit:
            expected = f"at most {limit}: the file is truncated, or no safetensors file"
            raise invalid(str(self.path), f"a header of {length} bytes in a file of {size}", expected)
        header = bytearray(length)
        self._fill(memoryview(header), LENGTH_BYTES)
        if not header.startswith(b"{"):
            raise invalid(f"{self.path}: header", brief(bytes(header[:16])), "a JSON object: no safetensors file")
        try:
            text = header.decode()
        except UnicodeDecodeError as error:
            raise invalid(f"{self.path}: header", f"a bad byte at {error.start}", "UTF-8") from None
        data_start = LENGTH_BYTES + length
        return parse_header(self.path, text, data_start, size - data_start)

    def _fill(self, target: memoryview, position: int) -> None:
        self._file.seek(position)
        filled = 0
        while filled < len(target):
            count = self._file.readinto(target[filled:])
            if not count:
                raise invalid(str(self.path), f"the end of the file at byte {position + filled}", "an unchanging file")
            filled += count

    def read_into(self, name: str, buffer: Buffer) -> torch.Tensor:
        """The tensor called ``name``, in ``buffer``, whose content it replaces: valid until that is used again."""
        info = self.header.tensors[name]
        try:
            dtype = torch_dtype(info.dtype)
        except Unsupported as error:
            raise Unsupported(f"{self.path}: tensor {brief(name)}: {error}") from None
        if not info.nbytes:  # torch has no dense view of an empty buffer
            return torch.empty(info.shape, dtype=dtype)
        target = buffer.reserve(info.nbytes)
        self._fill(target.data, self.header.offsets[name])
        return torch.from_numpy(target).view(dtype).view(info.shape)

    def read(self, name: str) -> torch.Tensor:
        """The tensor called ``name``, in memory of its own."""
        return self.read_into(name, Buffer())

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The bytes of the tensor called ``name`` in pieces of a few megabytes, each valid until the next is asked for.

        Serves dtypes that torch lacks, too.
        """
        start, nbytes = self.header.offsets[name], self.header.tensors[name].nbytes
        buffer = memoryview(bytearray(min(_COPY_BYTES, nbytes)))
        for done in range(0, nbytes, _COPY_BYTES):
            piece = buffer[: min(_COPY_BYTES, nbytes - done)]
            self._fill(piece, start + done)
            yield piece


def read_header(path: Path) -> Header:
    """The checked header of the file at ``path``; its data is not read."""
    with SafetensorsReader(path) as reader:
        return reader.header


class SafetensorsWriter:
    """Writes a safetensors file whose tensors are known by name, dtype and shape before their data; a context manager.

    The header is written first, then the data of any tensor at any time. The file is complete, and on disk, once the
    ``with`` block has been left without an error: a tensor that was not written is an error then.

    Tensors are laid out by falling element size, and so each begins at a multiple of its own: readers that map the
    file make views of it without a copy. Among equal sizes the order is that of ``tensors``.

    Args:
        path: the file to make. It must not exist.
        tensors: what will be written.
        metadata: the strings under ``__metadata__``; ``None`` leaves the key out.
    """

    def __init__(self, path: Path, tensors: Iterable[TensorInfo], metadata: Mapping[str, str] | None) -> None:
        self.path = path
        laid_out = sorted(tensors, key=lambda tensor: -DTYPE_BITS[tensor.dtype])
        head, self._offsets = encode_header(laid_out, metadata)
        self._tensors = {tensor.name: tensor for tensor in laid_out}
        self._missing = set(self._tensors)
        self._file = path.open("xb", buffering=0)
        try:
            _reserve(self._file.fileno(), len(head) + sum(tensor.nbytes for tensor in laid_out))
            self._write_at(0, memoryview(head))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                if self._missing:
                    raise RuntimeError(f"{self.path}: no data was written for {sorted(self._missing)}")
                os.fsync(self._file.fileno())

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes the data of the tensor called ``name``."""
        expected = self._tensors[name]
        got = TensorInfo(name, safetensors_dtype(tensor.dtype), tuple(tensor.shape))
        if got != expected:
            raise invalid("tensor", got, str(expected))
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self.write_chunks(name, [data.numpy().data])

    def write_chunks(self, name: str, chunks: Iterable[memoryview]) -> None:
        """Writes the data of the tensor called ``name`` from consecutive pieces of its bytes."""
        written = 0
        for chunk in chunks:
            self._write_at(self._offsets[name] + written, chunk)
            written += len(chunk)
        expected = self._tensors[name].nbytes
        if written != expected:
            raise invalid("chunks", f"{written} bytes for the tensor {name!r}", f"{expected}")
        self._missing.discard(name)

    def _write_at(self, position: int, data: memoryview) -> None:
        self._file.seek(position)
        written = 0
        while written < len(data):  # a write may take less than it is given: Linux stops at 2 GiB
            written += self._file.write(data[written:])


def _reserve(descriptor: int, nbytes: int) -> None:
    """Takes the space of the whole file, so that a full disk is found before the work and not after it."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno not in _NO_RESERVATION:
            raise
