"""For tests only: lets the thread replicas of PJRT_DEVICE=CPU compile one at a time.

XLA's CPU client keeps collectives of different programs apart. Two replicas that compile the same graph at the
same moment get a program each, and wait for one another until XLA ends the process (pytorch/xla#5005, #9089).
Compiled one after the other, the second finds the first's in torch_xla's cache. Chips do not need this.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr

_native: Any = torch_xla._XLAC
_lock = threading.RLock()
_steps = threading.Condition()
_counts: Counter[int] = Counter()
"""How many steps each replica has handed over."""
_installed: list[bool] = []
# A replica may sync where the others do not.
_PATIENCE = 0.5
# Who is in there for longer has compiled, and waits for a graph of before, which waits for ours.
_COMPILING = 60


def install() -> None:
    """Once in a process, from any of its replicas, before the first collective."""
    with _lock:
        if _installed:
            return
        _installed.append(True)
        _one_at_a_time("_xla_step_marker", in_step=True)
        _one_at_a_time("_xla_sync_multi", in_step=False)
        for name in ("cpu", "item", "tolist", "__bool__", "__float__"):
            _sync_before(name)
        gather = xm.all_gather

        def all_gather(
            value: Any, dim: int = 0, groups: Any = None, output: Any = None, **options: Any
        ) -> Any:
            # with a pinned layout the CPU's is an all_reduce whose graph holds the replica's own number
            return gather(value, dim, groups, output, **{**options, "pin_layout": False})

        xm.all_gather = all_gather


def _one_at_a_time(name: str, *, in_step: bool) -> None:
    """Trace and compile under the lock.

    Args:
        in_step: all replicas call it alike, so that none goes ahead of the others by more than one call:
            handing a graph over may wait for the one before, which waits for the other replicas.
    """
    original = getattr(_native, name)

    def locked(*args: Any, **options: Any) -> Any:
        me, replicas = xr.global_ordinal(), range(xr.world_size())
        if in_step:
            with _steps:
                _steps.wait_for(lambda: all(_counts[one] >= _counts[me] for one in replicas), _PATIENCE)
        alone = _lock.acquire(timeout=_COMPILING)
        try:
            result = original(*args, **options)
        finally:
            if alone:
                _lock.release()
            with _steps:
                _counts[me] += in_step
                _steps.notify_all()
        _native._xla_wait_device_ops([])
        return result

    setattr(_native, name, locked)


def _sync_before(name: str) -> None:
    """A tensor that is read compiles what leads to it: by the function above."""
    original = getattr(torch.Tensor, name)

    def read(self: torch.Tensor, *args: Any, **options: Any) -> Any:
        if self.device.type == "xla":
            _native._xla_sync_multi([self.detach()], [], False, True)
        return original(self, *args, **options)

    setattr(torch.Tensor, name, read)
