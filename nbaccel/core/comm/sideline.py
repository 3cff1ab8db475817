"""A process group beside the training's own, for words that must not meet its collectives."""

from __future__ import annotations

import weakref
from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed as dist

__all__ = ["Sideline", "Word"]

_TIMEOUT = timedelta(days=7)
"""Whoever is late is named by the session's hang detector, not by a timeout."""


@final
class Sideline:
    """A gloo group of all ranks. Making one is collective, and every operation is to be called by all ranks
    in one order; `started` counts them, so that ranks which left a loop unevenly can be brought in step."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        # Weakly: a search for a batch size frees the ranks that wait in the default group by letting it go.
        self._default = weakref.ref(dist.group.WORLD)

    @property
    def started(self) -> int:
        """Operations this rank has begun on the group's present connection: a session puts another in its place where
        it frees ranks from an interrupted step."""
        return int(self._group._get_backend(torch.device("cpu"))._get_sequence_number_for_group())

    @property
    def stands(self) -> bool:
        """Whether the default group is still the one it was made beside; the same on all ranks."""
        return self._default() is dist.group.WORLD

    def start_max(self, numbers: torch.Tensor) -> Word:
        """Begins to replace `numbers` (on the CPU) by their maxima over the ranks."""
        return Word(self, dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self._group, async_op=True))

    def start_gather(self, table: torch.Tensor, mine: torch.Tensor) -> Word:
        """Begins to fill `table` [ranks, n] with every rank's `mine` [n]."""
        return Word(self, dist.all_gather(list(table.unbind()), mine, group=self._group, async_op=True))

    def share(self, value: Any) -> Any:
        """Rank 0's object on every rank; waits for all of them."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


@final
class Word:
    """What the ranks are telling one another."""

    def __init__(self, line: Sideline, work: dist.Work | None) -> None:
        assert work is not None  # this rank is in the group
        self._line, self._work, self._begun = line, work, line.started

    def has_come(self) -> bool:
        """Whether there is nothing to wait for."""
        return self._work.is_completed()

    def wait(self) -> bool:
        """Waits for it; False where it was lost with a connection that has been replaced since.

        Raises:
            RuntimeError: another rank is gone.
        """
        try:
            self._work.wait()
        except RuntimeError:
            if self._line.started >= self._begun:
                raise
            return False
        return True
