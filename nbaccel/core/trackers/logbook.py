"""What `acc.log`, `log_images`, `log_table`, `log_artifact`, `init_trackers` and `get_tracker` do."""

from __future__ import annotations

import atexit
import gc
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Literal, final

import torch
from torch import Tensor

from nbaccel.core.trackers.base import Tracker, Trackers
from nbaccel.core.trackers.metriclog import MetricLog
from nbaccel.core.trackers.opening import open_trackers
from nbaccel.core.trackers.shapes import flat, pictures, rows, simple
from nbaccel.core.trackers.system import Sampler, facts, sample
from nbaccel.core.trackers.timings import Timings
from nbaccel.core.world import World
from nbaccel.errors import ConfigError
from nbaccel.wire import events

__all__ = ["Logbook"]

_logger = logging.getLogger("nbaccel")
_MOST_TOLD = 100


@final
class Logbook:
    """Where logged values go: to the dashboard at once, to the trackers once they have been started.

    Args:
        wanted: trackers to start, by name or ready made.
        folder: where those by name write.
        reduce: (tensors, "mean" or "sum", 1.0) -> the same over the ranks.
        step: the present optimizer step.
        led: whether an optimizer counts the steps; else the present one is that which the script has named last.
    """

    def __init__(
        self,
        world: World,
        *,
        wanted: Sequence[str | Tracker],
        folder: str | None,
        reduce: Callable[[Any, Any, float], Any],
        step: Callable[[], int],
        led: Callable[[], bool],
    ) -> None:
        self._world, self._wanted, self._folder, self._reduce = world, wanted, folder, reduce
        self._step, self._led = step, led
        self._named: int | None = None
        self._log = MetricLog(Trackers(), world=world)
        self._started = self._ended = False
        self._told: set[str] = set()
        self.timings = Timings(active=world.is_main, log=self._log_blocks, step=self._present)
        """Of the blocks that `acc.track` and `acc.timed` name."""

    def start(
        self, project: str, config: Mapping[str, Any] | None, options: Mapping[str, Mapping[str, Any]] | None
    ) -> None:
        """Starts the trackers, on the main process. Those of an earlier start are ended, with the blocks that ran
        until now; blocks from before the first start are of the first run.

        Raises:
            ConfigError: none was asked for, an unknown one, or it has nowhere to write.
        """
        if not self._wanted:
            raise ConfigError("init_trackers needs Accelerator(log_with='jsonl' or 'wandb' or 'all', ...)")
        if self._started:
            self.timings.flush()
        self._log.close()
        if self._world.is_main:
            gc.collect()  # an Accelerator of this cell's last time, whose runs end with it: before the new ones begin
        trackers = open_trackers(
            self._wanted,
            folder=None if self._folder is None else Path(self._folder),
            project=project,
            world=self._world,
            config=config,
            options=options,
        )
        self._started, self._ended = True, False
        if self._world.is_main:
            # the run folder has them too, so that nbaccel.compare can tell how two runs differ
            for name, value in list(flat(config or {}).items())[:_MOST_TOLD]:
                events.emit(events.Applied(option=f"config.{name}", value=str(value)))
        if trackers.can("store_system"):
            trackers.store_system(facts(self._world))
        sampler = Sampler(sample(self._world.device)) if trackers.can("log_system") else None
        self._log = MetricLog(trackers, world=self._world, sampler=sampler)
        # a loop that never says end_training; at exit before the trackers' own handlers, which came before
        atexit.register(_leave, weakref.ref(self))

    def get(self, name: str) -> Tracker:
        """The running tracker of that name; where it was asked for and does not run, one that keeps nothing.

        Raises:
            ConfigError: there is none, or they have not been started.
        """
        if self._wanted and not self._started:
            raise ConfigError(f"get_tracker({name!r}): no tracker runs yet; call init_trackers first")
        return self._log.trackers.get(name)

    @property
    def trackers(self) -> list[Tracker]:
        """Those that run on this rank."""
        return list(self._log.trackers)

    def log(
        self, values: Mapping[str, Any], *, step: int | None, reduction: Literal["mean", "sum"] | None
    ) -> None:
        """Takes values of this rank; with `reduction` those of all ranks, which then all call it."""
        if reduction not in (None, "mean", "sum"):
            raise ConfigError(f"log(reduce={reduction!r}): it must be 'mean', 'sum' or None")
        self._tell_missed()
        at = self._reach(step)
        if reduction is not None and self._world.size > 1:
            numbers = {
                name: _wide(value)
                for name, value in ((name, simple(value)) for name, value in values.items())
                if isinstance(value, (Tensor, int, float))
            }
            values = {**values, **self._reduce(numbers, reduction, 1.0)}
        self._log.log(values, step=at, reduced=reduction)

    def log_images(self, values: Mapping[str, Any], *, step: int | None) -> None:
        """Takes pictures of this rank; the main process keeps its own."""
        self._tell_missed()
        at = self._reach(step)
        if len(self._log.trackers):
            self._log.flush()
            self._log.trackers.log_images({name: pictures(value) for name, value in values.items()}, at)

    def log_table(
        self, name: str, columns: Sequence[str] | None, data: Any, dataframe: Any, *, step: int | None
    ) -> None:
        """Takes a table of this rank; the main process keeps its own."""
        self._tell_missed()
        at = self._reach(step)
        if len(self._log.trackers):
            self._log.flush()
            self._log.trackers.log_table(name, *rows(columns, data, dataframe), at)

    def log_file(self, path: str | Path, name: str | None) -> None:
        """Takes a file or folder that the main process can read.

        Raises:
            ConfigError: on the main process: there is none, or it is to be kept outside the tracker's place.
        """
        self._tell_missed()
        if len(self._log.trackers):
            source = Path(path)
            if not source.exists():
                raise ConfigError(f"log_artifact: there is no {source}")
            called = PurePath(name or source.resolve().name)
            if called.is_absolute() or ".." in called.parts:
                raise ConfigError(f"log_artifact(name={name!r}): give a name or a relative path without '..'")
            self._log.trackers.log_file(source, str(called))

    def _present(self) -> int:
        return self._step() if self._named is None or self._led() else self._named

    def _reach(self, step: int | None) -> int:
        """The step that a call is for; blocks of earlier ones are logged before it, as some trackers take no step
        after a later one."""
        if step is not None:
            self._named = step
        present = self._present()
        self.timings.flush(before=present)
        return present if step is None else step

    def _log_blocks(self, values: Mapping[str, Any], step: int) -> None:
        self._tell_missed()
        self._log.log(values, step=step)

    def _tell_missed(self) -> None:
        """Says once that trackers were asked for and are not there yet, or not any more."""
        if not self._wanted or not self._world.is_main or (self._started and not self._ended):
            return
        why = (
            "end_training has ended them"
            if self._ended
            else "init_trackers was not called before the first log"
        )
        if why not in self._told:
            self._told.add(why)
            _logger.warning("log_with asks for trackers, and %s: they keep nothing of it", why)

    def flush(self) -> None:
        """Hands on what is held back."""
        self.timings.flush()
        self._log.flush()

    def flushing(self) -> Callable[[], None]:
        """`flush`, for a loop: that is held by what a cell has prepared, which must not hold the trackers of an
        Accelerator that is gone."""
        kept = weakref.WeakMethod(self.flush)

        def flush() -> None:
            if (method := kept()) is not None:
                method()

        return flush

    def returned(self) -> None:
        """The function that was launched has: hands on what is held back."""
        self.flush()
        self._log.returned()

    def close(self) -> None:
        """Hands on the last values and ends the trackers; may be called twice."""
        self.timings.flush()
        self._log.close()
        self._ended = self._started

    def leave(self) -> None:
        """`close` when the process ends: trackers are told when the launched function has not returned."""
        self.timings.flush()
        self._log.leave()

    def __del__(self) -> None:
        """Nobody holds its Accelerator any more: what was logged last is handed on, and runs end."""
        self.close()


def _wide(value: Tensor | float) -> Tensor:
    """A number in which a sum over ranks is exact: float64, where the device has it. Of one type whatever it was, for
    a rank may log 1 where another logs 1.5."""
    if not isinstance(value, Tensor):
        return torch.tensor(float(value), dtype=torch.float64)
    return value.detach().to(torch.float64 if value.device.type in ("cpu", "cuda") else torch.float32)


def _leave(logbook: weakref.ref[Logbook]) -> None:
    """The process ends, and nobody has ended the trackers."""
    if (open_ := logbook()) is not None:
        open_.leave()
