"""`acc.track` and `acc.timed`: how long named blocks of the loop take, how often they run, what they count."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast, final

__all__ = ["Block", "Timings", "Tracked"]

F = TypeVar("F", bound=Callable[..., Any])

_within: ContextVar[str] = ContextVar("nbaccel_block", default="")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracked:
    """What is known of a named block: of all times it ran."""

    count: int
    """How often it ran, to its end or to an exception."""
    seconds: float
    """On the host's clock, blocks within it included; work a device still does at its end is not waited for."""
    counts: Mapping[str, float]
    """What it counted, added up."""
    metrics: Mapping[str, Any]
    """The newest of what it logged."""


@final
class Block:
    """One run of a named block: what `with acc.track(...) as block` gives."""

    def __init__(self, name: str) -> None:
        self.name = name
        """With the names of the blocks around it: "eval/generate"."""
        self.counts: dict[str, float] = {}
        self.metrics: dict[str, Any] = {}

    def count(self, name: str, number: float = 1) -> None:
        """Adds to a count, which is logged as "<block>/<name>"."""
        self.counts[name] = self.counts.get(name, 0) + number

    def log(self, values: Mapping[str, Any]) -> None:
        """Takes custom metrics, each logged as "<block>/<name>"."""
        self.metrics.update(values)


@dataclass(slots=True)
class _Sums:
    count: int = 0
    seconds: float = 0.0
    counts: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    def add(self, block: Block, seconds: float) -> None:
        self.count += 1
        self.seconds += seconds
        for name, number in block.counts.items():
            self.counts[name] = self.counts.get(name, 0) + number
        self.metrics.update(block.metrics)


@final
class Timings:
    """Sums over the blocks of one optimizer step, logged together once the loop is past it, and over all.

    Args:
        active: whether this is the main process: elsewhere blocks run and nothing is kept.
        log: (values, step) are logged.
        step: the present optimizer step.
    """

    def __init__(
        self, *, active: bool, log: Callable[[Mapping[str, Any], int], None], step: Callable[[], int]
    ) -> None:
        self._active, self._log, self._step = active, log, step
        self._all: dict[str, _Sums] = {}
        self._now: dict[str, _Sums] = {}
        self._at = 0

    @contextmanager
    def track(self, name: str) -> Iterator[Block]:
        """A block called `name`, within the blocks around it."""
        around = _within.get()
        block = Block(f"{around}/{name}" if around else name)
        token = _within.set(block.name)
        start = time.perf_counter()
        try:
            yield block
        finally:
            seconds = time.perf_counter() - start
            _within.reset(token)
            if self._active:
                self._take(block, seconds)

    def timed(self, name: str | Callable[..., Any]) -> Any:
        """A decorator: each call of the function is a block called `name`, or after the function."""
        if callable(name):
            return self._wrapped(name, getattr(name, "__name__", "function"))
        return lambda function: self._wrapped(function, name)

    def read(self) -> dict[str, Tracked]:
        """What is known of every block so far, by its whole name; empty on other ranks than the main one."""
        return {
            name: Tracked(
                count=sums.count,
                seconds=sums.seconds,
                counts=dict(sums.counts),
                metrics=dict(sums.metrics),
            )
            for name, sums in self._all.items()
        }

    def flush(self, *, before: int | None = None) -> None:
        """Log what is held back; with `before` only if that is of an earlier step."""
        if self._now and (before is None or self._at < before):
            held, self._now = self._now, {}
            values: dict[str, Any] = {}
            for name, sums in held.items():
                values[f"{name}/seconds"], values[f"{name}/count"] = sums.seconds, sums.count
                values.update((f"{name}/{key}", value) for key, value in sums.counts.items())
                values.update((f"{name}/{key}", value) for key, value in sums.metrics.items())
            self._log(values, self._at)

    def _take(self, block: Block, seconds: float) -> None:
        step = self._step()
        if step != self._at:
            self.flush()
            self._at = step
        for sums in (self._all, self._now):
            sums.setdefault(block.name, _Sums()).add(block, seconds)

    def _wrapped(self, function: F, name: str) -> F:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.track(name):
                return function(*args, **kwargs)

        return cast(F, timed)
