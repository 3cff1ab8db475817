"""A log file of bounded size that keeps its beginning and its end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO, final

__all__ = ["CappedLog", "read_log"]


@final
class CappedLog:
    """Bytes appended to a file; past `limit` the middle is left out, and the file says how much.

    The first half of `limit` goes straight into the file. What comes after goes into two more files
    beside it, of half of `limit` each and taking turns, so that the newest bytes are on disk and in order
    at any time, even when this process is killed; `close` puts their last half of `limit` into the file.
    Nothing is opened before the first `flush`. All methods may raise OSError.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self._path = path
        self._half = limit // 2
        self._buffer: list[bytes] = []
        self._buffered = 0
        self._head: BinaryIO | None = None
        self._head_room = self._half
        self._tail: BinaryIO | None = None
        self._tail_bytes = 0
        self._newer, self._older = _turns(path)

    @property
    def buffered(self) -> int:
        """Bytes not on disk yet."""
        return self._buffered

    @property
    def dropped(self) -> int:
        """Bytes left out of the middle, as far as what has been flushed goes."""
        return max(0, self._tail_bytes - self._half)

    def write(self, data: bytes) -> None:
        """Append `data`, in memory."""
        self._buffer.append(data)
        self._buffered += len(data)

    def flush(self) -> None:
        """Put what is in memory on disk."""
        if not self._buffer:
            return
        data = memoryview(b"".join(self._buffer))
        self._buffer, self._buffered = [], 0
        if self._head_room:
            if self._head is None:
                self._head = self._path.open("ab", buffering=0)
            _write_all(self._head, data[: self._head_room])
            data, self._head_room = data[self._head_room :], max(0, self._head_room - len(data))
        while data:
            if self._tail is None:
                self._tail = self._newer.open("wb", buffering=0)
            used = self._tail_bytes % self._half
            part, data = data[: self._half - used], data[self._half - used :]
            _write_all(self._tail, part)
            self._tail_bytes += len(part)
            if self._tail_bytes % self._half == 0:
                self._tail.close()
                self._tail = None
                self._newer.replace(self._older)

    def close(self) -> None:
        """Flush, join the parts and let go of the files. May be called twice."""
        try:
            self.flush()
            if self._tail_bytes and self._head is not None:
                end = _last(self._newer, self._older, self._half)
                gap = f"\n… {self.dropped} bytes left out here …\n".encode() if self.dropped else b""
                _write_all(self._head, memoryview(gap + end))
                for path in (self._newer, self._older):
                    path.unlink(missing_ok=True)
        finally:
            for file in (self._head, self._tail):
                if file is not None:
                    file.close()
            self._head = self._tail = None


def read_log(path: Path) -> bytes:
    """What a CappedLog at `path` has on disk, closed or not.

    Raises:
        FileNotFoundError: nothing has been flushed to it yet.
    """
    parts = [path.read_bytes()]
    newer, older = _turns(path)
    for part in (older, newer):
        try:
            parts.append(part.read_bytes())
        except FileNotFoundError:
            continue  # not in use yet, or just changed places
    return b"".join(parts)


def _turns(path: Path) -> tuple[Path, Path]:
    return path.with_name(path.name + ".newer"), path.with_name(path.name + ".older")


def _last(newer: Path, older: Path, count: int) -> bytes:
    end = newer.read_bytes() if newer.exists() else b""
    if older.exists() and len(end) < count:
        end = older.read_bytes()[-(count - len(end)) :] + end
    return end


def _write_all(file: BinaryIO, data: memoryview) -> None:
    while data:  # a write may take part of it when the disk is nearly full
        data = data[os.write(file.fileno(), data) :]
