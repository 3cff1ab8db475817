"""Everything a run saves, and how it goes on from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from nbaccel.core.checkpoint import (
    Checkpoints,
    Contents,
    Found,
    Loaded,
    LocalFileSystem,
    ModelState,
    OptimizerState,
    Stateful,
    next_folder,
)
from nbaccel.core.collectives import broadcast_object_list
from nbaccel.core.data import ShardedLoader
from nbaccel.core.loop import Loop
from nbaccel.core.rng import RngState
from nbaccel.core.world import World
from nbaccel.errors import CheckpointError, ConfigError

__all__ = ["Saving"]

Hook = Callable[..., Any]


@final
class _Counters:
    """The optimizer steps of the run as something that is saved."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._loop.steps}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        self._loop.steps = int(state_dict["steps"])


@final
class Saving:
    """Saves and loads all that was prepared and registered, in the order it was."""

    def __init__(self, world: World, loop: Loop, *, project_dir: str | None, keep: int | None) -> None:
        self._world, self._loop, self._keep = world, loop, keep
        self.project_dir = None if project_dir is None else Path(project_dir)
        self.models: list[nn.Module] = loop.models
        self.optimizers: list[torch.optim.Optimizer] = []
        self.schedulers: list[Stateful] = []
        self.loaders: list[ShardedLoader] = []
        self.registered: list[Stateful] = []
        self.before_saving: list[Hook] = []
        self.before_loading: list[Hook] = []
        self._checkpoints = Checkpoints(world=world)

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

    def save(self, folder: str | Path | None, *, asynchronous: bool) -> Path:
        """Saves into `folder`, or into the project's next checkpoint folder.

        Raises:
            ConfigError: no folder and no project_dir; or in the middle of an accumulation window.
            CheckpointError: it could not be written.
        """
        window = self._loop.window
        if window.micro or not window.sync:
            raise ConfigError(
                f"save_state in the middle of an accumulation window (micro-step {window.micro + 1} of "
                f"{window.length}) would lose its gradients; save when accelerator.sync_gradients is True"
            )
        self._loop.finish_scaler()
        target = self._next() if folder is None else Path(folder)
        return self._checkpoints.save(
            target,
            self._contents(self.before_saving),
            step=self._loop.steps,
            keep=self._keep if folder is None else None,
            asynchronous=asynchronous,
        )

    def load(self, folder: str | Path | None, *, strict: bool = True, allow_pickle: bool = False) -> Loaded:
        """Loads `folder`, or the newest complete checkpoint of the project.

        Raises:
            CheckpointError: there is none, it is damaged, or it is of another model.
        """
        if folder is None:
            found = self.newest()
            if found.path is None:
                raise CheckpointError(
                    f"there is no complete checkpoint in {self._project()}{_skipped(found)}"
                )
            if found.skipped and self._world.is_main:
                print(f"loading {found.path}{_skipped(found)}", flush=True)
            folder = found.path
        contents = self._contents(self.before_loading)
        return self._checkpoints.load(folder, contents, strict=strict, allow_pickle=allow_pickle)

    def newest(self) -> Found:
        """The newest complete checkpoint of the project."""
        return self._checkpoints.newest_complete(self._project())

    def resume(self, where: str) -> Loaded | None:
        """Goes on from folder `where`, or with "auto" from the newest complete checkpoint if there is one.

        The loop that follows is written as for a fresh run, so passes it has behind it give no batches.
        """
        if where == "auto" and self.newest().path is None:
            return None
        loaded = self.load(None if where == "auto" else where)
        for loader in self.loaders:
            if loader.epoch:
                self._loop.to_skip[loader] = (loader.epoch, loader.state_dict())
        if self._world.is_main:
            print(f"resumed from {loaded.path} at optimizer step {loaded.step}", flush=True)
        return loaded

    def wait(self) -> None:
        """Until nothing is being written any more."""
        self._checkpoints.wait()

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

    def _contents(self, hooks: Sequence[Hook]) -> Contents:
        shared: dict[str, Stateful] = {"counters": _Counters(self._loop)}
        per_rank: dict[str, Stateful] = {"rng": RngState(self._world.device)}
        if self._loop.scaler is not None:
            shared["scaler"] = self._loop.scaler
        for kind, items in (("scheduler", self.schedulers), ("registered", self.registered)):
            shared.update({f"{kind}_{index}": item for index, item in enumerate(items)})
        for index, loader in enumerate(self.loaders):
            (per_rank if loader.state_scope == "rank" else shared)[f"loader_{index}"] = loader
        models = {f"model_{i}": ModelState(m) for i, m in enumerate(self.models)}
        optimizers = {f"optimizer_{i}": OptimizerState(o, self.models) for i, o in enumerate(self.optimizers)}
        before = tuple(self._bound(hook) for hook in hooks)
        return Contents(sharded={**models, **optimizers}, shared=shared, per_rank=per_rank, before=before)

    def _bound(self, hook: Hook) -> Callable[[Path], None]:
        return lambda folder: hook(self.models, folder)


def _skipped(found: Found) -> str:
    return "".join(f"; skipped {path.name}: {why}" for path, why in found.skipped)
