"""`nbaccel.map`: a function for many arguments, each call on devices of its own, with one panel."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, final

from nbaccel.errors import ConfigError
from nbaccel.layout import require_layout
from nbaccel.notebook.cell import Bundle, Cell
from nbaccel.notebook.kernel import cell_label, cell_source, culprit
from nbaccel.notebook.tap import Ear, listen
from nbaccel.session.interrupts import Presses
from nbaccel.session.panel.trials import paint_html, paint_text
from nbaccel.session.prompts import Prompts
from nbaccel.session.record import record
from nbaccel.session.request import Request, make_folder, make_request, make_task
from nbaccel.session.resolve import Plan
from nbaccel.session.run import Run
from nbaccel.session.session import start_run
from nbaccel.session.trials import Sweep, SweepInterrupted, SweepResults, Trial, expand, places
from nbaccel.wire.events import Request as RankRequest

__all__ = ["map"]

_WAIT = 0.05
_REPAINT = 0.25
_REFUSED = ("num_processes", "args", "kwargs", "returns", "output", "session", "max_restarts", "park_for")


def map(
    fn: Callable[..., Any],
    grid: Mapping[str, Iterable[Any]] | Iterable[Any],
    devices_per_trial: int = 1,
    *,
    parallel: int | None = None,
    name: str | None = None,
    dashboard: Literal["auto"] | bool = "auto",
    **options: Any,
) -> SweepResults:
    """Call `fn` for every point of a grid, each call a run of its own, side by side on the devices there are.

    A trial that fails does not stop the others. What trials print goes to their run folders
    (`results.trials[3].run.logs(0)`); the panel has a row for each, with its progress and newest metrics. Stop in
    the panel ends all: an Accelerator saves first, and what came back so far is returned. ■ interrupts all.

    ```python
    results = nbaccel.map(train, {"lr": [1e-3, 1e-2], "width": [64, 128]})
    results[2], results.trials[2].arguments
    pandas.DataFrame(results.table())
    ```

    Args:
        fn: run once per trial, on `devices_per_trial` ranks; it may make an Accelerator.
        grid: lists of values by argument name, of which every combination is a trial; or the trials themselves: a
            mapping each for keyword arguments, anything else for one positional argument.
        devices_per_trial: accelerators of each trial, on the CPU its ranks.
        parallel: at most so many at a time; None is as many as devices, or cores, allow.
        name: what it is called; the function's name otherwise.
        dashboard: "auto" is a live table in a notebook that is open; False is text alone.
        **options: as `launch`: device, devices, mixed_precision, strategy, config, env, max_time, folder, ….

    Returns:
        What each trial returned (its rank 0), in the order of the grid; None for one that failed or was stopped.

    Raises:
        ConfigError: something asked cannot be done; nothing was started.
        KeyboardInterrupt: it was interrupted (■); its `results` are those of the trials that were done.
    """
    for option in _REFUSED:
        if option in options:
            raise ConfigError(
                f"map takes no {option}: a trial is {devices_per_trial} rank(s), of which rank 0's "
                "value comes back"
            )
    for number in (devices_per_trial, 1 if parallel is None else parallel):
        if not isinstance(number, int) or number < 1:
            raise ConfigError(f"devices_per_trial and parallel must be ints of at least 1, not {number!r}")
    trials = [Trial(number, arguments) for number, arguments in enumerate(expand(grid))]
    called = name or getattr(fn, "__name__", None) or type(fn).__name__
    requests = _requests(fn, trials, called, options)
    require_layout(requests[0].config, devices_per_trial, devices_per_trial)
    plans = places(requests[0], devices_per_trial, parallel, len(trials))
    source = cell_source()

    def start(trial: Trial, plan: Plan) -> Run:
        return _start(replace(requests[trial.number], plan=plan), source)

    sweep = Sweep(trials, plans, start)
    with Presses() as presses:
        view = _view(sweep, called, requests[0], dashboard)
        try:
            while sweep.step(presses):
                if presses.wait(_WAIT) == "press":
                    sweep.interrupt()
                view.tick()
        finally:
            sweep.close(presses)
            view.close()
        presses.absorb()
    results = SweepResults(trials, called)
    if sweep.interrupted:
        raise SweepInterrupted(results)
    return results


def _requests(
    fn: Callable[..., Any], trials: Sequence[Trial], called: str, options: Mapping[str, Any]
) -> list[Request]:
    """One for each trial, all checked; each resolved for the whole machine."""
    first = make_request(fn, *_call(trials[0]), str(culprit() or ""), False, name=called, **options)
    return [
        replace(first, task=make_task(fn, *_call(trial), name=f"{called}-{trial.number}", returns="rank0"))
        for trial in trials
    ]


def _call(trial: Trial) -> tuple[tuple[Any, ...], Mapping[str, Any] | None]:
    given = trial.arguments
    return ((), given) if isinstance(given, Mapping) else ((given,), None)


def _start(request: Request, source: str | None) -> Run:
    made: list[Run] = []
    folder = make_folder(request.task.name, request.folder, _say)

    def refuse(rank: int, id: str, answer: Any) -> None:
        for run in made:
            run.tell(rank, RankRequest(kind="input", name=id, value=answer))

    prompts = Prompts(refuse, interrupt=lambda: None, can_ask=False, num_ranks=1, say=_say)
    kept = record(
        folder,
        request.task,
        config=request.config,
        plan=request.plan,
        environment=request.environment,
        cell=source,
        report=_say,
    )
    run = start_run(
        request.task,
        config=request.config,
        plan=request.plan,
        limits=request.limits,
        env=request.env,
        sinks=[prompts, *kept],
        folder=folder,
        say=_say,
        label=cell_label,
        panel=True,
    )
    made.append(run)
    return run


def _say(note: str) -> None:
    try:
        sys.stderr.write(f"nbaccel: {note}\n")
    except (OSError, ValueError):
        pass  # the stream is closed: nobody is there to be told


# ── what a person sees ────────────────────────────────────────────────────────────────────────────────


def _view(sweep: Sweep, name: str, request: Request, dashboard: Literal["auto"] | bool) -> _Table | _Words:
    environment = request.environment
    live = (environment.live and environment.front_end != "none") or dashboard is True
    if environment.kernel == "ipykernel" and live and dashboard is not False:
        from IPython import get_ipython

        shell = get_ipython()
        if shell is not None and not (cell := Cell(shell.kernel)).captured:
            return _Table(cell, sweep, name)
    return _Words(sweep, name)


@final
class _Words:
    """A line for each trial that has ended."""

    def __init__(self, sweep: Sweep, name: str) -> None:
        self._sweep, self._name = sweep, name
        self._told: set[int] = set()

    def tick(self) -> None:
        """Tell of those that have ended since."""
        for trial in self._sweep.trials:
            if trial.number not in self._told and trial.state in ("done", "failed", "stopped"):
                self._told.add(trial.number)
                line = " ".join(paint_text([trial.line()], "").splitlines()[-1].split())
                print(f"{self._name} {len(self._told)}/{len(self._sweep.trials)}: trial {line}", flush=True)

    def close(self) -> None:
        """Tell of the rest."""
        self.tick()


@final
class _Table:
    """A live table below the cell, with Stop."""

    def __init__(self, cell: Cell, sweep: Sweep, name: str) -> None:
        self._cell, self._sweep, self._name = cell, sweep, name
        token = secrets.token_hex(6)
        self._controls, self._table = f"nbaccel-{token}-c", f"nbaccel-{token}-t"
        self._stop = _StopButton.make(cell, sweep.stop)
        cell.show(_NOTHING if self._stop is None else self._stop.bundle(), name=self._controls)
        self._painted = 0.0
        self._shown = ""
        cell.show(self._bundle(), name=self._table)

    def tick(self) -> None:
        """Paint it anew, at most four times a second."""
        if self._stop is not None:
            self._stop.ear.pump()
        if time.monotonic() - self._painted >= _REPAINT:
            self._paint()

    def close(self) -> None:
        """Its last form, without a control."""
        if self._stop is not None:
            self._stop.close()
            self._cell.show(_NOTHING, name=self._controls, update=True)
        self._paint()

    def _paint(self) -> None:
        self._painted, before, bundle = time.monotonic(), self._shown, self._bundle()
        if bundle["text/html"] != before:
            self._cell.show(bundle, name=self._table, update=True)

    def _bundle(self) -> Bundle:
        lines = [trial.line() for trial in self._sweep.trials]
        self._shown = paint_html(lines, self._name)
        return {"text/html": self._shown, "text/plain": paint_text(lines, self._name)}


_NOTHING: Bundle = {"text/html": "", "text/plain": ""}


@final
class _StopButton:
    """A core ipywidget that is heard while the cell blocks."""

    def __init__(self, widgets: Any, on_stop: Callable[[], None]) -> None:
        small = widgets.Layout(width="auto", height="26px")
        self.button = widgets.Button(description="Stop", icon="stop", layout=small, tooltip="End all trials")
        self._on_stop = on_stop
        self.button.on_click(self._clicked)
        self.ear: Ear

    @classmethod
    def make(cls, cell: Cell, on_stop: Callable[[], None]) -> _StopButton | None:
        """The button; None where there are no widgets or clicks could not be heard while the cell runs."""
        try:
            import ipywidgets
        except ImportError:
            return None
        made = cls(ipywidgets, on_stop)
        known = frozenset([made.button.comm.comm_id])
        ear = listen(cell, lambda: known)
        if ear is None:
            made.button.close()
            return None
        made.ear = ear
        return made

    def bundle(self) -> Bundle:
        """The widget as an output."""
        view = {"version_major": 2, "version_minor": 0, "model_id": self.button.model_id}
        return {"application/vnd.jupyter.widget-view+json": view, "text/html": "", "text/plain": ""}

    def close(self) -> None:
        """End the widget."""
        self.ear.close()
        self.button.close()

    def _clicked(self, _: object) -> None:
        self.button.description = "Stop at once"
        self.button.button_style = "danger"
        self._on_stop()
