"""The ranks agreeing on small objects, on a gloo group that nothing else uses.

A group of its own because a save in the background must not meet the training's collectives (on the
default group that aborts the process), and because small objects need no device.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar, final

import torch.distributed as dist

from nbaccel.core.world import World
from nbaccel.errors import CheckpointError

__all__ = ["Crew", "describe_error"]

T = TypeVar("T")
_TIMEOUT = timedelta(days=7)
"""Hangs are for the session's detector to name; a slow disk must not end a run."""


@final
class Crew:
    """All ranks of `world`. Every method is to be called by all of them; made by all of them together."""

    def __init__(self, world: World) -> None:
        self.rank, self.size = world.rank, world.size
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT) if world.size > 1 else None

    def gather(self, value: T) -> list[T]:
        """Each rank's object, in rank order, on every rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def share(self, value: T) -> T:
        """Rank 0's object."""
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def agree(self, error: BaseException | None, doing: str) -> None:
        """Returns when no rank brings an error, else raises on all.

        Raises:
            CheckpointError: with every failing rank and what happened to it.
        """
        texts = self.gather(None if error is None else describe_error(error))
        if self.size > 1 and texts[0] is not None and len(set(texts)) == 1:
            raise CheckpointError(f"{doing} failed on all {self.size} ranks: {texts[0]}") from error
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None]
        if failed:
            raise CheckpointError(f"{doing} failed on {'; '.join(failed)}") from error

    def close(self) -> None:
        """Gives the group back, unless the whole process group has been taken down already."""
        group, self._group = self._group, None
        if group is None or not dist.is_initialized():
            return
        try:
            dist.destroy_process_group(group)
        except ValueError:
            pass  # the process group was made anew since, which took this one down


def describe_error(error: BaseException) -> str:
    """An error in words for the other ranks."""
    if isinstance(error, CheckpointError):
        return str(error)
    return f"{type(error).__name__}: {error}"
