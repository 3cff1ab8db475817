"""Which loaders a run trains on: a save and a stop come between their batches, and an evaluation goes on."""

from __future__ import annotations

import warnings
from typing import final

from nbaccel.core.data import ShardedLoader
from nbaccel.errors import ConfigError

__all__ = ["Trainers"]

_EMPTY = (3, 100_000)  # passes without a batch after a stop: that is told, and that is an error


@final
class Trainers:
    """The loaders whose batches the optimizer steps are made with, found out while the loop runs.

    Several may give a batch before a step: one may be read inside the loop over another, an iterator over one may
    be held. The loop then turns to the one that trains first after the step.

    Args:
        passes: the loaders being iterated, the innermost last; kept by the loop.
    """

    def __init__(self, passes: list[ShardedLoader], *, is_main: bool) -> None:
        self._passes, self._is_main = passes, is_main
        self._found: set[ShardedLoader] = set()
        self._asked: set[ShardedLoader] = set()
        """Those that were asked for a batch since the last step."""
        self._in_question: set[ShardedLoader] = set()
        """Those that gave a batch for the last step, where they are several."""
        self._around: set[ShardedLoader] = set()
        """Those whose passes were in progress around one that was stopped."""
        self._empty = 0

    def __contains__(self, loader: ShardedLoader) -> bool:
        return loader in self._found

    def asked(self, loader: ShardedLoader) -> None:
        """It is asked for its next batch."""
        if loader not in self._found:
            self._look(loader)
            self._asked.add(loader)

    def began(self, loader: ShardedLoader) -> None:
        """A pass over it begins."""
        self._around.discard(loader)

    def ended(self, loader: ShardedLoader) -> None:
        """The pass over it is over."""
        self._look(loader)
        self._around.discard(loader)

    def stepped(self) -> None:
        """An optimizer step was made; with batches of the loader that trains already, if one is iterated."""
        if self._found.isdisjoint(self._passes):
            self._in_question = self._asked.intersection(self._passes)
            if len(self._in_question) == 1:
                self._found.add(self._in_question.pop())
        self._asked.clear()

    def _look(self, loader: ShardedLoader) -> None:
        if loader in self._in_question:
            self._found.add(loader)
            self._in_question.clear()

    def stops(self, loader: ShardedLoader) -> bool:
        """Once the run is being stopped: whether the pass over it ends here.

        Raises:
            ConfigError: the loop begins pass after pass, and does not end.
        """
        if loader not in self._found:
            return loader in self._around
        self._around.update(self._passes[: self._passes.index(loader)])
        if not loader.batch_samples + loader.batch_repeated:
            self._count_empty(loader)
        return True

    def _count_empty(self, loader: ShardedLoader) -> None:
        """A loop over epochs comes to its end by itself; one that waits for steps never does."""
        self._empty += 1
        if self._empty not in _EMPTY:
            return
        text = (
            f"the run was asked to stop, and since then {self._empty} passes over {loader.name!r} have given no "
            "batch: the loop around them goes on. Leave it where acc.should_stop is True."
        )
        if self._empty == _EMPTY[1]:
            raise ConfigError(text)
        if self._is_main:
            warnings.warn(text, stacklevel=5)
