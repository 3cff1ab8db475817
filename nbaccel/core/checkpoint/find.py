"""Names of checkpoints: which are there, which is the newest complete one, which may go.

A save fills a hidden folder beside its target and renames it when it is complete:

    checkpoint_7                                   complete, or damaged by somebody else
    .checkpoint_8.partial-<host>-<pid>-<nonce>     being written, or left by a writer that died
    .checkpoint_7.old-<host>-<pid>-<nonce>         what checkpoint_7 was, while it is being replaced

What others put into a checkpoint (a tokenizer, notes, checkpoints) is not in its manifest and moves on to the one that
replaces it.
"""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from nbaccel.core.checkpoint.filesystem import FileSystem
from nbaccel.core.checkpoint.manifest import MANIFEST, Manifest, check_sizes, read_manifest
from nbaccel.errors import CheckpointError

__all__ = [
    "Candidate",
    "Found",
    "candidates",
    "hidden_name",
    "next_folder",
    "prune",
    "remove_leftovers",
    "resolve",
    "retire",
]

_HIDDEN = re.compile(
    r"^\.(?P<name>.+)\.(?P<kind>partial|old)-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-(?P<nonce>[0-9a-f]+)$"
)
_NUMBERED = re.compile(r"^(?P<family>.*?)(?P<number>\d+)$")
_OURS = re.compile(
    r"^(manifest\.json(\.new)?|index\.json|(shared|rank-\d{5})(-\d+\.pt|\.json|\.safetensors)|shards-\d{5}\.safetensors)$"
)
_DISTINCTIVE = re.compile(r"^(shared\.json|rank-\d{5}\.json|shards-\d{5}\.safetensors)$")
_FORGOTTEN = 6 * 3600.0
"""Seconds after which an unfinished folder of another machine is taken for abandoned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A folder that is or might have been a checkpoint."""

    path: Path
    manifest: Manifest | None
    problem: str
    """Why it cannot be used; empty when every file is there in full length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The newest complete checkpoint (None: there is none), and those passed over with the reason."""

    path: Path | None
    skipped: tuple[tuple[Path, str], ...] = ()


def hidden_name(target: Path, kind: str, nonce: str) -> Path:
    """A hidden sibling of `target` that tells which process it belongs to."""
    return target.with_name(f".{target.name}.{kind}-{_host()}-{os.getpid()}-{nonce}")


def candidates(project_dir: Path, filesystem: FileSystem) -> list[Candidate]:
    """Everything in the folder that looks like a checkpoint: complete ones first, newest first."""
    found = []
    for name in filesystem.names(project_dir):
        path = project_dir / name
        if name.startswith(".") and not _HIDDEN.match(name):
            continue
        if filesystem.is_folder(path) and is_ours(path, filesystem):
            found.append(examine(path, filesystem))
    return sorted(
        found, key=lambda c: (c.problem == "", c.manifest.saved_at if c.manifest else 0.0), reverse=True
    )


def examine(path: Path, filesystem: FileSystem) -> Candidate:
    """One folder: its manifest, and whether every file is there in full length."""
    manifest = None
    try:
        manifest = read_manifest(path, filesystem)
        check_sizes(path, manifest, filesystem)
    except CheckpointError as error:
        return Candidate(path=path, manifest=manifest, problem=str(error))
    return Candidate(path=path, manifest=manifest, problem="")


def is_ours(path: Path, filesystem: FileSystem) -> bool:
    """Whether a folder is a checkpoint or the remains of one: safe to replace."""
    names = filesystem.names(path)
    if _HIDDEN.match(path.name) or any(_DISTINCTIVE.match(name) for name in names):
        return True
    return bool(names) and all(_OURS.match(name) for name in names)


def resolve(folder: Path, filesystem: FileSystem) -> Path:
    """`folder`, or, where its replacing was cut short, the complete hidden folder that stands for it.

    Raises:
        CheckpointError: neither is complete; says what is wrong with `folder`.
    """
    own = examine(folder, filesystem)
    if not own.problem:
        return folder
    complete = [
        candidate
        for candidate in candidates(folder.parent, filesystem)
        if not candidate.problem and (m := _HIDDEN.match(candidate.path.name)) and m["name"] == folder.name
    ]
    if complete:
        return complete[0].path
    raise CheckpointError(own.problem)


def next_folder(project_dir: Path, filesystem: FileSystem, family: str = "checkpoint_") -> Path:
    """The name the next automatic save gets: one more than the highest number there, finished or not."""
    numbers = [-1]
    for name in filesystem.names(project_dir):
        hidden = _HIDDEN.match(name)
        match = _NUMBERED.match(hidden["name"] if hidden else name)
        if match and match["family"] == family:
            numbers.append(int(match["number"]))
    return project_dir / f"{family}{max(numbers) + 1}"


def prune(newest: Path, keep: int, filesystem: FileSystem) -> list[Path]:
    """Deletes the oldest complete checkpoints beside `newest` until `keep` are left, itself among them.

    Only folders numbered like it (`checkpoint_12` goes with `checkpoint_7`, never with `best`).
    """
    match = _NUMBERED.match(newest.name)
    if match is None:
        return []
    siblings = [
        candidate.path
        for candidate in candidates(newest.parent, filesystem)
        if not candidate.problem
        and candidate.path != newest
        and (m := _NUMBERED.match(candidate.path.name)) is not None
        and m["family"] == match["family"]
    ]
    gone = siblings[keep - 1 :]
    for path in gone:
        # The manifest goes first: half a deleted checkpoint must not look like one.
        filesystem.remove(path / MANIFEST)
        filesystem.sync_folder(path)
        filesystem.remove(path)
    return gone


def retire(old: Path, target: Path, filesystem: FileSystem) -> bool:
    """Deletes a replaced checkpoint, when what others had put into it lies in `target`, which stands in its place.

    Returns False, and leaves it, where there are such things and no `target`.
    """
    strangers = list(_strangers(old, _own_names(old, filesystem), filesystem))
    if strangers and not filesystem.is_folder(target):
        return False
    for name in strangers:
        _move(old / name, target / name, filesystem)
    if strangers:
        filesystem.sync_folder(target)
    filesystem.remove(old)
    return True


def _own_names(folder: Path, filesystem: FileSystem) -> frozenset[str]:
    """The checkpoint's own files, relative: those its manifest lists, or that are named like ours where it has none."""
    try:
        manifest = read_manifest(folder, filesystem)
    except CheckpointError:
        return frozenset(name for name in filesystem.names(folder) if _OURS.match(name))
    return frozenset((MANIFEST, *(record.name for record in manifest.files)))


def _strangers(folder: Path, own: Collection[str], filesystem: FileSystem, below: str = "") -> Iterator[str]:
    """What else is there, relative; a folder that holds nothing of the checkpoint's as a whole."""
    for name in filesystem.names(folder / below):
        relative = f"{below}{name}"
        if any(one.startswith(f"{relative}/") for one in own):
            yield from _strangers(folder, own, filesystem, f"{relative}/")
        elif relative not in own:
            yield relative


def _move(source: Path, target: Path, filesystem: FileSystem) -> None:
    """Gives it its new place; where the new checkpoint has a file of that name, that one stays."""
    if target.name not in filesystem.names(target.parent):
        filesystem.make_folder(target.parent)
        filesystem.rename(source, target)
    elif filesystem.is_folder(source) and filesystem.is_folder(target):
        for name in filesystem.names(source):
            _move(source / name, target / name, filesystem)


def remove_leftovers(
    parent: Path, filesystem: FileSystem, *, complete: bool, age: float = _FORGOTTEN
) -> list[Path]:
    """Deletes hidden folders whose writer is gone.

    Args:
        complete: also those with a manifest, which may be the newest state there is: only to be asked for
            when a newer checkpoint is complete.
        age: seconds after which a folder of another machine counts as abandoned.
    """
    gone = []
    for name in filesystem.names(parent):
        match, path = _HIDDEN.match(name), parent / name
        if match is None or (not complete and MANIFEST in filesystem.names(path)):
            continue
        here = match["host"] == _host()
        if _alive(int(match["pid"])) if here else filesystem.age(path) <= age:
            continue
        if match["kind"] == "partial":
            filesystem.remove(path)
        elif not retire(path, parent / match["name"], filesystem):
            continue
        gone.append(path)
    return gone


def _host() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
