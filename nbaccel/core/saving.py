"""Everything a run saves, and how it goes on from it."""

from __future__ import annotations

import contextlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from nbaccel.core.checkpoint import (
    Checkpoints,
    Contents,
    Found,
    Loaded,
    LocalFileSystem,
    Sharded,
    Stateful,
    next_folder,
)
from nbaccel.core.checkpoint.find import candidates, resolve
from nbaccel.core.comm.collectives import broadcast_object_list, gather_object
from nbaccel.core.data import ShardedLoader
from nbaccel.core.loop.knobs import Knobs
from nbaccel.core.loop.loop import Loop
from nbaccel.core.rng import RngState
from nbaccel.core.world import World
from nbaccel.core.zero.universal import convert
from nbaccel.errors import CheckpointError, ConfigError

__all__ = ["Saving"]

Hook = Callable[..., Any]

_LOADER = "loader_"  # with its number: the name of a loader's state


@final
class _Counters:
    """The optimizer steps of the run and the knobs that were turned, as something that is saved."""

    def __init__(self, loop: Loop, knobs: Knobs, loaders: Sequence[ShardedLoader]) -> None:
        self._loop, self._knobs, self._loaders = loop, knobs, loaders

    def state_dict(self) -> dict[str, Any]:
        loop = self._loop
        place = loop.resuming.place(self._loaders, loop.loaders, loop.steps)
        return {"steps": loop.steps, "knobs": self._knobs.state(), **place}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        self._loop.steps = int(state_dict["steps"])
        self._loop.resuming.load_place(state_dict)
        self._knobs.turn(state_dict.get("knobs", {}).items(), self._loop.steps)


@final
class _Kept:
    """A state that is saved again as it was loaded."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._state = state

    def state_dict(self) -> Mapping[str, Any]:
        return self._state

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        self._state = state_dict


@final
class Saving:
    """Saves and loads all that was prepared and registered, in the order it was.

    Args:
        keep: how many checkpoints of the project to keep.
        resume: "auto" or a folder: where the first pass over a loader goes on from.
    """

    def __init__(
        self,
        world: World,
        loop: Loop,
        knobs: Knobs,
        *,
        project_dir: str | None,
        keep: int | None,
        resume: str | None,
    ) -> None:
        self._world, self._loop, self._knobs, self._keep = world, loop, knobs, keep
        self.project_dir = None if project_dir is None else Path(project_dir)
        self.models: list[nn.Module] = loop.models
        self.optimizers: list[torch.optim.Optimizer] = []
        self.schedulers: list[Stateful] = []
        self.loaders: list[ShardedLoader] = []
        self.registered: list[Stateful] = []
        self._before_saving: OrderedDict[int, Hook] = OrderedDict()
        self._before_loading: OrderedDict[int, Hook] = OrderedDict()
        self._checkpoints = Checkpoints(world=world)
        self._unanswered = 0  # batches since a save was asked for that nothing has made
        self._resume_from = resume
        if resume is not None:
            _check_resume(resume, project_dir, world)
        loop.before_pass = self._resume_once
        loop.before_batch = self._save_if_possible

    def expect_resume(self, optimizer: torch.optim.Optimizer) -> None:
        """Says at its first step if nothing was resumed although it was asked: no prepared loader has begun a pass."""
        if self._resume_from is None or not self._world.is_main:
            return

        said = False

        def say(*_: Any) -> None:
            # It stays: torch goes through its hooks while it calls them.
            nonlocal said
            if said:
                return
            said = True
            if self._resume_from is None or (self._resume_from == "auto" and not self._holds_any()):
                return
            warnings.warn(
                f"resume={self._resume_from!r} was asked, and the optimizer steps with nothing resumed: that is done "
                "where a prepared loader begins its first pass. Prepare the loader, or call "
                "accelerator.load_state(...) before the loop",
                stacklevel=2,
            )

        optimizer.register_step_pre_hook(say)

    def _holds_any(self) -> bool:
        project = self.project_dir
        return project is not None and any(not c.problem for c in candidates(project, LocalFileSystem()))

    def register(self, objects: Sequence[Any]) -> None:
        """Saves these too.

        Raises:
            ConfigError: one of them has no state_dict and load_state_dict.
        """
        for one in objects:
            if not all(callable(getattr(one, name, None)) for name in ("state_dict", "load_state_dict")):
                raise ConfigError(
                    f"a {type(one).__name__} cannot be registered for checkpointing: it needs the methods "
                    "state_dict() and load_state_dict(state)"
                )
        self.registered.extend(objects)

    def before_saving(self, hook: Hook) -> RemovableHandle:
        """Calls `hook(models, weights, folder)` before each save."""
        return _registered(self._before_saving, hook)

    def before_loading(self, hook: Hook) -> RemovableHandle:
        """Calls `hook(models, folder)` before each load."""
        return _registered(self._before_loading, hook)

    def save(self, folder: str | Path | None, *, asynchronous: bool) -> Path:
        """Saves into `folder`, or into the project's next checkpoint folder.

        Raises:
            ConfigError: no folder and no project_dir; or in the middle of an accumulation window.
            CheckpointError: it could not be written.
        """
        window, watch, control = self._loop.unfinished, self._loop.stopwatch, self._loop.control
        if window is not None:
            raise ConfigError(
                f"save_state in the middle of an accumulation window (micro-step {window.micro + 1} of "
                f"{window.length}) would lose its gradients; save when accelerator.sync_gradients is True. A loop that "
                "was left in mid-window can be gone on with for the micro-steps that lack; leave it (break) where "
                "accelerator.sync_gradients is True"
            )
        self._loop.finish_scaler()
        with contextlib.nullcontext() if watch is None else watch.measure("checkpoint"):
            path = self._checkpoints.save(
                self._next() if folder is None else Path(folder),
                self._with_awaited(self._contents(self._hooked_save)),
                step=self._loop.steps,
                keep=self._keep if folder is None else None,
                asynchronous=asynchronous,
            )
        self._unanswered = 0
        if control is not None and control.saved() and self._world.is_main:
            print(f"saved {path} at optimizer step {self._loop.steps}", flush=True)
        return path

    def load(
        self,
        folder: str | Path | None,
        *,
        strict: bool = True,
        allow_pickle: bool = False,
        filled: Callable[[ShardedLoader], Stateful] | None = None,
    ) -> Loaded:
        """Loads `folder`, or the newest complete checkpoint of the project.

        A folder that DeepSpeed wrote itself is converted first, which is said; data and random state are not in it.

        Args:
            filled: what takes a loader's state in its place.

        Raises:
            CheckpointError: there is none, it is damaged, or it is of another model.
        """
        if folder is not None:
            return self._load(
                Path(folder), strict=strict, allow_pickle=allow_pickle, verify=True, filled=filled
            )
        found = self._newest()
        if found.path is None:
            raise CheckpointError(f"there is no complete checkpoint in {self._project()}{_skipped(found)}")
        return self._load(found.path, strict=strict, allow_pickle=allow_pickle, verify=False, filled=filled)

    def _load(
        self,
        folder: Path,
        *,
        strict: bool,
        allow_pickle: bool,
        verify: bool,
        filled: Callable[[ShardedLoader], Stateful] | None = None,
        later: tuple[str, ...] = (),
    ) -> Loaded:
        contents = replace(self._contents(self._hooked_load, filled), later=later)
        universal = self._universal(folder)
        if universal is None:
            loaded = self._checkpoints.load(
                folder, contents, strict=strict, allow_pickle=allow_pickle, verify=verify
            )
            if filled is None:
                self._loop.resuming.settle(self.loaders)
            return loaded
        loaded = self._checkpoints.load(universal, contents, strict=False)
        if self._world.is_main and loaded.untouched:
            print(
                f"not in it, and left as they are: {', '.join(name for name, _ in loaded.untouched)}",
                flush=True,
            )
        return loaded

    def _universal(self, folder: Path) -> Path | None:
        """What stands for a checkpoint that DeepSpeed wrote itself, converted by the main rank; None for ours."""
        found, problem = None, None
        if self._world.is_main:
            try:
                found = convert(folder)
            except CheckpointError as error:
                problem = error
        said = None if problem is None else str(problem)
        found, said = broadcast_object_list([(found, said)], world=self._world)[0]
        if said is not None:
            raise CheckpointError(said) from problem
        return found  # type: ignore[no-any-return]

    def _newest(self) -> Found:
        """The newest complete checkpoint of the project, every byte of it read and compared."""
        found = self._checkpoints.newest_complete(self._project())
        if found.path is not None and found.skipped and self._world.is_main:
            print(f"loading {found.path}{_skipped(found)}", flush=True)
        return found

    def _resume_once(self, _: ShardedLoader) -> None:
        if self._resume_from is not None:
            where, self._resume_from = self._resume_from, None
            self._resume(where)

    def _resume(self, where: str) -> None:
        """Goes on from folder `where`, or with "auto" from the newest complete checkpoint if there is one.

        The loop that follows is written as for a fresh run, so passes it has behind it give no batches.
        """
        folder: Path | None = Path(where)
        if where == "auto":
            folder = self._newest().path
            if folder is None:
                return
        assert folder is not None
        # A loop that prepares a loader per epoch has the first of them only.
        loaded = self._load(folder, strict=True, allow_pickle=False, verify=where != "auto", later=(_LOADER,))
        awaited = {int(name.removeprefix(_LOADER)): state for name, state in loaded.later.items()}
        self._loop.resuming.resume(self.loaders, awaited)
        if self._world.is_main:
            place = loaded.path if where != "auto" else self._project() / loaded.path.name
            behind = "; the passes it has behind it give no batches" if self._loop.resuming else ""
            if awaited:
                behind += f"; {len(awaited)} more loader(s) go on from their places when they are prepared"
            print(f"resumed from {place} at optimizer step {loaded.step}{behind}", flush=True)

    def _save_if_possible(self) -> None:
        if self.project_dir is not None:
            self.save(None, asynchronous=False)
            return
        # Asked from outside, with nowhere to put it: the loop may still do it itself, before its next batch.
        self._unanswered += 1
        if self._unanswered == 2 and self._world.is_main:
            warnings.warn(
                "a checkpoint was asked for, and there is nowhere to put it: make the Accelerator with "
                "project_dir=..., or call save_state(folder) where accelerator.save_requested is True",
                stacklevel=2,
            )

    def close(self) -> None:
        """Waits, and gives back what saving held."""
        self._checkpoints.close()

    def _project(self) -> Path:
        if self.project_dir is None:
            raise ConfigError("give a folder, or make the Accelerator with project_dir=...")
        return self.project_dir

    def _next(self) -> Path:
        project = self._project()
        named = next_folder(project, LocalFileSystem()) if self._world.is_main else None
        path = broadcast_object_list([named], world=self._world)[0]
        assert isinstance(path, Path)
        return path

    def _contents(
        self,
        hooked: Callable[[Path, dict[str, Sharded]], None],
        filled: Callable[[ShardedLoader], Stateful] | None = None,
    ) -> Contents[Sharded, Stateful]:
        shared: dict[str, Stateful] = {"counters": _Counters(self._loop, self._knobs, self.loaders)}
        per_rank: dict[str, Stateful] = {"rng": RngState(self._world.device)}
        if self._loop.scaler is not None:
            shared["scaler"] = self._loop.scaler
        for kind, items in (("scheduler", self.schedulers), ("registered", self.registered)):
            shared.update({f"{kind}_{index}": item for index, item in enumerate(items)})
        for index, loader in enumerate(self.loaders):
            held = per_rank if loader.state_scope == "rank" else shared
            held[f"{_LOADER}{index}"] = loader if filled is None else filled(loader)
        strategy = self._loop.strategy
        sharded = {_name_of(i): strategy.model_state(model) for i, model in enumerate(self.models)}
        for i, optimizer in enumerate(self.optimizers):
            sharded[f"optimizer_{i}"] = strategy.optimizer_state(optimizer, self.models)
        # `sharded` is read after the hooks, which may have taken models out.
        contents = Contents(sharded=sharded, shared=shared, per_rank=per_rank)
        return replace(contents, before=(lambda folder: hooked(folder, sharded),))

    def _with_awaited(self, contents: Contents[Sharded, Stateful]) -> Contents[Sharded, Stateful]:
        """With the places that loaders of a resumed run have not taken again yet."""
        shared, per_rank = dict(contents.shared), dict(contents.per_rank)
        for number, state in self._loop.resuming.awaited.items():
            (per_rank if state["per_rank"] else shared)[f"{_LOADER}{number}"] = _Kept(state)
        return replace(contents, shared=shared, per_rank=per_rank)

    def _hooked_save(self, folder: Path, sharded: dict[str, Sharded]) -> None:
        """Weights a hook has taken off its list it has saved itself."""
        if not self._before_saving:
            return
        weights = [model.state_dict() for model in self.models]
        left = list(weights)
        self._call(
            lambda hook: hook(list(self.models), left, str(folder)),
            self._before_saving,
            lambda: [i for i, one in enumerate(weights) if not any(one is kept for kept in left)],
            sharded,
        )

    def _hooked_load(self, folder: Path, sharded: dict[str, Sharded]) -> None:
        """Models a hook has taken off its list it has loaded itself."""
        if not self._before_loading:
            return
        left = list(self.models)
        self._call(
            lambda hook: hook(left, str(folder)),
            self._before_loading,
            lambda: [i for i, one in enumerate(self.models) if not any(one is kept for kept in left)],
            sharded,
        )

    def _call(
        self,
        call: Callable[[Hook], Any],
        hooks: Mapping[int, Hook],
        taken: Callable[[], list[int]],
        sharded: dict[str, Sharded],
    ) -> None:
        """Runs hooks; models the main rank's have taken over are left out on every rank.

        Raises:
            CheckpointError: a hook failed on another rank. On that rank itself, the hook's own error.
        """
        error = None
        try:
            for hook in hooks.values():
                call(hook)
        except Exception as caught:  # noqa: BLE001 - raised below, when every rank has heard of it
            error = caught
        said = f"{type(error).__name__}: {error}" if error is not None else None
        told = gather_object((said, taken()), world=self._world)
        if error is not None:
            raise error
        if failed := [f"rank {rank}: {text}" for rank, (text, _) in enumerate(told) if text is not None]:
            raise CheckpointError(f"a hook failed on {'; '.join(failed)}")
        for index in told[0][1]:
            del sharded[_name_of(index)]


def _registered(hooks: OrderedDict[int, Hook], hook: Hook) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle


def _check_resume(where: str, project_dir: str | None, world: World) -> None:
    if where == "auto":
        if project_dir is None:
            raise ConfigError(
                f"resume='auto' was asked on rank {world.rank}, and there is no project_dir to look for checkpoints "
                "in. Give project_dir=..., or the folder of a checkpoint in place of 'auto'"
            )
        return
    folder = Path(where)
    try:
        if not folder.is_dir():
            resolve(folder, LocalFileSystem())
    except CheckpointError as error:
        raise ConfigError(
            f"resume={str(folder)!r} was asked on rank {world.rank}, but {error}. Give the folder of a checkpoint, or "
            "'auto' for the newest of project_dir"
        ) from error


def _name_of(model: int) -> str:
    return f"model_{model}"


def _skipped(found: Found) -> str:
    return "".join(f"; skipped {path.name}: {why}" for path, why in found.skipped)
