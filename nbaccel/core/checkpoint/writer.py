"""From a gathered state to a complete checkpoint: every rank writes its files, rank 0 makes them count.

Order of events, so that a crash at any moment leaves a complete earlier state or the new one:
each rank writes and syncs its files in a hidden folder · rank 0 writes the manifest and syncs · renames
the hidden folder · syncs the parent · only then moves over what others had put into the one it replaces, and
deletes older ones · all ranks learn the outcome.
"""

from __future__ import annotations

import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nbaccel import __version__
from nbaccel.core.checkpoint.crew import Crew, describe_error
from nbaccel.core.checkpoint.files import layout_of, write_file, write_tensors
from nbaccel.core.checkpoint.filesystem import FileSystem
from nbaccel.core.checkpoint.find import hidden_name, is_ours, prune, remove_leftovers, retire
from nbaccel.core.checkpoint.manifest import MANIFEST, FileRecord, Manifest, describe
from nbaccel.core.checkpoint.shards import INDEX, Plan, shard_file
from nbaccel.core.checkpoint.small import Packed
from nbaccel.errors import CheckpointError

__all__ = ["Job", "check_target", "discard", "free_bytes", "space_problem", "write"]

_SPARE = 1 << 20
"""Bytes asked for beyond the files themselves: manifest, folders, the file system's own records."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One save, gathered and placed; nothing in it changes while training goes on."""

    target: Path
    partial: Path
    step: int
    keep: int | None
    plan: Plan
    piece: Callable[[str], torch.Tensor]
    """Gives a planned piece by name."""
    shared: Packed | None
    """On rank 0."""
    own: Packed
    extra: Mapping[str, Any]

    @property
    def num_bytes(self) -> int:
        """What this rank will write."""
        small = self.own.num_bytes + (self.shared.num_bytes if self.shared else 0)
        return self.plan.layout.num_bytes + len(self.plan.index) + small


def check_target(target: Path, filesystem: FileSystem) -> None:
    """Refuses to replace what is not a checkpoint.

    Raises:
        CheckpointError: the folder holds somebody's files.
    """
    if filesystem.names(target) and not is_ours(target, filesystem):
        raise CheckpointError(
            f"{target} exists and is not a checkpoint; saving would replace it. Choose another folder."
        )


def free_bytes(parent: Path, filesystem: FileSystem) -> int:
    """Free space, or what lets a save begin where the file system does not tell it."""
    try:
        return filesystem.free_bytes(parent)
    except OSError:
        return sys.maxsize


def space_problem(parent: Path, needed: int, free: int) -> str:
    """What to say when `needed` bytes do not fit; empty when they do."""
    if free >= needed + _SPARE:
        return ""
    return (
        f"not enough space in {parent}: the checkpoint takes {_amount(needed)}, {_amount(free)} are free. "
        "Nothing was written and earlier checkpoints are untouched. Free some space, or keep fewer (keep=)."
    )


def _amount(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def write(job: Job, crew: Crew, filesystem: FileSystem, failed: BaseException | None = None) -> None:
    """Writes `job` together with all ranks; returns when the checkpoint is complete.

    Args:
        failed: what already went wrong on this rank; the others are told.

    Raises:
        CheckpointError: on every rank, naming the ranks where it failed. The unfinished folder is gone.
    """
    records: list[FileRecord] = []
    error = failed
    if error is None:
        try:
            records = _write_own(job, crew.rank, filesystem)
        except (OSError, RuntimeError, MemoryError, ValueError) as caught:
            error = caught
    answers = crew.gather((None if error is None else describe_error(error), records))
    problems = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(answers) if text is not None]
    outcome = "; ".join(problems)
    if crew.rank == 0:
        if not outcome:
            outcome = _commit_or_say(
                job, [record for _, rs in answers for record in rs], crew.size, filesystem
            )
        if outcome:
            discard(job.partial, filesystem)
    outcome = crew.share(outcome)
    if outcome:
        raise CheckpointError(
            f"saving {job.target} failed on {outcome}. Earlier checkpoints are untouched."
        ) from error


def _write_own(job: Job, rank: int, filesystem: FileSystem) -> list[FileRecord]:
    folder = job.partial
    records = []
    if job.plan.layout.order:
        records.append(write_tensors(folder, shard_file(rank), job.plan.layout, job.piece, filesystem))
    records += _write_packed(folder, f"rank-{rank:05d}", job.own, filesystem)
    if job.shared is not None:
        records += _write_packed(folder, "shared", job.shared, filesystem)
        records.append(write_file(folder, INDEX, [job.plan.index], filesystem))
    return records


def _write_packed(folder: Path, name: str, packed: Packed, filesystem: FileSystem) -> list[FileRecord]:
    records = [write_file(folder, f"{name}.json", [packed.document], filesystem)]
    if packed.tensors:
        tensors = packed.tensors
        layout = layout_of(tensors)
        records.append(write_tensors(folder, f"{name}.safetensors", layout, tensors.__getitem__, filesystem))
    for file, data in packed.pickles.items():
        records.append(write_file(folder, file, [data], filesystem))
    return records


def _commit_or_say(job: Job, records: list[FileRecord], world_size: int, filesystem: FileSystem) -> str:
    """Makes the folder a checkpoint; "" when that worked, else what went wrong."""
    try:
        replaced = _commit(job, records, world_size, filesystem)
    except (OSError, ValueError, CheckpointError) as error:
        return f"rank 0: {describe_error(error)}"
    try:
        if replaced is not None:
            retire(replaced, job.target, filesystem)
        if job.keep is not None:
            prune(job.target, job.keep, filesystem)
        remove_leftovers(job.target.parent, filesystem, complete=True)
    except OSError as error:
        warnings.warn(
            f"{job.target} is complete, but older ones could not be deleted, or what others had put into the "
            f"one it replaces not be moved: {error}",
            stacklevel=2,
        )
    return ""


def _commit(job: Job, records: list[FileRecord], world_size: int, filesystem: FileSystem) -> Path | None:
    """Completes the hidden folder and puts it in place; what it replaced, hidden, is returned."""
    for record in records:
        if filesystem.size(job.partial / record.name) != record.num_bytes:
            raise CheckpointError(
                f"{record.name}, written by another rank, is not seen in full by rank 0: all ranks must save "
                "to one shared folder"
            )
    records = records + _foreign_files(job.partial, {record.name for record in records}, filesystem)
    manifest = Manifest(
        step=job.step,
        world_size=world_size,
        saved_at=time.time(),
        versions={"nbaccel": __version__, "torch": torch.__version__, "python": platform.python_version()},
        files=tuple(sorted(records, key=lambda record: record.name)),
        extra=job.extra,
    )
    write_file(job.partial, f"{MANIFEST}.new", [manifest.to_json()], filesystem)
    filesystem.sync_folder(job.partial)
    filesystem.rename(job.partial / f"{MANIFEST}.new", job.partial / MANIFEST)
    filesystem.sync_folder(job.partial)
    return _put_in_place(job, filesystem)


def _put_in_place(job: Job, filesystem: FileSystem) -> Path | None:
    """Renames the complete hidden folder; what it replaces stays complete beside it, and is returned."""
    parent = job.target.parent
    old = None
    if filesystem.is_folder(job.target):
        old = hidden_name(job.target, "old", os.urandom(4).hex())
        filesystem.rename(job.target, old)
    try:
        filesystem.rename(job.partial, job.target)
    except OSError:
        if old is not None and not filesystem.is_folder(job.target):
            filesystem.rename(old, job.target)
        raise
    filesystem.sync_folder(parent)
    return old


def _foreign_files(
    folder: Path, known: set[str], filesystem: FileSystem, below: str = ""
) -> list[FileRecord]:
    """Records of what pre-hooks wrote into the folder; synced here, since they may not have been."""
    records = []
    for name in filesystem.names(folder / below):
        relative = f"{below}{name}"
        if filesystem.is_folder(folder / relative):
            records += _foreign_files(folder, known, filesystem, f"{relative}/")
        elif relative not in known:
            with filesystem.open(folder / relative) as handle:
                filesystem.sync_file(handle)
            records.append(describe(folder / relative, relative, filesystem))
    if below:
        filesystem.sync_folder(folder / below)
    return records


def discard(partial: Path, filesystem: FileSystem) -> None:
    """Deletes an unfinished folder; what cannot be deleted is said and left."""
    try:
        filesystem.remove(partial)
    except OSError as error:
        warnings.warn(f"the unfinished {partial} could not be deleted: {error}", stacklevel=2)
