"""One store per process group, outside the ranks.

Torch reuses the same keys for every default group, so a second group on the same store fails or hangs
when one rank is late; and a store inside rank 0 ends with it. The run's store process serves a fresh
store for each group a rank opens: this module asks it for the port. It also makes code that names a
local address of its own (MASTER_PORT="29500", tcp://localhost:12355) work beside a torchrun environment.
"""

from __future__ import annotations

import functools
import importlib
import os
import socket
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any, final

from nbaccel.rank.spec import HostPlace, RunSpec
from nbaccel.wire.channel import Channel

__all__ = ["install"]


# More groups than one generation of a session ever opens.
_GENERATION = 1 << 20


def install(
    stores: Channel, spec: RunSpec, rank: int, *, here: Callable[[], bool] = lambda: True
) -> Callable[[int], None]:
    """Route this rank's rendezvous through the run's store process.

    Args:
        here: whether the code that asks is this rank's, where several are threads of one process.

    Returns: what to call with a session's generation, so that ranks that opened different numbers of groups
    count alike again.

    Torch has no public hook for it: `_create_c10d_store` is where both env:// and tcp:// make their
    store. Where a torch lacks it, MASTER_ADDR and MASTER_PORT still lead to the first group's store.
    """
    import torch.distributed as dist

    meeting = _Meeting(stores, spec, rank, here)
    if not dist.is_available():
        return meeting.renew
    if spec.collective_timeout is not None:
        _set_default_timeout(timedelta(seconds=spec.collective_timeout))
    # torch.distributed.rendezvous as an attribute is the function of that name, not the module
    rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")
    original = getattr(rendezvous, "_create_c10d_store", None)
    if original is not None:
        rendezvous._create_c10d_store = functools.partial(meeting.create, original)
    return meeting.renew


def _set_default_timeout(timeout: timedelta) -> None:
    import torch.distributed.distributed_c10d as c10d

    c10d.default_pg_timeout = timeout
    c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]


@final
class _Meeting:
    """Where the process groups of one rank meet: it counts those it opens, as the other ranks do.

    Args: as `install`.
    """

    def __init__(self, stores: Channel, spec: RunSpec, rank: int, here: Callable[[], bool]) -> None:
        self._stores, self._host, self._rank, self._here = stores, spec.host, rank, here
        self._owner = os.getpid()
        self._local = {"127.0.0.1", "localhost", "::1", "0.0.0.0", socket.gethostname()}
        self._opened: Counter[int] = Counter()
        self._base = 0

    def renew(self, generation: int) -> None:
        """Count from this generation's first group on."""
        self._opened.clear()
        self._base = generation * _GENERATION

    def create(
        self,
        original: Callable[..., Any],
        hostname: str,
        port: int,
        rank_in_group: int,
        world_size: int,
        timeout: timedelta,
        *args: Any,
        **options: Any,
    ) -> Any:
        """What torch calls in place of `original`: the store at which a group meets."""
        as_asked = functools.partial(
            original, hostname, port, rank_in_group, world_size, timeout, *args, **options
        )
        if not self._here() or os.getpid() != self._owner:
            return as_asked()
        host = self._host
        if host is not None and (hostname, port) == (host.address, host.port):
            return self._among_hosts(host, as_asked(), world_size)
        if hostname not in self._local:
            return as_asked()
        return self._on_this_host(world_size, timeout)

    def _number(self, world_size: int) -> int:
        """How many groups of this size were opened before."""
        self._opened[world_size] += 1
        return self._opened[world_size] - 1

    def _among_hosts(self, host: HostPlace, store: Any, world_size: int) -> Any:
        """A room of its own in the store of all hosts."""
        import torch.distributed.distributed_c10d as c10d

        # a group of one is this rank's own: nobody else counts along
        whose = f" for {host.first_rank + self._rank}" if world_size == 1 else ""
        return c10d.PrefixStore(f"group {self._number(world_size)} of {world_size}{whose}", store)

    def _on_this_host(self, world_size: int, timeout: timedelta) -> Any:
        """A store of its own, of the run's store process."""
        import torch.distributed as dist

        number = self._base + self._number(world_size)
        self._stores.send((world_size, number, self._rank if world_size == 1 else -1))
        port, _ = self._stores.recv(timeout.total_seconds())
        return dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", port, world_size=world_size, is_master=False, timeout=timeout
        )
