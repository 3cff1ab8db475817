"""The manifest: the one file that makes a folder a checkpoint. Written last, it names every other file.

Each file is described as parts, one after the other, each with its length and CRC-32: a truncated file or
a single flipped byte is found, and named. The manifest carries a checksum of itself.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbaccel.core.checkpoint.filesystem import FileSystem
from nbaccel.core.checkpoint.tensorfile import read_exactly
from nbaccel.errors import CheckpointError

__all__ = ["MANIFEST", "FileRecord", "Manifest", "check_bytes", "check_sizes", "describe", "read_manifest"]

MANIFEST = "manifest.json"
_FORMAT = 1
_PIECE = 16 * 2**20
"""Bytes read at a time when a file is checked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """One file as it must be. `name` is relative to the checkpoint, with forward slashes."""

    name: str
    parts: tuple[tuple[int, int], ...]
    """(bytes, CRC-32) of consecutive parts that cover the file."""

    @property
    def num_bytes(self) -> int:
        return sum(length for length, _ in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a complete checkpoint says about itself."""

    step: int
    """Optimizer steps taken when it was saved."""
    world_size: int
    """Ranks that saved it."""
    saved_at: float
    """Seconds since the epoch, on rank 0's clock."""
    versions: Mapping[str, str]
    """Library versions that wrote it."""
    files: tuple[FileRecord, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What the caller wanted to keep beside it; JSON values."""

    def to_json(self) -> bytes:
        """The manifest's file."""
        body = {
            "step": self.step,
            "world_size": self.world_size,
            "saved_at": self.saved_at,
            "versions": dict(self.versions),
            "files": {record.name: [list(part) for part in record.parts] for record in self.files},
            "extra": dict(self.extra),
        }
        text = json.dumps(body, sort_keys=True)
        head = json.dumps({"format": _FORMAT, "crc32": zlib.crc32(text.encode())})
        return f'{head[:-1]}, "checkpoint":\n{text}\n}}\n'.encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """The manifest in `data`.

        Raises:
            ValueError: it is cut off, damaged, or of a later format.
        """
        document = json.loads(data)
        if document.get("format") != _FORMAT:
            raise ValueError(f"it has format {document.get('format')!r}; this version reads {_FORMAT}")
        body = document["checkpoint"]
        if zlib.crc32(json.dumps(body, sort_keys=True).encode()) != document["crc32"]:
            raise ValueError("its own checksum does not match")
        files = tuple(
            FileRecord(name=name, parts=tuple((length, crc) for length, crc in parts))
            for name, parts in body.pop("files").items()
        )
        return cls(files=files, **body)


def read_manifest(folder: Path, filesystem: FileSystem) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if MANIFEST not in filesystem.names(folder):
        what = "was never finished: it has no manifest" if filesystem.is_folder(folder) else "is not there"
        raise CheckpointError(f"checkpoint {folder} {what}")
    try:
        with filesystem.open(folder / MANIFEST) as handle:
            return Manifest.from_json(handle.read())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {folder}: {MANIFEST} is damaged: {error}") from error


def check_sizes(folder: Path, manifest: Manifest, filesystem: FileSystem) -> None:
    """Looks whether every file is there with its full length.

    Raises:
        CheckpointError: names the first file that is not.
    """
    for record in manifest.files:
        try:
            found = filesystem.size(folder / record.name)
        except OSError as error:
            raise CheckpointError(f"checkpoint {folder}: {record.name} is missing ({error})") from error
        if found != record.num_bytes:
            raise CheckpointError(
                f"checkpoint {folder}: {record.name} has {found} bytes instead of {record.num_bytes}; "
                "it was cut off or replaced. Use an earlier checkpoint."
            )


def check_bytes(folder: Path, record: FileRecord, filesystem: FileSystem) -> None:
    """Reads a whole file and compares it with its checksums.

    Raises:
        CheckpointError: names the file and where it differs.
    """
    path = folder / record.name
    position = 0
    try:
        with filesystem.open(path) as handle:
            for length, crc in record.parts:
                found = 0
                for piece in _pieces(handle, length):
                    found = zlib.crc32(piece, found)
                if found != crc:
                    raise CheckpointError(
                        f"checkpoint {folder}: {record.name} is damaged between bytes {position} and "
                        f"{position + length} (checksum differs). Use an earlier checkpoint."
                    )
                position += length
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {folder}: {record.name} cannot be read: {error}") from error


def describe(path: Path, name: str, filesystem: FileSystem) -> FileRecord:
    """The record of a file that somebody else wrote into a checkpoint."""
    remaining = filesystem.size(path)
    parts: list[tuple[int, int]] = []
    with filesystem.open(path) as handle:
        while remaining > 0 or not parts:
            piece = read_exactly(handle, min(remaining, _PIECE))
            parts.append((len(piece), zlib.crc32(piece)))
            remaining -= len(piece)
    return FileRecord(name=name, parts=tuple(parts))


def _pieces(handle: Any, length: int) -> Iterator[bytes]:
    while length > 0:
        piece = read_exactly(handle, min(length, _PIECE))
        yield piece
        length -= len(piece)
