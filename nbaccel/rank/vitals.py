"""What a rank holds and what it is at, measured by its reporter: nothing here needs the main thread."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection, Iterable
from types import CodeType
from typing import Any, final

from nbaccel.wire.snapshot import Collective, Vitals

__all__ = ["Gauge"]

# Seconds between two measurements, and at least so many times what the exact one takes.
_EVERY = 2.0
_RARELY = 1000.0
# A collective that has been waited for this long is worth a word.
_WAITING = 1.0
_COMPILES = (
    os.path.join("torch", "_dynamo", "convert_frame.py"),
    os.path.join("torch", "_inductor", "compile_fx.py"),
)


@final
class Gauge:
    """Measures this process, as often as it is worth.

    Args:
        local_rank: the index of its accelerator.
    """

    def __init__(self, local_rank: int) -> None:
        self._local_rank = local_rank
        self._due = self._exactly_due = 0.0
        self._shared = 0
        """Bytes of the resident memory that are other ranks' share."""
        self._last = Vitals()

    def read(
        self, codes: Iterable[CodeType], still: float, pending: Callable[[], Collection[Collective]]
    ) -> Vitals | None:
        """What is worth telling now; None when nothing has changed since the last time.

        Args:
            codes: what the thread that runs user code is in.
            still: for how many seconds that thread has not moved.
            pending: asks for the collectives that are under way.
        """
        now = time.monotonic()
        doing, detail = _doing(codes, still, pending)
        if now < self._due and (doing, detail) == (self._last.doing, self._last.detail):
            return None
        self._due = now + _EVERY
        device_memory, utilization = _device(self._local_rank)
        self._last = Vitals(
            memory=self._memory(now),
            device_memory=device_memory,
            utilization=utilization,
            doing=doing,
            detail=detail,
        )
        return self._last

    def _memory(self, now: float) -> int | None:
        """Bytes of this rank's own and its part of what it shares with those it was forked beside.

        That part is asked for now and then: adding it up takes milliseconds for each 100 MB (proc(5),
        smaps_rollup: Pss). What is resident is read every time.
        """
        resident = _resident()
        if resident is None:
            return None
        if now >= self._exactly_due:
            started = time.perf_counter()
            proportional = _proportional()
            self._exactly_due = now + max(_EVERY, _RARELY * (time.perf_counter() - started))
            self._shared = 0 if proportional is None else max(0, resident - proportional)
        return max(0, resident - self._shared)


def _resident() -> int | None:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return None  # not this platform


def _proportional() -> int | None:
    try:
        with open("/proc/self/smaps_rollup", "rb") as file:
            for line in file:
                if line.startswith(b"Pss:"):
                    return int(line.split()[1]) << 10
    except (OSError, IndexError, ValueError):
        pass  # an old kernel: what is resident has to do
    return None


def _device(index: int) -> tuple[int | None, int | None]:
    """Bytes torch has reserved on this rank's GPU, and percent of the time it was busy; None where the rank
    has opened none, or nvidia-ml-py is not installed."""
    torch = sys.modules.get("torch")
    for kind in ("cuda", "xpu"):
        device: Any = getattr(torch, kind, None)
        if device is not None and device.is_initialized():
            index = index if index < device.device_count() else 0
            return int(device.memory_reserved(index)), _busy(device, index)
    return None, None


def _busy(device: Any, index: int) -> int | None:
    try:
        return int(device.utilization(index))
    except Exception:  # noqa: BLE001  # NVML's and AMD SMI's errors have bases of their own; torch.xpu has none
        return None


def _doing(
    codes: Iterable[CodeType], still: float, pending: Callable[[], Collection[Collective]]
) -> tuple[str, str]:
    """ "waiting" and for which collective, "compiling", or nothing worth a word."""
    if _xla_compiles() or any(
        code.co_filename.endswith(_COMPILES) and "compile" in code.co_name.lower() for code in codes
    ):
        return "compiling", ""
    if still >= _WAITING:
        waited = [one for one in pending() if one.seconds >= _WAITING]
        if waited:
            return "waiting", waited[-1].op
    return "", ""


def _xla_compiles() -> bool:
    """Whether a graph that was in no cache is being compiled, by any thread of this process: torch_xla counts it
    when it begins, and measures it when it has ended."""
    native: Any = getattr(sys.modules.get("torch_xla"), "_XLAC", None)
    if native is None or not native._xla_runtime_is_initialized():
        return False
    begun = native._xla_counter_value("UncachedCompile") or 0
    ended = (native._xla_metric_data("CompileTime") or (0,))[0]
    return int(begun) > int(ended)
