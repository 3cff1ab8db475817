"""Logged values on their way to trackers and to whoever watches this rank."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, final

import torch

from nbaccel.core.collectives import MismatchCheck
from nbaccel.core.collectives import reduce as reduce_over_ranks
from nbaccel.core.world import World
from nbaccel.errors import ConfigError
from nbaccel.wire import events

__all__ = ["Logbook"]

_POINT_EVERY = 0.1  # seconds between two points of a curve on the dashboard


class Sink(Protocol):
    """A tracker, as far as logging goes."""

    def log(self, values: Mapping[str, Any], step: int) -> None: ...


@final
class Logbook:
    """Takes values without waiting for the device; hands them on in order when they have arrived."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._waiting: deque[tuple[dict[str, Any], int, Any, Any]] = deque()
        self._emitted_at = 0.0
        self._unsent: events.Metric | None = None

    def add(
        self,
        values: Mapping[str, Any],
        step: int,
        reduction: Literal["mean", "sum"] | None,
        check: MismatchCheck,
        sinks: Sequence[Sink],
    ) -> None:
        """Logs `values` of this rank, or reduced over all ranks (then to be called on all of them)."""
        if reduction not in (None, "mean", "sum"):
            raise ConfigError(f"log(reduce={reduction!r}): it must be 'mean', 'sum' or None")
        taken: dict[str, Any] = dict(values)
        if reduction is not None and self._world.size > 1:
            taken.update(self._reduced(taken, reduction, check))
        if not events.active() and not sinks:
            return
        arrived: Any = None
        for name, value in taken.items():
            if isinstance(value, torch.Tensor):
                value = value.detach()
                if value.device.type == "cuda":
                    arrived = arrived or torch.cuda.Event()  # type: ignore[no-untyped-call]
                    taken[name] = value.to("cpu", non_blocking=True)
                else:
                    taken[name] = value.clone()
        if arrived is not None:
            arrived.record()
        self._waiting.append((taken, step, reduction, arrived))
        self._hand_on(sinks, wait=False)

    def flush(self, sinks: Sequence[Sink]) -> None:
        """Hands on everything, the last point included; waits for the device if it must."""
        self._hand_on(sinks, wait=True)
        if self._unsent is not None:
            events.emit(self._unsent)
            self._unsent = None

    def _reduced(
        self, values: dict[str, Any], reduction: Literal["mean", "sum"], check: MismatchCheck
    ) -> Any:
        numbers = {
            name: value.detach().float() if isinstance(value, torch.Tensor) else torch.tensor(float(value))
            for name, value in values.items()
            if isinstance(value, (torch.Tensor, int, float))
        }
        return reduce_over_ranks(numbers, world=self._world, reduction=reduction, check=check)

    def _hand_on(self, sinks: Sequence[Sink], *, wait: bool) -> None:
        while self._waiting:
            values, step, reduction, arrived = self._waiting[0]
            if arrived is not None and not arrived.query():
                if not wait:
                    return
                arrived.synchronize()
            self._waiting.popleft()
            plain = {name: _plain(value) for name, value in values.items()}
            for sink in sinks:
                sink.log(plain, step)
            self._show(plain, step, reduction)

    def _show(self, values: dict[str, Any], step: int, reduction: Literal["mean", "sum"] | None) -> None:
        if not events.active():
            return
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}
        if not numbers or (reduction is not None and not self._world.is_main):
            return
        self._unsent = events.Metric(values=numbers, step=step, reduced=reduction)
        now = time.monotonic()
        if now - self._emitted_at >= _POINT_EVERY:
            self._emitted_at = now
            events.emit(self._unsent)
            self._unsent = None


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else value
    return value
