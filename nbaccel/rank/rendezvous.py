"""One store per process group, outside the ranks.

Torch reuses the same keys for every default group, so a second group on the same store fails or hangs
when one rank is late; and a store inside rank 0 ends with it. The run's store process serves a fresh
store for each group a rank opens: this module asks it for the port. It also makes code that names a
local address of its own (MASTER_PORT="29500", tcp://localhost:12355) work beside a torchrun environment.
"""

from __future__ import annotations

import importlib
import os
import socket
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from nbaccel.rank.spec import RunSpec
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

    opened: Counter[int] = Counter()
    base = [0]

    def renew(generation: int) -> None:
        opened.clear()
        base[0] = generation * _GENERATION

    if not dist.is_available():
        return renew
    import torch.distributed.distributed_c10d as c10d

    # torch.distributed.rendezvous as an attribute is the function of that name, not the module
    rendezvous = importlib.import_module("torch.distributed.rendezvous")
    if spec.collective_timeout is not None:
        timeout = timedelta(seconds=spec.collective_timeout)
        c10d.default_pg_timeout = timeout
        c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]
    original: Callable[..., Any] | None = getattr(rendezvous, "_create_c10d_store", None)
    if original is None:
        return renew
    owner = os.getpid()
    meeting = (spec.host.address, spec.host.port) if spec.host is not None else None
    local = {"127.0.0.1", "localhost", "::1", "0.0.0.0", socket.gethostname()}

    def create(
        hostname: str,
        port: int,
        rank_in_group: int,
        world_size: int,
        timeout: timedelta,
        *args: Any,
        **options: Any,
    ) -> Any:
        if not here():
            return original(hostname, port, rank_in_group, world_size, timeout, *args, **options)
        if spec.host is not None and os.getpid() == owner and (hostname, port) == meeting:
            number = opened[world_size]
            opened[world_size] += 1
            found = original(hostname, port, rank_in_group, world_size, timeout, *args, **options)
            whose = f" for {spec.host.first_rank + rank}" if world_size == 1 else ""
            return c10d.PrefixStore(f"group {number} of {world_size}{whose}", found)
        if hostname not in local or os.getpid() != owner:
            return original(hostname, port, rank_in_group, world_size, timeout, *args, **options)
        number = base[0] + opened[world_size]
        opened[world_size] += 1
        # a group of one is this rank's own: nobody else counts along
        key = (world_size, number, rank if world_size == 1 else -1)
        stores.send(key)
        answer, _ = stores.recv(timeout.total_seconds())
        return dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", answer, world_size=world_size, is_master=False, timeout=timeout
        )

    rendezvous._create_c10d_store = create  # type: ignore[attr-defined]
    return renew
