"""Process groups end when nothing of theirs can still be at work.

Torch frees a gloo group by joining its worker threads with the interpreter's lock held. A worker that is
just dropping the last collective of a DDP backward needs that lock, and the two wait for one another for
ever: seen once in about fifty calls that end with `destroy_process_group()` and a DDP model going out of
scope (torch 2.13; pytorch/pytorch#56297). So a rank keeps each group a little longer than the user does.
"""

from __future__ import annotations

import time
from typing import Any

__all__ = ["keep_groups"]

# Between the end of a collective and its worker's last use of the lock lie microseconds.
_LATER = 2.0


def keep_groups() -> None:
    """Hold on to every group made in this process from now on, until `_LATER` seconds after it was
    destroyed and another one is made; the last ones go with the process."""
    import torch.distributed as dist

    if not dist.is_available():
        return
    import torch.distributed.distributed_c10d as c10d

    original = getattr(c10d, "_new_process_group_helper", None)
    if original is None:
        return
    kept: list[tuple[Any, float | None]] = []  # and when it was first found destroyed

    def make(*args: Any, **options: Any) -> Any:
        now, alive = time.monotonic(), c10d._world.pg_map
        ended = [(group, None if group in alive else since or now) for group, since in kept]
        kept[:] = [(group, since) for group, since in ended if since is None or now - since < _LATER]
        made = original(*args, **options)
        kept.append((made[0] if isinstance(made, tuple) else made, None))
        return made

    c10d._new_process_group_helper = make
