"""Where a run's tracker files go: a folder that no other run writes to at the same time."""

from __future__ import annotations

import fcntl
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import IO, final

__all__ = ["Place", "alone", "below"]

_logger = logging.getLogger("nbaccel")
_MOST = 1000
_WAIT_SECONDS = 120.0
_POLL_SECONDS = 0.05
_held: set[Path] = set()
"""Places of this process: to itself no lock is denied, and its first to be closed would let go of it for all."""


def below(root: Path, project: str) -> Path:
    """The project's folder; "/" at the beginning of its name, and "..", lead nowhere else."""
    return root.joinpath(*(part for part in PurePath(project).parts if part not in ("/", "..")))


@final
class Place:
    """`wanted`, or `<wanted>-2` and so on while others hold those before it, in this process or another.

    Two runs of one project at a time, as the trials of a sweep or two Accelerators, would otherwise mix their rows;
    one after the other continues the files. Held until `release`, or the end of the process.
    """

    def __init__(self, wanted: Path) -> None:
        self.path = wanted
        """What is held; `wanted`, not held, where nothing can be written or locked."""
        self._lock: IO[str] | None = None
        for number in range(1, _MOST):
            path = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
            if path.absolute() in _held:
                continue
            try:
                self._lock = _hold(path)
            except BlockingIOError:
                continue
            except OSError:
                return  # a tracker that cannot write there says so itself
            self.path = path
            _held.add(path.absolute())
            break
        if self.path != wanted:
            _logger.warning("another run writes to %s: tracker files of this one go to %s", wanted, self.path)

    def release(self) -> None:
        """Another run may write here; may be called twice."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
            _held.discard(self.path.absolute())


@contextmanager
def alone(folder: Path, name: str) -> Iterator[None]:
    """A context that one process is in at a time, by a lock file `name` in `folder`; others wait.

    Raises:
        TimeoutError: another process has been in it for two minutes.
        OSError: the folder cannot be written, or has no locks.
    """
    end = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            file = _hold(folder, name)
            break
        except BlockingIOError:
            if time.monotonic() > end:
                raise TimeoutError(f"another process has held {folder / name} for two minutes") from None
            time.sleep(_POLL_SECONDS)
    with file:
        yield


def _hold(path: Path, name: str = ".lock") -> IO[str]:
    """The folder's lock; BlockingIOError when another process has it."""
    path.mkdir(parents=True, exist_ok=True)
    file = open(path / name, "w")  # noqa: SIM115  # it is open as long as the folder is held
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file
