"""Cells that may raise: ranks leave them together, so that none still waits there for one that is further on."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any, final

from nbaccel.rank.free import close_connections
from nbaccel.rank.membership import num_called

__all__ = ["Leaving", "show"]

_PATIENCE = 4.0
"""Seconds until a rank that raised takes those that are still in the cell to wait for it."""
_TO_END = 30.0
"""Seconds that they have once they wait for nobody."""
_LOOK = 0.02


@final
class Leaving:
    """This rank's leaving of such cells; made by every rank, before the first cell."""

    def __init__(self) -> None:
        self._store: Any = None
        self._rank, self._size = 0, int(os.environ.get("WORLD_SIZE") or 1)
        if self._size > 1:
            from torch.distributed.distributed_c10d import PrefixStore
            from torch.distributed.rendezvous import rendezvous

            store, self._rank, _ = next(rendezvous("env://"))
            self._store = PrefixStore("cells that may raise", store)
            self._store.set(f"pid/{self._rank}", str(os.getpid()))

    def leave(self, cell: str, error: Exception | None) -> None:
        """Wait for the other ranks to leave the cell too; those that wait there for one that raised are freed.

        Where the ranks have come differently far in a group, all of them end their groups and make a new default one.

        Args:
            cell: what tracebacks call it.
            error: what this rank raised in it.

        Raises: `error`, when other ranks stay in the cell for good.
        """
        if self._store is None:
            return
        told = json.dumps({"raised": error is not None, "counts": _counts()})
        self._store.set(f"{cell}/{self._rank}", told)
        broken = f"{cell}/broken"
        if error is None:
            self._wait_all(cell, float("inf"))
        elif not self._wait_all(cell, _PATIENCE):
            self._store.set(broken, "")
            close_connections([int(self._store.get(f"pid/{rank}")) for rank in self._others()])
            if not self._wait_all(cell, _TO_END):
                raise error
        found = [json.loads(self._store.get(f"{cell}/{rank}")) for rank in range(self._size)]
        counts = [one["counts"] for one in found]
        if any(one["raised"] for one in found) and (self._store.check([broken]) or _differ(counts)):
            self._renew_group(cell, everywhere=all(counts))

    def _renew_group(self, cell: str, *, everywhere: bool) -> None:
        """End this rank's groups and, where every rank had one, make the default one again.

        On a store of its own: under torchrun a second group would find the first one's keys.
        """
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore

        if not dist.is_initialized():
            return
        print(
            f"nbaccel: the ranks left {cell} at different places: their process group is made again. "
            "Make the Accelerator, and what it prepared, again to go on with it",
            file=sys.stderr,
        )
        backend = str(dist.get_backend_config())
        dist.destroy_process_group()
        if everywhere:
            store = PrefixStore(f"after {cell}", self._store)
            dist.init_process_group(backend, store=store, rank=self._rank, world_size=self._size)

    def _others(self) -> list[int]:
        return [rank for rank in range(self._size) if rank != self._rank]

    def _wait_all(self, cell: str, seconds: float) -> bool:
        """Whether every rank has left the cell by then. In steps: a signal can end it."""
        keys = [f"{cell}/{rank}" for rank in range(self._size)]
        end = time.monotonic() + seconds
        while not self._store.check(keys):
            if time.monotonic() > end:
                return False
            time.sleep(_LOOK)
        return True


def show(error: Exception, cell: str) -> None:
    """The traceback, from the cell on."""
    tb = error.__traceback__
    while tb is not None and tb.tb_frame.f_globals.get("__name__", "").startswith("nbaccel.rank."):
        tb = tb.tb_next
    traceback.print_exception(type(error), error, tb)
    print(f"nbaccel: {cell} may raise, by its tag: the notebook goes on", file=sys.stderr)


def _counts() -> dict[str, int]:
    """How many collectives this rank has called in each of its groups."""
    c10d = sys.modules.get("torch.distributed.distributed_c10d")
    found = {}
    for group, name in list(c10d._world.pg_names.items()) if c10d is not None else ():
        try:
            found[str(name)] = num_called(group)
        except RuntimeError:
            continue  # a backend that does not count
    return found


def _differ(counts: list[dict[str, int]]) -> bool:
    """Whether two ranks have called different numbers in a group of both."""
    first: dict[str, int] = {}
    return any(first.setdefault(name, number) != number for one in counts for name, number in one.items())
