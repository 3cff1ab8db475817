"""The file system as a checkpoint needs it: a seam, so that tests can put a worse one beneath.

Everything a checkpoint does to the disk goes through these few calls. `faults.FaultyFileSystem` is the
other implementation: it crashes, fills up, forgets what was not synced, or renames bit by bit.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path
from typing import BinaryIO, Protocol, final

__all__ = ["FileSystem", "LocalFileSystem"]

_UNSUPPORTED = (
    errno.EINVAL,
    errno.ENOTSUP,
    errno.ENOSYS,
    errno.EACCES,
    errno.EPERM,
    errno.EBADF,
    errno.EISDIR,
)


class FileSystem(Protocol):
    """What a checkpoint asks of the place it is written to. All failures are OSError."""

    def make_folder(self, path: Path) -> None:
        """Makes the folder and its parents; nothing happens when it is there."""

    def create(self, path: Path) -> BinaryIO:
        """A new file to write to, unbuffered; FileExistsError when it is there."""

    def sync_file(self, handle: BinaryIO) -> None:
        """Returns when the file's bytes would survive a power cut."""

    def sync_folder(self, path: Path) -> None:
        """Returns when the folder's names would survive a power cut, where the file system can say so."""

    def rename(self, source: Path, target: Path) -> None:
        """Gives a file or folder a new name; `target` is replaced if it is a file, must be absent if a folder."""

    def remove(self, path: Path) -> None:
        """Deletes a file, or a folder with all it holds; nothing happens when it is absent."""

    def open(self, path: Path) -> BinaryIO:
        """An existing file to read from."""

    def size(self, path: Path) -> int:
        """Bytes in a file."""

    def names(self, path: Path) -> list[str]:
        """What a folder holds, sorted; empty when there is no such folder."""

    def is_folder(self, path: Path) -> bool:
        """Whether it is there and a folder."""

    def age(self, path: Path) -> float:
        """Seconds since it was last changed."""

    def free_bytes(self, path: Path) -> int:
        """How many more bytes may be written below this existing folder."""


@final
class LocalFileSystem:
    """The operating system's own calls. Folders that cannot be synced (FUSE mounts) are let be: the
    manifest decides there."""

    def make_folder(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def create(self, path: Path) -> BinaryIO:
        return open(path, "xb", buffering=0)

    def sync_file(self, handle: BinaryIO) -> None:
        try:
            os.fsync(handle.fileno())
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise

    def sync_folder(self, path: Path) -> None:
        if os.name == "nt":
            return
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            return
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def remove(self, path: Path) -> None:
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        except FileNotFoundError:
            pass

    def open(self, path: Path) -> BinaryIO:
        return open(path, "rb", buffering=0)

    def size(self, path: Path) -> int:
        return path.stat().st_size

    def names(self, path: Path) -> list[str]:
        try:
            return sorted(os.listdir(path))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def is_folder(self, path: Path) -> bool:
        return path.is_dir()

    def age(self, path: Path) -> float:
        return time.time() - path.stat().st_mtime

    def free_bytes(self, path: Path) -> int:
        return shutil.disk_usage(path).free
