"""Where run folders lie, which there are, and which may go."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["LOCK", "RunRecord", "default_root", "fate", "new_folder", "prune", "recent"]

LOCK = "lock"
"""The file in a run folder that names the process the run belongs to; gone when the run has ended."""

_NAME = re.compile(r"(?P<stamp>\d{8}-\d{6})-(?P<name>.+)-[0-9a-f]{6}")
_OURS = (LOCK, "run.json", "result.json", "events.jsonl")
_HALF_DONE = (".new-", ".gone-")
_WEEK = 7 * 86400.0


Fate = Literal["running", "done", "failed", "stopped", "lost"]
_WRITTEN: dict[str, Fate] = {"done": "done", "failed": "failed", "stopped": "stopped"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What a run folder says about its run."""

    folder: Path
    name: str
    started: float
    """Seconds since the epoch."""
    state: Fate
    """"stopped": ended before all ranks were done, without a failure; "lost": its process was killed."""
    duration: float | None
    """Seconds; None while it runs and when nobody knows."""


def default_root(environ: Mapping[str, str] = os.environ, platform: str = sys.platform) -> Path:
    """The user's folder for run folders, by the platform's custom; it need not exist."""
    try:
        home = Path.home()
    except RuntimeError:  # no HOME and no passwd entry, as in some containers
        return Path(tempfile.gettempdir()) / f"nbaccel-{getattr(os, 'getuid', os.getpid)()}" / "runs"
    if platform == "win32":
        state = Path(environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif platform == "darwin":
        state = home / "Library" / "Application Support"
    else:
        # A relative path is to be ignored: XDG Base Directory Specification.
        asked = Path(environ.get("XDG_STATE_HOME", ""))
        state = asked if asked.is_absolute() else home / ".local" / "state"
    return state / "nbaccel" / "runs"


def new_folder(root: Path, name: str) -> Path:
    """A new, empty run folder below `root`, which is made if need be; ours until `LOCK` is removed.

    Its name has the time, `name` made fit for a file system, and something random: any number of
    processes may call this at once.

    Raises:
        OSError: it cannot be written there.
    """
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    slug = re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.")[:40] or "run"
    token = secrets.token_hex(3)
    folder = root / f"{time.strftime('%Y%m%d-%H%M%S')}-{slug}-{token}"
    # Filled before it has its name: nobody's `prune` can see it without its lock.
    new = root / f"{_HALF_DONE[0]}{token}{secrets.token_hex(5)}"
    new.mkdir(mode=0o700)
    try:
        owner = {"pid": os.getpid(), "started": _process_start(os.getpid()), "host": socket.gethostname()}
        (new / LOCK).write_text(json.dumps(owner), encoding="utf-8")
        new.rename(folder)
    except OSError:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return folder


def recent(root: Path, limit: int | None = None) -> list[RunRecord]:
    """The runs below `root`, the newest first; at most `limit`."""
    return [_record(folder) for folder in _folders(root)[:limit]]


def prune(root: Path, *, keep: int = 50, max_bytes: int = 2 << 30) -> list[Path]:
    """Delete the oldest run folders until `keep` are left that take no more than `max_bytes`.

    The newest is always kept, and so is every run of a process that lives, in this kernel or another.
    Only folders that are named and filled like ours are touched. Call it off the launch's path: it looks at
    every file.

    Returns: the folders that were deleted.
    """
    total, gone = 0, []
    for index, folder in enumerate(_folders(root)):
        total += _size(folder)
        if index == 0 or (index < keep and total <= max_bytes) or _is_live(folder):
            continue
        if _delete(root, folder):
            gone.append(folder)
    _sweep(root)
    return gone


def _text(path: Path) -> str:
    """The file's text; empty when there is none to read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _folders(root: Path) -> list[Path]:
    """The run folders below `root`, the newest first."""
    found: list[tuple[str, float, Path]] = []
    for entry in _entries(root):
        match = _NAME.fullmatch(entry.name)
        if match and entry.is_dir(follow_symlinks=False):
            folder = Path(entry.path)
            if any((folder / name).exists() for name in _OURS):
                found.append((match["stamp"], _modified(folder), folder))
    return [folder for *_, folder in sorted(found, reverse=True)]


def _entries(root: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(root) as entries:
            yield from entries
    except OSError:
        return  # there is no such folder, or none of ours


def fate(folder: Path) -> Fate:
    """How the run of a folder ended, or that it goes on."""
    written = _WRITTEN.get(str(_json(folder / "result.json").get("state")))
    return written or ("running" if _is_live(folder) else "lost")


def _record(folder: Path) -> RunRecord:
    match = _NAME.fullmatch(folder.name)
    assert match is not None  # _folders has seen to it
    run, result = _json(folder / "run.json"), _json(folder / "result.json")
    started, duration = result.get("started"), result.get("duration")
    if not isinstance(started, (int, float)):
        started = time.mktime(time.strptime(match["stamp"], "%Y%m%d-%H%M%S"))
    return RunRecord(
        folder=folder,
        name=str(run.get("name") or match["name"]),
        started=started,
        state=fate(folder),
        duration=duration if isinstance(duration, (int, float)) else None,
    )


def _json(path: Path) -> dict[str, object]:
    try:
        value = json.loads(_text(path) or "{}")
    except ValueError:
        return {}  # cut short by a full disk
    return value if isinstance(value, dict) else {}


def _is_live(folder: Path) -> bool:
    """Whether the process the run belongs to may still be writing."""
    if not (folder / LOCK).exists():
        return False
    owner = _json(folder / LOCK)
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or not isinstance(pid, int):
        # Another machine on the same home folder: its processes cannot be seen from here.
        return time.time() - _modified(folder) < _WEEK
    return _exists(pid) and owner.get("started") in (None, _process_start(pid))


def _modified(folder: Path) -> float:
    try:
        return max([folder.stat().st_mtime, *(entry.stat().st_mtime for entry in _entries(folder))])
    except OSError:
        return 0.0  # deleted by another process just now


def _size(folder: Path) -> int:
    total = 0
    for entry in _entries(folder):
        try:
            total += entry.stat(follow_symlinks=False).st_size
        except OSError:
            continue  # deleted by another process just now
    return total


def _delete(root: Path, folder: Path) -> bool:
    """Rename first, which one of several pruning processes wins, then delete."""
    gone = root / f"{_HALF_DONE[1]}{folder.name}"
    try:
        folder.rename(gone)
    except OSError:
        return False
    shutil.rmtree(gone, ignore_errors=True)
    return True


def _sweep(root: Path) -> None:
    """Delete what a process left that was killed while making or deleting a folder."""
    for entry in list(_entries(root)):
        unfinished = entry.name.startswith(_HALF_DONE) and entry.is_dir(follow_symlinks=False)
        if unfinished and time.time() - _modified(Path(entry.path)) > 3600:
            shutil.rmtree(entry.path, ignore_errors=True)


def _exists(pid: int) -> bool:
    if sys.platform == "win32":
        return _process_start(pid) is not None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True


def _process_start(pid: int) -> int | None:
    """When a process started, in the system's own units: with the pid it names one process for good.
    None when there is no such process, or the platform does not say (macOS, without a subprocess)."""
    if sys.platform == "win32":
        return _windows_process_start(pid)
    # proc(5): the 22nd field; the second, the name, may hold anything, and ends at the last ")".
    after_name = _text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return int(after_name[19]) if len(after_name) > 19 and after_name[0] != "Z" else None


if sys.platform == "win32":

    def _windows_process_start(pid: int) -> int | None:
        import ctypes

        kernel32 = ctypes.windll.kernel32
        kernel32.OpenProcess.restype = ctypes.c_void_p
        handle = ctypes.c_void_p(kernel32.OpenProcess(0x1000, False, pid))  # QUERY_LIMITED_INFORMATION
        if not handle:
            return None
        try:
            created, ended, *others = (ctypes.c_ulonglong() for _ in range(4))
            if not kernel32.GetProcessTimes(handle, *map(ctypes.byref, (created, ended, *others))):
                return None
            return None if ended.value else created.value
        finally:
            kernel32.CloseHandle(handle)
