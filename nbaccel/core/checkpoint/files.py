"""Writing files so that they are known byte by byte: each is checksummed as it is written, and synced."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, final

import torch

from nbaccel.core.checkpoint.filesystem import FileSystem
from nbaccel.core.checkpoint.manifest import FileRecord
from nbaccel.core.checkpoint.tensorfile import Layout, Spec, data_bytes, lay_out

__all__ = ["layout_of", "write_file", "write_tensors"]

_SLICE = 1 << 20
"""Bytes checksummed and written at a time: small enough to stay in the processor's cache between the two."""
_PART = 16 << 20
"""Bytes after which a new part of the file's record begins."""


def write_file(
    folder: Path, name: str, pieces: Iterable[bytes | memoryview], filesystem: FileSystem
) -> FileRecord:
    """A new file made of `pieces`, synced."""
    with filesystem.create(folder / name) as handle:
        writer = _Writer(handle)
        for piece in pieces:
            writer.write(piece)
        parts = writer.finish()
        filesystem.sync_file(handle)
    return FileRecord(name=name, parts=parts)


def write_tensors(
    folder: Path,
    name: str,
    layout: Layout,
    get: Callable[[str], torch.Tensor],
    filesystem: FileSystem,
) -> FileRecord:
    """A new tensor file. `get` gives each tensor, on any device, when its turn comes."""

    def pieces() -> Iterable[bytes | memoryview]:
        yield layout.header
        for entry in layout.order:
            tensor = get(entry).detach().cpu().contiguous()
            yield data_bytes(tensor)

    return write_file(folder, name, pieces(), filesystem)


def layout_of(tensors: Mapping[str, torch.Tensor]) -> Layout:
    """The layout of a file of these tensors."""
    return lay_out({name: Spec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}, {"format": "pt"})


@final
class _Writer:
    """Gathers small pieces, cuts large ones, and keeps the checksums."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle = handle
        self._small = bytearray()
        self._parts: list[tuple[int, int]] = []
        self._length = self._crc = 0

    def write(self, piece: bytes | memoryview) -> None:
        if len(piece) < _SLICE:
            self._small += piece
            if len(self._small) < _SLICE:
                return
            piece = b""
        self._flush()
        for start in range(0, len(piece), _SLICE):
            self._put(memoryview(piece)[start : start + _SLICE])

    def finish(self) -> tuple[tuple[int, int], ...]:
        self._flush()
        if self._length or not self._parts:
            self._parts.append((self._length, self._crc))
        return tuple(self._parts)

    def _flush(self) -> None:
        if self._small:
            self._put(memoryview(bytes(self._small)))
            self._small.clear()

    def _put(self, data: memoryview) -> None:
        self._crc = zlib.crc32(data, self._crc)
        self._length += len(data)
        while len(data):
            data = data[self._handle.write(data) :]
        if self._length >= _PART:
            self._parts.append((self._length, self._crc))
            self._length = self._crc = 0
