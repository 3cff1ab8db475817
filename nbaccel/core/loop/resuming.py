"""A resumed run's way through what it has behind it: the loop is written as for a fresh run, and its passes over the
loaders, and the schedulers' steps after them, are left out until a loader goes on for real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from nbaccel.core.data import ShardedLoader

__all__ = ["Resuming"]


@final
class Resuming:
    """Which passes are left out, and whether a scheduler's step counts."""

    def __init__(self) -> None:
        self.active = False
        """Whether the run is in, or after, a pass that is left out, until the next one begins."""
        self._left: dict[ShardedLoader, tuple[int, Mapping[str, Any]]] = {}
        """Passes to leave out, and where the loader then goes on."""
        self._through: set[ShardedLoader] = set()
        """Those that have left out all."""
        self._due: ShardedLoader | None = None
        """The loader after whose last pass a scheduler's step was still to come when the checkpoint was saved."""
        self._trained: ShardedLoader | None = None
        """The loader in whose pass the optimizer has stepped last."""
        self._scheduled_at = -1  # optimizer steps when a scheduler stepped last
        self._steps_before = 0  # and when the outermost pass began

    def __bool__(self) -> bool:
        """Whether passes are still to be left out."""
        return bool(self._left)

    def leave_out(self, loader: ShardedLoader) -> None:
        """The passes that a loader's state, just loaded, has behind it."""
        if loader.epoch:
            self._left[loader] = (loader.epoch, loader.state_dict())

    def leaves_out(self, loader: ShardedLoader) -> bool:
        """Whether its pass gives no batches."""
        return loader in self._left

    def began(self, loader: ShardedLoader, steps: int, *, outermost: bool) -> None:
        """A pass begins, after so many optimizer steps."""
        self.active = loader in self._left
        if outermost:
            self._steps_before = steps
        if loader in self._through:
            # for real: whatever passes the code has left out of other loaders meanwhile are behind
            self._through.clear()
            for other, (_, state) in self._left.items():
                other.load_state_dict(state)
            self._left.clear()

    def ended(self, loader: ShardedLoader, steps: int, *, outermost: bool) -> None:
        """The pass is over."""
        if outermost and steps != self._steps_before:
            self._trained = loader
        passes, state = self._left.pop(loader, (0, {}))
        if passes > 0:
            loader.load_state_dict(state)
            if passes > 1:
                self._left[loader] = (passes - 1, state)
            else:
                self._through.add(loader)

    def may_schedule(self, steps: int) -> bool:
        """Whether a scheduler's step counts; those after the passes behind have been made."""
        if self.active and self._due not in self._through:
            return False
        self._scheduled_at = steps
        return True

    def due_after(self, loaders: Sequence[ShardedLoader], steps: int) -> int | None:
        """For a checkpoint between two passes: the loader after whose pass a scheduler has not stepped yet."""
        trained = self._trained
        return loaders.index(trained) if trained in loaders and self._scheduled_at != steps else None

    def load_due(self, loaders: Sequence[ShardedLoader], index: int | None) -> None:
        """What `due_after` has told the checkpoint."""
        self._due = loaders[index] if index is not None and index < len(loaders) else None
