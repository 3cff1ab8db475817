"""What `acc.log` does with its values: to every tracker each call, to the dashboard now and then.

A value may be a tensor on a device that is still computing it. It is copied in the order of the device's
stream and read at a later call, when it has arrived; nothing waits for it before the end. On XLA it is computed by
the graph that is cut next, and reading it would cut it: it is read after a later optimizer step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal, final

import torch

from nbaccel.core.trackers.base import Trackers
from nbaccel.core.trackers.shapes import simple
from nbaccel.core.trackers.system import Sampler
from nbaccel.core.world import World
from nbaccel.wire import events, occasions

__all__ = ["MetricLog", "Snapshot"]

_INTERVAL = 0.1
"""Seconds between two points of one rank on the dashboard."""
_UNKNOWN_TO_NUMPY = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
"""Trackers take tensors through NumPy."""
_MAX_WAITING = 256
"""Calls whose values may be on their way; beyond it the oldest is waited for, to bound the memory."""

Reduced = Literal["mean", "sum"] | None


@final
class Snapshot:
    """Values as they were when logged; device tensors travel to main memory without anyone waiting."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values: dict[str, Any] = {}
        self._arrivals: list[Any] = []
        self.traced = False
        """Whether a value is computed by the graph that an optimizer step cuts."""
        devices = set()
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                self._values[str(name)] = _to_main_memory(value.detach())
                if value.is_cuda:
                    devices.add(value.device)
                self.traced = self.traced or value.device.type == "xla"
            else:
                self._values[str(name)] = simple(value)
        for device in devices:
            arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrival.record(torch.cuda.current_stream(device))
            self._arrivals.append(arrival)

    def ready(self) -> bool:
        """Whether reading would not wait."""
        return all(arrival.query() for arrival in self._arrivals)

    def read(self) -> dict[str, Any]:
        """Plain numbers; tensors of more than one element stay CPU tensors. Waits if it must."""
        for arrival in self._arrivals:
            arrival.synchronize()
        return {
            name: _read(value) if isinstance(value, torch.Tensor) else value
            for name, value in self._values.items()
        }


def _read(value: torch.Tensor) -> Any:
    if value.numel() == 1:
        return value.item()
    value = value.cpu()
    return value.float() if value.dtype in _UNKNOWN_TO_NUMPY else value


def _to_main_memory(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type in ("cpu", "xla"):  # XLA's stays where it is until it is read
        return tensor.clone()
    if tensor.is_cuda:
        # Page-locked: only then the copy is asynchronous.
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    return tensor.to("cpu")


@final
class MetricLog:
    """Takes logged values on every rank. Costs nothing where there is neither tracker nor dashboard.

    Args:
        sampler: measures the machine; its samples go to the trackers with what is logged.
    """

    def __init__(self, trackers: Trackers, *, world: World, sampler: Sampler | None = None) -> None:
        self._trackers, self._is_main, self._sampler = trackers, world.is_main, sampler
        self._step = 0
        self._fails = events.active()  # until the function that was launched has returned
        self._waiting: deque[tuple[Snapshot, int, Reduced]] = deque()
        self._held: dict[str, tuple[float, int, Reduced]] = {}
        self._emitted = float("-inf")
        occasions.at_call_failure(self._show_last)

    @property
    def trackers(self) -> Trackers:
        """Where the values of the main process go."""
        return self._trackers

    def log(self, values: Mapping[str, Any], *, step: int, reduced: Reduced = None) -> None:
        """Keeps `values` of this rank, or, with `reduced`, of all ranks, at optimizer step `step`."""
        if not len(self._trackers) and not events.active():
            return
        self._waiting.append((Snapshot(values), step, reduced))
        self._step = step
        if self._sampler is not None:
            self._deliver_samples(self._sampler)
        while self._waiting and (self._is_ready(*self._waiting[0]) or len(self._waiting) > _MAX_WAITING):
            self._deliver(*self._waiting.popleft())
        if self._held and time.monotonic() - self._emitted >= _INTERVAL:
            self._emit()

    def _is_ready(self, snapshot: Snapshot, step: int, _: Reduced) -> bool:
        return snapshot.ready() and not (snapshot.traced and step >= self._step)

    def _show_last(self) -> None:
        """The newest values before a failure, as far as they have arrived."""
        try:
            while self._waiting and self._is_ready(*self._waiting[0]):
                self._deliver(*self._waiting.popleft())
        except RuntimeError:
            self._waiting.clear()  # a device that has failed: its values will not come
        if self._held and events.active():
            self._emit()

    def flush(self) -> None:
        """Delivers everything logged so far, waiting for devices; the dashboard gets the last of each value."""
        while self._waiting:
            self._deliver(*self._waiting.popleft())
        if self._held:
            self._emit()

    def returned(self) -> None:
        """The function that was launched has: what comes to an end by itself from now on has not failed."""
        self._fails = False

    def leave(self) -> None:
        """`close` when the process ends: trackers are told when the launched function has not returned."""
        self._close(failed=self._fails)

    def close(self) -> None:
        """Delivers everything and ends the trackers; may be called twice."""
        self._close(failed=False)

    def _close(self, *, failed: bool) -> None:
        self.flush()
        if self._sampler is not None:
            self._sampler.close()
            self._deliver_samples(self._sampler)
        self._trackers.finish(failed=failed)

    def _deliver_samples(self, sampler: Sampler) -> None:
        for at, values in sampler.take():
            self._trackers.log_system(values, self._step, at)

    def _deliver(self, snapshot: Snapshot, step: int, reduced: Reduced) -> None:
        values = snapshot.read()
        self._trackers.log(values, step)
        if not events.active() or (reduced is not None and not self._is_main):
            return
        for name, value in values.items():
            if isinstance(value, (bool, int, float)):
                self._held[name] = (float(value), step, reduced)

    def _emit(self) -> None:
        points: dict[tuple[int, Reduced], dict[str, float]] = {}
        for name, (value, step, reduced) in self._held.items():
            points.setdefault((step, reduced), {})[name] = value
        for (step, reduced), values in points.items():
            events.emit(events.Metric(values=values, step=step, reduced=reduced))
        self._held.clear()
        self._emitted = time.monotonic()
