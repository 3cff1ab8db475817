"""A file system that fails on purpose: the fake of `FileSystem`, for tests of ours and of users' own storage.

It writes to a real folder and can crash at any operation, run out of space, rename folders bit by bit as
FUSE mounts and object stores do, refuse to sync folders, and lose whatever was not synced.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, final

from nbaccel.core.checkpoint.filesystem import LocalFileSystem

__all__ = ["Crash", "FaultyFileSystem"]


@final
class Crash(BaseException):
    """The machine went away at this operation. Not an Exception: nothing may handle it and go on."""


@final
class FaultyFileSystem:
    """`LocalFileSystem` with faults.

    Args:
        crash_at: raise `Crash` instead of the n-th operation (from 0) and of every later one.
        capacity: bytes that may be written before the disk is full (OSError ENOSPC); the free space is said
            to be this, too, unless `hides_full` is set.
        hides_full: `free_bytes` says there is plenty.
        atomic_rename: False: a folder is renamed file by file, each an operation.
        syncs_folders: False: syncing a folder is an error, as on many FUSE mounts.
    """

    def __init__(
        self,
        *,
        crash_at: int | None = None,
        capacity: int | None = None,
        hides_full: bool = False,
        atomic_rename: bool = True,
        syncs_folders: bool = True,
    ) -> None:
        self.operations = 0
        self.log: list[str] = []
        self._real = LocalFileSystem()
        self._crash_at, self._left = crash_at, capacity
        self._hides_full, self._atomic, self._syncs_folders = hides_full, atomic_rename, syncs_folders
        self._unsynced_files: dict[Path, None] = {}
        self._undo: list[tuple[Path, Callable[[], None]]] = []

    def make_folder(self, path: Path) -> None:
        self._step(f"make_folder {path.name}")
        self._real.make_folder(path)

    def create(self, path: Path) -> BinaryIO:
        self._step(f"create {path.name}")
        handle = self._real.create(path)
        self._unsynced_files[path] = None
        return _File(self, path, handle)  # type: ignore[return-value]  # what a checkpoint uses of BinaryIO

    def sync_file(self, handle: BinaryIO) -> None:
        self._step(f"sync_file {Path(handle.name).name}")
        self._unsynced_files.pop(Path(handle.name), None)

    def sync_folder(self, path: Path) -> None:
        self._step(f"sync_folder {path.name}")
        if self._syncs_folders:
            self._undo = [(folder, undo) for folder, undo in self._undo if folder != path]
        # Otherwise EINVAL, which LocalFileSystem lets be: nothing is made durable and nobody is told.

    def rename(self, source: Path, target: Path) -> None:
        if self._atomic or not source.is_dir():
            self._step(f"rename {source.name} {target.name}")
            self._real.rename(source, target)
            self._moved(source, target)
            return
        self._step(f"rename-begin {source.name} {target.name}")
        target.mkdir(exist_ok=True)
        for name in sorted(os.listdir(source)):
            self.rename(source / name, target / name)
        self._step(f"rename-end {source.name} {target.name}")
        source.rmdir()

    def _moved(self, source: Path, target: Path) -> None:
        for path in list(self._unsynced_files):
            if path == source or source in path.parents:
                del self._unsynced_files[path]
                self._unsynced_files[target / path.relative_to(source)] = None
        self._undo.append((target.parent, lambda: self._real.rename(target, source)))

    def remove(self, path: Path) -> None:
        self._step(f"remove {path.name}")
        self._real.remove(path)
        # What led up to a deleted path cannot be undone any more; the deletion itself may well survive.
        self._undo = [(folder, undo) for folder, undo in self._undo if folder != path.parent]

    def open(self, path: Path) -> BinaryIO:
        return self._real.open(path)

    def size(self, path: Path) -> int:
        return self._real.size(path)

    def names(self, path: Path) -> list[str]:
        return self._real.names(path)

    def is_folder(self, path: Path) -> bool:
        return self._real.is_folder(path)

    def age(self, path: Path) -> float:
        return self._real.age(path)

    def free_bytes(self, path: Path) -> int:
        if self._left is None or self._hides_full:
            return self._real.free_bytes(path)
        return self._left

    def power_cut(self) -> None:
        """Loses what a power cut may lose: the second half of files that were not synced, and renames whose
        folder was not, the last one first."""
        for _, undo in reversed(self._undo):
            undo()
        self._undo.clear()
        for path in self._unsynced_files:
            if path.exists():
                os.truncate(path, path.stat().st_size // 2)
        self._unsynced_files.clear()

    def _step(self, what: str) -> None:
        if self._crash_at is not None and self.operations >= self._crash_at:
            raise Crash(f"at operation {self.operations}: {what}")
        self.operations += 1
        self.log.append(what)

    def _take(self, count: int) -> int:
        """How many of `count` bytes still fit."""
        self._step(f"write {count}")
        if self._left is None:
            return count
        if self._left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = min(count, self._left)
        self._left -= taken
        return taken


@final
class _File:
    """An open file whose writes count."""

    def __init__(self, filesystem: FaultyFileSystem, path: Path, handle: BinaryIO) -> None:
        self.name = str(path)
        self._filesystem, self._handle = filesystem, handle

    def write(self, data: Any) -> int:
        return self._handle.write(memoryview(data)[: self._filesystem._take(len(data))])

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.close()
