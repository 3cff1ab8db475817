"""A process group beside the training's own, for words that must not meet its collectives."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed as dist

__all__ = ["Sideline"]

_TIMEOUT = timedelta(days=7)
"""Whoever is late is named by the session's hang detector, not by a timeout."""


@final
class Sideline:
    """A gloo group of all ranks. Making one is collective, and every operation is to be called by all ranks
    in one order; `started` counts them, so that ranks which left a loop unevenly can be brought in step."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)

    @property
    def started(self) -> int:
        """Operations this rank has begun on the group's present connection: a session may have put another in its
        place, where ranks were freed from an interrupted step, and what was under way has failed then."""
        return int(self._group._get_backend(torch.device("cpu"))._get_sequence_number_for_group())

    def start_max(self, numbers: torch.Tensor) -> dist.Work:
        """Begins to replace `numbers` (on the CPU) by their maxima over the ranks."""
        work: dist.Work | None = dist.all_reduce(
            numbers, op=dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        assert work is not None  # this rank is in the group
        return work

    def start_gather(self, table: torch.Tensor, mine: torch.Tensor) -> dist.Work:
        """Begins to fill `table` [ranks, n] with every rank's `mine` [n]."""
        work: dist.Work | None = dist.all_gather(list(table.unbind()), mine, group=self._group, async_op=True)
        assert work is not None
        return work

    def share(self, value: Any) -> Any:
        """Rank 0's object on every rank; waits for all of them."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]
