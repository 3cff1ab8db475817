"""Where the time of a training step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, final, get_args

import torch

__all__ = ["DeviceClock", "Part", "StepTimes", "Stopwatch", "profiled"]

Part = Literal["data", "transfer", "forward", "backward", "communication", "optimizer", "checkpoint"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Seconds by part of the step on this rank, summed over `steps` optimizer steps."""

    steps: int
    wall: float
    """Seconds from the beginning of the first step to the end of the last."""
    parts: Mapping[str, float]
    """By name: data (waiting for it), transfer (host to device), forward, backward, communication (what of
    it nothing else hides), optimizer, checkpoint, and other (the rest of the wall time)."""

    def per_step(self) -> dict[str, float]:
        """Mean seconds per optimizer step, by part."""
        return {name: seconds / max(1, self.steps) for name, seconds in self.parts.items()}


class Waiting(Protocol):
    """A loader's own counters."""

    data_seconds: float

    @property
    def transfer_seconds(self) -> float: ...


@final
class Stopwatch:
    """Sums the parts on the host's monotonic clock.

    On an accelerator the host runs ahead of the device, so there every 16th step is measured with device
    events as well; they are read when they are done, and their mean stands for the steps between.
    """

    def __init__(self, device: torch.device) -> None:
        # Attributes and no dict: they are added to several times in every step.
        self.data = self.transfer = self.forward = self.backward = self.communication = 0.0
        self.optimizer = self.checkpoint = 0.0
        self.steps = 0
        """Optimizer steps."""
        self.until: float = 0.0
        """When the last of them had ended."""
        self.computed_at = 0.0
        """When the last backward had computed its gradients and only communication was left."""
        self._loaders: list[Waiting] = []
        self._taken: dict[int, tuple[float, float]] = {}
        self._began: float | None = None
        self._reported: dict[str, float] = {}
        self.device = DeviceClock() if device.type == "cuda" else None

    def watch(self, loader: Waiting) -> None:
        """Count the waiting of this loader."""
        self._loaders.append(loader)

    def begin(self, now: float) -> None:
        """The loop begins, if it has not yet: with a pass over a prepared loader, or with a first forward."""
        if self._began is None:
            self._began = self.until = now

    def step(self) -> None:
        """An optimizer step has ended, at `until`."""
        self.steps += 1
        if self.device is not None:
            self.device.step()

    def on_gradients_computed(self) -> None:
        """Called by autograd when its graph is done, before DDP waits for what is still under way."""
        self.computed_at = time.perf_counter()

    def on_backward_begins(self, grad: torch.Tensor) -> None:
        """A hook on the loss: callbacks queued first are called first, so ours comes before DDP's."""
        engine = torch.autograd.Variable._execution_engine
        engine.queue_callback(self.on_gradients_computed)

    @contextmanager
    def measure(self, part: Part) -> Iterator[None]:
        """Adds the time spent inside to a part."""
        started = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, part, getattr(self, part) + time.perf_counter() - started)

    def totals(self) -> dict[str, float]:
        """Seconds by part since the beginning, without "other"."""
        totals: dict[str, float] = {part: getattr(self, part) for part in PARTS}
        moved = sum(loader.transfer_seconds for loader in self._loaders)
        totals["transfer"] += moved
        # The loader's waiting includes what the move took the host.
        totals["data"] += max(0.0, sum(loader.data_seconds for loader in self._loaders) - moved)
        if self.device is not None:
            totals.update(self.device.estimate(self.steps))
        return totals

    def read(self) -> StepTimes:
        """Everything so far."""
        totals = self.totals()
        wall = self.until - (self._began or self.until)
        totals["other"] = max(0.0, wall - sum(totals.values()))
        return StepTimes(steps=self.steps, wall=wall, parts=totals)

    def since_last(self) -> dict[str, float]:
        """Seconds by part since the last call, for a Progress event."""
        totals = self.totals()
        fresh = {name: max(0.0, value - self._reported.get(name, 0.0)) for name, value in totals.items()}
        self._reported = totals
        return {name: value for name, value in fresh.items() if value > 0}


@final
class DeviceClock:
    """Parts measured by pairs of device events on every 16th step; nothing waits for them."""

    EVERY = 16

    def __init__(self) -> None:
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._sums: dict[str, float] = {}
        self._steps = 0
        self._sampled = 0
        self.sampling = True

    def mark(self) -> torch.cuda.Event | None:
        """An event at this point of the stream, or None in a step that is not measured."""
        if not self.sampling:
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def add(self, part: str, started: torch.cuda.Event | None) -> None:
        """The part that began with `started` has been enqueued."""
        if started is not None:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._pending.append((part, started, event))

    def step(self) -> None:
        """The next step begins."""
        self._sampled += self.sampling
        self._steps += 1
        self.sampling = self._steps % self.EVERY == 0

    def estimate(self, steps: int) -> dict[str, float]:
        """Seconds by part for `steps` steps, from those measured that have finished."""
        waiting = []
        for part, start, end in self._pending:
            if end.query():  # type: ignore[no-untyped-call]
                self._sums[part] = self._sums.get(part, 0.0) + start.elapsed_time(end) / 1e3
            else:
                waiting.append((part, start, end))
        self._pending = waiting
        return {part: total / max(1, self._sampled) * steps for part, total in self._sums.items()}


@contextmanager
def profiled(folder: str | Path | None, rank: int, options: Mapping[str, Any]) -> Iterator[Any]:
    """A torch profiler with these options; writes `trace-rank-N.json` to `folder` (None: nowhere)."""
    from torch.profiler import profile

    with profile(**options) as profiler:
        yield profiler
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(Path(folder) / f"trace-rank-{rank}.json"))
