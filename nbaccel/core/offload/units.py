"""What is brought and read ahead, and in which order."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, final

import torch
from torch import nn

from nbaccel.core.offload.blocks import Block

__all__ = ["Order", "Unit", "Worker", "begins_again_after_fork"]

_AHEAD = 3
"""How many of the next layers may be on the way; the buffers' budget says how many there is room for."""


@dataclass(slots=True, eq=False)
class Unit:
    """A module, and what has to be there while it runs."""

    name: str
    module: nn.Module
    blocks: tuple[Block, ...] = ()
    mapped: tuple[torch.Tensor, ...] = ()


@final
class Order:
    """Which unit follows which: as they are registered, until a forward pass shows otherwise."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self._next = dict(pairwise(units))
        self._thread = threading.local()

    def entered(self, unit: Unit) -> None:
        last = getattr(self._thread, "last", None)
        if last is not None and last is not unit:
            self._next[last] = unit
        self._thread.last = unit

    def after(self, unit: Unit) -> list[Unit]:
        following: list[Unit] = []
        found = unit
        for _ in range(_AHEAD):
            later = self._next.get(found)
            if later is None or later is unit or later in following:
                break
            following.append(later)
            found = later
        return following


class Worker(Protocol):
    """Has a thread of its own."""

    def begin_again(self) -> None:
        """In a forked process, which has neither the thread nor those who held a lock."""


_WORKERS: weakref.WeakSet[Worker] = weakref.WeakSet()


def begins_again_after_fork(worker: Worker) -> None:
    """As long as it lives."""
    _WORKERS.add(worker)


def _after_fork() -> None:
    for worker in list(_WORKERS):
        worker.begin_again()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
