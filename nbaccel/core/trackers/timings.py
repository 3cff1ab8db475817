"""`acc.track` and `acc.timed`: how long named blocks of the loop take, how often they run, what they count."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar, cast, final

from nbaccel.errors import ConfigError

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
    """Sums over the blocks of one step, logged together once the loop is past it, and over all.

    Args:
        active: whether this is the main process: elsewhere blocks run and nothing is kept.
        log: (values, step) are logged.
        step: the present step.
    """

    def __init__(
        self, *, active: bool, log: Callable[[Mapping[str, Any], int], None], step: Callable[[], int]
    ) -> None:
        self._active, self._log, self._step = active, log, step
        self._all: dict[str, _Sums] = {}
        self._now: dict[str, _Sums] = {}
        self._at = 0

    def track(self, name: str) -> AbstractContextManager[Block]:
        """A block called `name`, within the blocks around it. As a decorator it is `timed(name)`."""
        return _Tracking(self, name)

    @contextmanager
    def run(self, name: str) -> Iterator[Block]:
        """One run of a block."""
        block = _named(name)
        start = time.perf_counter()
        try:
            with _inside(block):
                yield block
        finally:
            self.take(block, time.perf_counter() - start)

    def timed(self, name: str | Callable[..., Any]) -> Any:
        """A decorator: each call of the function is a block called `name`, or after the function.

        An `async def` is timed to the end of its await. A generator is one block from its first value to its end or
        its close, and only the time within it counts, not what the loop over it does between two values.

        Raises:
            ConfigError: the function is an asynchronous generator.
        """
        if callable(name):
            return self.wrapped(name, getattr(name, "__name__", "function"))
        return lambda function: self.wrapped(function, name)

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

    def take(self, block: Block, seconds: float) -> None:
        """Adds a run that has ended."""
        if not self._active:
            return
        step = self._step()
        if step != self._at:
            self.flush()
            self._at = step
        for sums in (self._all, self._now):
            sums.setdefault(block.name, _Sums()).add(block, seconds)

    def wrapped(self, function: F, name: str) -> F:
        """`function`, each call of which is a block called `name`."""
        if inspect.isasyncgenfunction(function):
            raise ConfigError(
                f"timed({name!r}): an asynchronous generator is not timed as a whole; put `with acc.track({name!r}):` "
                "around what it awaits"
            )
        if inspect.iscoroutinefunction(function):
            made = self._of_coroutine(function, name)
        elif inspect.isgeneratorfunction(function):
            made = self._of_generator(function, name)
        else:
            made = self._of_call(function, name)
        return cast(F, functools.wraps(function)(made))

    def _of_call(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.run(name):
                return function(*args, **kwargs)

        return timed

    def _of_coroutine(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        async def timed(*args: Any, **kwargs: Any) -> Any:
            with self.run(name):
                return await function(*args, **kwargs)

        return timed

    def _of_generator(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
            block, watch = _named(name), _Watch()
            try:
                return (yield from _stepped(function(*args, **kwargs), block, watch))
            finally:
                self.take(block, watch.seconds)

        return timed


@final
class _Tracking(AbstractContextManager[Block]):
    """What `track` gives: `with` runs the block; a function decorated with it is timed as `timed` does."""

    def __init__(self, timings: Timings, name: str) -> None:
        self._timings, self._name = timings, name
        self._run: AbstractContextManager[Block] | None = None

    def __enter__(self) -> Block:
        self._run = self._timings.run(self._name)
        return self._run.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        assert self._run is not None
        return self._run.__exit__(kind, error, trace)

    def __call__(self, function: F) -> F:
        return self._timings.wrapped(function, self._name)


@dataclass(slots=True)
class _Watch:
    seconds: float = 0.0


def _named(name: str) -> Block:
    around = _within.get()
    return Block(f"{around}/{name}" if around else name)


@contextmanager
def _inside(block: Block) -> Iterator[None]:
    """What begins now has the block's name before its own."""
    token = _within.set(block.name)
    try:
        yield
    finally:
        _within.reset(token)


def _stepped(inner: Generator[Any, Any, Any], block: Block, watch: _Watch) -> Generator[Any, Any, Any]:
    """`inner`, inside `block` while it runs and not while its consumer does: else the consumer's blocks had its
    name, and a close from another thread could not undo that. Follows `yield from` (PEP 380)."""
    go: Callable[[], Any] = functools.partial(next, inner)
    while True:
        start = time.perf_counter()
        try:
            with _inside(block):
                value = go()
        except StopIteration as end:
            return end.value
        finally:
            watch.seconds += time.perf_counter() - start
        try:
            go = functools.partial(inner.send, (yield value))
        except BaseException as error:  # noqa: BLE001 - GeneratorExit too: it is the generator's to handle
            go = functools.partial(inner.throw, error)
