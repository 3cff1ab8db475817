"""Independent calls of one function, each a run of its own, as many at a time as there are places for them."""

from __future__ import annotations

import itertools
import queue
import reprlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, final

from nbaccel.errors import ConfigError, NbaccelError, WorkerError
from nbaccel.session.interrupts import Presses
from nbaccel.session.panel.reading import Heading, Row, read
from nbaccel.session.panel.trials import Line, paint_html, paint_text
from nbaccel.session.request import Request
from nbaccel.session.resolve import Plan, resolve
from nbaccel.session.run import Run

__all__ = ["Sweep", "SweepInterrupted", "SweepResults", "Trial", "expand", "places"]

TrialState = Literal["waiting", "running", "done", "failed", "stopped"]
_HEADING = Heading(name="")


def expand(grid: Mapping[str, Iterable[Any]] | Iterable[Any]) -> list[Any]:
    """The arguments of each trial: of {"lr": [0.1, 0.2], "seed": [0, 1]} all four combinations, the last name
    varying fastest; of anything else its items.

    Raises:
        ConfigError: there is none, a name has no list of values, or it is no mapping or list at all.
    """
    if isinstance(grid, Mapping):
        for name, values in grid.items():
            if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
                raise ConfigError(
                    f"the grid's {name!r} is {values!r}; it must be a list of values: [{values!r}]"
                )
        axes = {name: list(values) for name, values in grid.items()}
        found: list[Any] = [dict(zip(axes, one, strict=True)) for one in itertools.product(*axes.values())]
        found = found if axes else []
    else:
        if isinstance(grid, (str, bytes)) or not isinstance(grid, Iterable):
            raise ConfigError(
                f"the grid is {grid!r}; it must be {{name: [values, ...]}}, or a list of arguments: [{grid!r}]"
            )
        found = list(grid)
    if not found:
        raise ConfigError("the grid has no trial: give {name: [values, ...]}, or a list of arguments")
    return found


def places(whole: Request, per_trial: int, most: int | None, trials: int) -> list[Plan]:
    """What each trial that runs at a time is given: its own devices, or its share of the cores.

    Args:
        whole: the launch that would take every device, or those that were picked.
        per_trial: ranks of a trial.
        most: at most so many places.

    Raises:
        ConfigError: the trials do not fit the devices.
    """
    plan, config = whole.plan, whole.config
    if plan.in_place or plan.device == "tpu":
        what = "a process that is a rank already" if plan.in_place else "a TPU, which one program takes whole"
        raise ConfigError(f"map starts runs beside each other, which is not possible in {what}")
    there = plan.num_processes
    count = max(1, there // per_trial)
    picked = config.devices
    if plan.device in ("xpu", "mps"):
        count = 1  # their runtimes cannot be told which device to take
    if picked == "free":
        raise ConfigError("map cannot take devices='free': list them, devices=[0, 1]")
    count = min(count, trials, most or count)
    asked = replace(config, num_processes=per_trial)
    if plan.device == "cuda":
        indices = tuple(picked or range(there))
        if len(indices) < per_trial:
            raise ConfigError(f"devices_per_trial={per_trial}, but there are {len(indices)} devices for all")
        return [
            resolve(replace(asked, devices=indices[at * per_trial : (at + 1) * per_trial]), whole.environment)
            for at in range(count)
        ]
    plan = resolve(asked, whole.environment)
    if plan.device == "cpu" and "OMP_NUM_THREADS" in plan.variables:
        threads = max(1, whole.environment.resources.cores // (count * per_trial))
        plan = replace(plan, threads=threads, variables={**plan.variables, "OMP_NUM_THREADS": str(threads)})
    return [plan] * count


@final
class Trial:
    """One call and what became of it.

    Args:
        number: from 0, in the order of the grid.
        arguments: keyword arguments, or what stands for the one positional argument.
    """

    def __init__(self, number: int, arguments: Any) -> None:
        self.number = number
        self.arguments = arguments
        self.run: Run | None = None
        """Its run, with its logs, curves and folder; None before it began."""
        self._problem: BaseException | None = None
        self._left_out = False
        self._began = self._ended = 0.0

    def begin(self, start: Callable[[], Run]) -> Run:
        """Start its run."""
        self._began = time.time()
        self.run = start()
        return self.run

    def end(self, problem: BaseException | None = None) -> None:
        """It is over: its run has ended, or could not be started."""
        self._ended, self._problem = time.time(), problem

    def leave_out(self) -> None:
        """It will not be started."""
        self._left_out = True

    @property
    def state(self) -> TrialState:
        """Whether it waits, runs, or how it ended."""
        if self._left_out:
            return "stopped"
        if self._problem is not None:
            return "failed"
        if self.run is None:
            return "waiting"
        if not self.run.done():
            return "running"
        error = self.run.exception()
        return "done" if error is None else "stopped" if isinstance(error, KeyboardInterrupt) else "failed"

    @property
    def folder(self) -> Path | None:
        """Where its run's files are; None before it began."""
        return None if self.run is None else self.run.folder

    @property
    def value(self) -> Any:
        """What its rank 0 returned; None when it did not return."""
        return self.run.result()[0] if self.run is not None and self.state == "done" else None

    @property
    def error(self) -> BaseException | None:
        """Why it failed or was stopped; its own exception is the `__cause__` of a WorkerError."""
        if self._problem is not None or self.run is None or not self.run.done():
            return self._problem
        return self.run.exception()

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return (self._ended or time.time()) - self._began if self._began else 0.0

    def __repr__(self) -> str:
        return f"<trial {self.number}, {self.state}, {reprlib.repr(self.arguments)}>"

    def line(self) -> Line:
        """What is shown of it."""
        row: Row | None = None
        if self.run is not None:
            row = read(self.run.state, _HEADING, time.time()).rows[0]
        error = self.error
        return Line(
            number=self.number,
            arguments=self.arguments,
            state=self.state,
            seconds=self.seconds,
            row=row,
            value=self.value,
            error=_headline(error) if error is not None else "",
        )


def _headline(error: BaseException) -> str:
    """What the trial raised by itself; our own errors say all in their words."""
    cause = error.__cause__ if isinstance(error, WorkerError) else None
    if cause is None and isinstance(error, NbaccelError):
        return str(error).splitlines()[0]
    text = f"{type(cause or error).__name__}: {cause or error}"
    return text.splitlines()[0].removesuffix(": ")


@final
class Sweep:
    """Trials on their way, driven by the thread that waits for them.

    Args:
        plans: one for each place.
        start: (trial, plan) -> its run.
    """

    def __init__(
        self, trials: Sequence[Trial], plans: Sequence[Plan], start: Callable[[Trial, Plan], Run]
    ) -> None:
        self.trials = trials
        self.interrupted = False
        """Whether ■ was pressed."""
        self._start = start
        self._waiting = list(trials)[::-1]
        self._free = list(plans)[::-1]
        self._running: list[tuple[Trial, Run, Plan]] = []
        self._orders: queue.SimpleQueue[Literal["stop", "interrupt"]] = queue.SimpleQueue()
        self._stops = 0

    def step(self, presses: Presses) -> bool:
        """Take in what was asked and what has ended, start what can be; False once all is over.

        Raises:
            NbaccelError: the very first trial cannot be started; later ones fail by themselves.
        """
        while not self._orders.empty():
            self._end_all(self._orders.get())
        for trial, run, plan in list(self._running):
            if run.done():
                run.wait_done(presses)
                trial.end()
                self._running.remove((trial, run, plan))
                self._free.append(plan)
        while self._waiting and self._free:
            self._begin(self._waiting.pop(), self._free.pop())
        return bool(self._waiting or self._running)

    def stop(self) -> None:
        """From any thread: start no more, and ask the Accelerators of those that run to save and stop at a step;
        trials without one are interrupted. A second time: kill them."""
        self._orders.put("stop")

    def interrupt(self) -> None:
        """Start no more and interrupt those that run; a second time, kill them."""
        self.interrupted = True
        self._orders.put("interrupt")

    def close(self, presses: Presses) -> None:
        """Kill what still runs, and wait for its end."""
        for _, run, _ in self._running:
            run.kill()
        for trial, run, _ in self._running:
            run.wait_done(presses)
            trial.end()
        self._running = []

    def _end_all(self, how: Literal["stop", "interrupt"]) -> None:
        self._stops += 1
        for trial in self._waiting:
            trial.leave_out()
        self._waiting = []
        for _, run, _ in self._running:
            if self._stops > 1:
                run.kill()
            elif how == "stop" and run.state.options:
                run.stop()
            else:
                run.interrupt()

    def _begin(self, trial: Trial, plan: Plan) -> None:
        try:
            run = trial.begin(lambda: self._start(trial, plan))
        except NbaccelError as problem:
            if trial.number == 0:
                raise
            trial.end(problem)
            self._free.append(plan)
            return
        self._running.append((trial, run, plan))


def _by_name(value: Any, name: str) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {name: value}


@final
class SweepResults(list[Any]):
    """What each trial returned, in the order of the grid; None for one that did not. Shows itself as a table."""

    def __init__(self, trials: Sequence[Trial], name: str) -> None:
        super().__init__(trial.value for trial in trials)
        self.trials = tuple(trials)
        """With their arguments, states, errors and runs."""
        self.name = name

    def table(self) -> list[dict[str, Any]]:
        """A mapping for each trial, for `pandas.DataFrame`: its arguments, what it returned (by name if that is a
        mapping), state and seconds. A name of both arguments and returned values stands for the argument; the other
        is "returned.<name>", and `state` and `seconds` give way likewise, as "trial.state"."""
        given = [_by_name(trial.arguments, "argument") for trial in self.trials]
        found = [_by_name(trial.value, "value") for trial in self.trials]
        arguments = {name for row in given for name in row}
        values = {f"returned.{name}" if name in arguments else name for row in found for name in row}
        taken = arguments | values
        own = {name: f"trial.{name}" if name in taken else name for name in ("state", "seconds")}
        return [
            {
                **one,
                **{f"returned.{name}" if name in arguments else name: value for name, value in other.items()},
                own["state"]: trial.state,
                own["seconds"]: round(trial.seconds, 3),
            }
            for trial, one, other in zip(self.trials, given, found, strict=True)
        ]

    def __repr__(self) -> str:
        return paint_text([trial.line() for trial in self.trials], self.name)

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        lines = [trial.line() for trial in self.trials]
        return {"text/html": paint_html(lines, self.name), "text/plain": paint_text(lines, self.name)}

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


@final
class SweepInterrupted(KeyboardInterrupt):
    """■ has ended a sweep."""

    def __init__(self, results: SweepResults) -> None:
        super().__init__(
            f"{results.name} was interrupted; what came back before is in this exception's results, and what its "
            "trials left in their run folders"
        )
        self.results = results
        """What the trials that were done have returned; None for the others."""
