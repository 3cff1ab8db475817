"""The bytes of a payload: in memory while they are few, then in one unnamed memory file that is sealed."""

from __future__ import annotations

import fcntl
import os
import pickle
import tempfile
from typing import Any, final

__all__ = ["INLINE", "Content", "Reader", "seal", "write_at"]

INLINE = 1 << 16
"""Contents up to this travel in the message itself, without a file."""


@final
class Content:
    """What a pickler writes to: memory while it is small, then a memory file.

    Attributes:
        size: bytes written.
    """

    def __init__(self) -> None:
        self._start = bytearray()
        self._file: Any = None
        self.size = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.size += size
        if self._file is None and self.size <= INLINE:
            self._start += data
        else:
            self._on_file().write(data)
        return size

    @property
    def small(self) -> bytes | None:
        """All of it, when it is so small that no file was needed."""
        return bytes(self._start) if self._file is None else None

    def fileno(self) -> int:
        """The file, with everything in it."""
        file = self._on_file()
        file.flush()
        return int(file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _on_file(self) -> Any:
        if self._file is None:
            self._file = _memory_file()
            self._file.write(self._start)
        return self._file


@final
class Reader:
    """A file over a memoryview, which `io.BytesIO` would copy."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._at = 0

    def read(self, size: int) -> bytes:
        start, self._at = self._at, min(self._at + size, len(self._view))
        return bytes(self._view[start : self._at])

    def readinto(self, target: Any) -> int:
        chunk = self._view[self._at : self._at + len(target)]
        target[: len(chunk)] = chunk
        self._at += len(chunk)
        return len(chunk)

    def readline(self) -> bytes:
        # only protocol 0 reads lines; the unpickler wants the method to exist
        raise pickle.UnpicklingError("not a protocol 5 pickle")


def _memory_file() -> Any:
    """An unnamed file in memory; on disk where the platform has none."""
    if hasattr(os, "memfd_create"):
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        return os.fdopen(os.memfd_create("nbaccel", flags), "w+b", buffering=1 << 20)
    return tempfile.TemporaryFile(prefix="nbaccel-")


def write_at(fd: int, view: memoryview, offset: int) -> None:
    while view.nbytes:
        written = os.pwrite(fd, view[: 1 << 30], offset)
        view, offset = view[written:], offset + written


def seal(fd: int) -> None:
    """Forbid every change from now on: what several ranks map must not move under them."""
    if hasattr(fcntl, "F_ADD_SEALS"):
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
