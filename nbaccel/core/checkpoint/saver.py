"""`Checkpoints`: saving and loading for one world, at once or in the background.

A save in the background blocks training only while the state is copied into buffers that are kept from
save to save. The buffer of a rank has the very layout of the file it writes, and holds only the pieces
this rank writes, so that with N replicas each copies an N-th. Writing and agreeing then happen on a
thread and a gloo group of their own.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from nbaccel.core.checkpoint.contents import Contents, HasEntries, HasState, Sharded, Stateful
from nbaccel.core.checkpoint.crew import Crew, describe_error
from nbaccel.core.checkpoint.filesystem import FileSystem, LocalFileSystem
from nbaccel.core.checkpoint.find import Found, hidden_name, remove_leftovers
from nbaccel.core.checkpoint.reader import Loaded, find_newest, load
from nbaccel.core.checkpoint.shards import Plan, make_plan, sources
from nbaccel.core.checkpoint.staging import Buffer, State, gather_state
from nbaccel.core.checkpoint.writer import Job, check_target, discard, free_bytes, space_problem, write
from nbaccel.core.world import World
from nbaccel.errors import CheckpointError, ConfigError
from nbaccel.wire import occasions

__all__ = ["Checkpoints", "SaveReport"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveReport:
    """How a finished save went on this rank."""

    path: Path
    num_bytes: int
    """What this rank wrote of models, optimizers and small states."""
    blocked: float
    """Seconds the caller waited."""
    total: float
    """Seconds until the checkpoint was complete."""


def _size(state: State, plan: Plan) -> int:
    """Bytes this rank will write."""
    return state.num_bytes + plan.layout.num_bytes + len(plan.index)


@final
class Checkpoints:
    """Saves and loads checkpoints of one world. All methods but `pending` are called by all ranks together."""

    def __init__(self, *, world: World, filesystem: FileSystem | None = None) -> None:
        self._world = world
        self._filesystem = filesystem or LocalFileSystem()
        self._crew: Crew | None = None
        self._plan: tuple[Any, Plan] | None = None
        self._buffer: Buffer | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._last: SaveReport | None = None
        occasions.at_call_end(self.wait)  # a rank's call that fails to save has failed

    @property
    def pending(self) -> bool:
        """Whether a save is still being written in the background."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def last(self) -> SaveReport | None:
        """The last save that became complete."""
        return self._last

    def save(
        self,
        folder: str | Path,
        contents: Contents[HasEntries, HasState],
        *,
        step: int,
        keep: int | None = None,
        asynchronous: bool = False,
    ) -> Path:
        """Saves `contents` as the checkpoint `folder`; where one stands already it is replaced at the end.

        Args:
            folder: the same on all ranks, on a file system they share.
            step: optimizer steps taken.
            keep: how many complete checkpoints of this numbering to leave, this one included.
            asynchronous: return when the state has been copied; `wait` or the next save reports a failure.

        Raises:
            CheckpointError: on every rank, when it failed on any; or when the previous background save had.
            ConfigError: `keep` is below 1.
        """
        if keep is not None and keep < 1:
            raise ConfigError(f"keep={keep} would leave no checkpoint; it must be at least 1")
        self.wait()
        start = time.perf_counter()
        crew = self._ranks()
        target = Path(os.path.abspath(folder))
        partial = self._begin(target, crew)
        state = self._gather(target, partial, contents, asynchronous, crew)
        job = self._job(target, partial, state, contents, step, keep, crew)
        if not asynchronous:
            write(job, crew, self._filesystem)
            self._note(job, start, time.perf_counter())
            return target
        failed = self._stage(job)
        if self._buffer is not None and failed is None:
            job = replace(job, piece=self._buffer.views.__getitem__)
        blocked_until = time.perf_counter()
        # Not a daemon: a script that ends right after saving still gets its checkpoint.
        self._thread = threading.Thread(
            target=self._write_behind,
            args=(job, crew, failed, start, blocked_until),
            name="nbaccel-checkpoint",
        )
        self._thread.start()
        atexit.register(self._tell_at_exit)
        return target

    def wait(self) -> None:
        """Returns when nothing is being written any more.

        Raises:
            CheckpointError: the save in the background failed. Said once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            atexit.unregister(self._tell_at_exit)
        failure, self._failure = self._failure, None
        if failure is not None:
            raise CheckpointError(str(failure)) from failure

    def _tell_at_exit(self) -> None:
        # The interpreter has joined the thread by now; nobody is left to raise to.
        try:
            self.wait()
        except CheckpointError as error:
            sys.stderr.write(
                f"rank {self._world.rank}: the last save in the background failed: {error}\n"
                "Call accelerator.end_training() at the end of the script: it waits for it and raises.\n"
            )

    def load(
        self,
        folder: str | Path,
        contents: Contents[Sharded, Stateful],
        *,
        verify: bool = True,
        allow_pickle: bool = False,
        strict: bool = True,
    ) -> Loaded:
        """Loads a checkpoint, made by any number of ranks, into `contents`. See `reader.load`."""
        self.wait()
        return load(
            Path(os.path.abspath(folder)),
            contents,
            self._ranks(),
            self._filesystem,
            verify=verify,
            allow_pickle=allow_pickle,
            strict=strict,
        )

    def newest_complete(self, project_dir: str | Path) -> Found:
        """The newest complete and undamaged checkpoint of a folder, and which were passed over and why."""
        self.wait()
        return find_newest(Path(os.path.abspath(project_dir)), self._ranks(), self._filesystem)

    def close(self) -> None:
        """Waits for the save in the background and gives the group and the buffers back. Raises like `wait`."""
        try:
            self.wait()
        finally:
            crew, self._crew = self._crew, None
            self._plan = self._buffer = None
            if crew is not None:
                crew.close()

    def _ranks(self) -> Crew:
        # Made at the first use: a run that never saves needs no second group.
        if self._crew is None:
            self._crew = Crew(self._world)
        return self._crew

    def _begin(self, target: Path, crew: Crew) -> Path:
        """The hidden folder to fill, on every rank."""
        partial, problem = Path(), ""
        if crew.rank == 0:
            partial = hidden_name(target, "partial", os.urandom(4).hex())
            try:
                check_target(target, self._filesystem)
                # What killed runs left unfinished is no use to anyone and may be the space we need.
                remove_leftovers(target.parent, self._filesystem, complete=False)
                self._filesystem.make_folder(partial)
            except (OSError, CheckpointError) as error:
                problem = str(error)
        partial, problem = crew.share((partial, problem))
        if problem:
            raise CheckpointError(f"cannot save {target}: {problem}")
        return partial

    def _gather(
        self,
        target: Path,
        partial: Path,
        contents: Contents[HasEntries, HasState],
        copy: bool,
        crew: Crew,
    ) -> State:
        """Everything to write, planned and known to fit on every rank; else the hidden folder is gone."""
        state, error = None, None
        try:
            state = gather_state(contents, partial, crew.rank, copy=copy)
        except Exception as caught:  # noqa: BLE001 - a hook's or a state_dict's; every rank must hear of it
            error = caught
        try:
            self._agree(target, state, error, crew)
        except CheckpointError:
            if crew.rank == 0:
                discard(partial, self._filesystem)
            raise
        assert state is not None
        return state

    def _agree(self, target: Path, state: State | None, error: BaseException | None, crew: Crew) -> None:
        """Plans anew if some rank's tensors are others than last time; one round of talk if none are."""
        kept = self._plan[1] if self._plan and state and self._plan[0] == state.fingerprint else None
        size = _size(state, kept) if state and kept else None
        free = free_bytes(target.parent, self._filesystem) if crew.rank == 0 else 0
        answers = crew.gather((None if error is None else describe_error(error), size, free))
        failed = [f"rank {rank}: {text}" for rank, (text, _, _) in enumerate(answers) if text is not None]
        if failed or state is None:
            raise CheckpointError(
                f"gathering the state for {target} failed on {'; '.join(failed)}"
            ) from error
        sizes = [size for _, size, _ in answers if size is not None]
        if len(sizes) < crew.size:
            plan = make_plan(state.tensors, state.aliases, state.of_rank_zero, crew)
            self._plan, self._buffer = (state.fingerprint, plan), None
            sizes = crew.gather(_size(state, plan))
        problem = space_problem(target.parent, sum(sizes), answers[0][2])
        if problem:
            raise CheckpointError(problem)

    def _job(
        self,
        target: Path,
        partial: Path,
        state: State,
        contents: Contents[HasEntries, HasState],
        step: int,
        keep: int | None,
        crew: Crew,
    ) -> Job:
        assert self._plan is not None
        plan = self._plan[1]
        return Job(
            target=target,
            partial=partial,
            step=step,
            keep=keep,
            plan=plan,
            piece=sources(plan, state.tensors, crew).__getitem__,
            shared=state.shared,
            own=state.own,
            extra=contents.extra,
        )

    def _stage(self, job: Job) -> BaseException | None:
        """Copies this rank's pieces into the kept buffer; an error is for the background to tell all ranks."""
        try:
            pieces = {name: job.piece(name) for name in job.plan.items}
            if self._buffer is None:
                pinned = any(piece.is_cuda for piece in pieces.values())
                self._buffer = Buffer(job.plan, pinned=pinned)
            self._buffer.fill(pieces)
        except (RuntimeError, MemoryError) as error:
            return error
        return None

    def _write_behind(
        self, job: Job, crew: Crew, failed: BaseException | None, start: float, blocked_until: float
    ) -> None:
        # Gives the interpreter back at once: the caller, still inside start(), must not wait for our first work.
        time.sleep(0)
        try:
            write(job, crew, self._filesystem, failed)
            self._note(job, start, blocked_until)
        except BaseException as error:  # noqa: BLE001 - `wait` raises it in the caller's thread
            self._failure = error

    def _note(self, job: Job, start: float, blocked_until: float) -> None:
        self._last = SaveReport(
            path=job.target,
            num_bytes=job.num_bytes,
            blocked=blocked_until - start,
            total=time.perf_counter() - start,
        )
