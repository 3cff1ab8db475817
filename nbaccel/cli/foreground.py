"""A run in the foreground of a terminal: its output, its signals, its exit code."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, final

from nbaccel.cli.target import Target
from nbaccel.config import duration_seconds
from nbaccel.errors import LaunchError, RunTimeout, WorkerError
from nbaccel.rank.spec import HostPlace
from nbaccel.session.facts import run_facts
from nbaccel.session.inplace import asked_here
from nbaccel.session.interrupts import Presses
from nbaccel.session.panel.reading import Heading
from nbaccel.session.prompts import Prompts
from nbaccel.session.request import Request, make_folder
from nbaccel.session.restarts import attempt, name_attempt, run_again
from nbaccel.session.run import Run
from nbaccel.session.session import start_run
from nbaccel.session.sinks.base import Sink
from nbaccel.session.sinks.folder import FolderSink
from nbaccel.session.sinks.held import Stream
from nbaccel.session.sinks.terminal import TerminalPanel
from nbaccel.session.sinks.text import TextSink, Write

# So many ranks import what only some scripts need as quickly as a process that they are forked from.
_FEW = 2

__all__ = ["exit_code", "report", "run_here", "run_to_end", "say", "start", "terminations"]


def run_to_end(request: Request, target: Target, *, stop_grace: str) -> int:
    """Start the ranks, pass signals on, wait for the end, report a failure; the exit code."""
    seconds = duration_seconds(stop_grace, what="--stop-grace")
    for note in (*request.plan.notes, *target.notes):
        say(note)
    with Presses() as presses, terminations(seconds) as ending:
        limit = request.config.max_restarts or 0
        run = run_again(
            lambda number: ending.watch(
                start(replace(request, plan=attempt(request.plan, number, limit)), target)
            ),
            lambda run: run.wait_done(presses),
            limit=limit,
            resumes=request.config.resume == "auto",
            say=say,
            report=report,
            stopping=lambda: bool(ending.received),
        )
        presses.absorb()
    error = run.exception()
    report(error)
    return 128 + ending.received[0] if ending.received else exit_code(error)


def say(note: str) -> None:
    """Tell the person one sentence."""
    try:
        sys.stderr.write(f"nbaccel: {note}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass  # the stream is closed: nobody is there to be told


def start(request: Request, target: Target, host: HostPlace | None = None) -> Run:
    """The run, its output going to this process's, with a live table below it in a terminal."""
    environment, plan = request.environment, request.plan
    folder = make_folder(request.task.name, request.folder, say)
    made: list[Run] = []
    heading = Heading(
        name=request.task.name,
        device=plan.device,
        precision=request.config.mixed_precision,
        folder=str(folder) if folder else None,
        attempt=name_attempt(plan.variables),
    )
    panel = TerminalPanel(heading) if environment.is_tty and request.output != "none" else None
    text = TextSink(
        _Outlet(_write if panel is None else panel.write, folder),
        num_ranks=plan.num_processes,
        mode=request.output,
        label="long",
        first_rank=host.first_rank if host is not None else None,
        displays=request.output != "none",
    )
    prompts = Prompts(
        lambda rank, id, answer: made[0].reply(rank, id, answer),
        interrupt=lambda: made[0].interrupt(),
        can_ask=sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty(),
        num_ranks=plan.num_processes,
        say=say,
        aside=contextlib.nullcontext if panel is None else panel.aside,
    )
    sinks: list[Sink] = [*([] if panel is None else [panel]), text, prompts]
    if folder is not None:
        facts = run_facts(target.function, request.task.name, None, plan, environment)
        asked = json.loads(request.config.to_json())
        sinks.append(FolderSink(folder, config=asked, run=lambda: {**facts(), **target.facts()}, report=say))
    run = start_run(
        request.task,
        config=request.config,
        plan=plan,
        limits=request.limits,
        env=request.env,
        sinks=sinks,
        folder=folder,
        say=say,
        label=lambda _: None,
        meanwhile=prompts.meanwhile,
        panel=panel is not None,
        host=host,
        lean=plan.num_processes <= _FEW,
    )
    made.append(run)
    return run


def _write(text: str, stream: Stream) -> None:
    file = getattr(sys, stream)
    if file is not None:  # it was closed before the command began
        file.write(text)
        file.flush()


@final
class _Outlet:
    """The ranks' output on its way to this process's streams, each for as long as it can be written.

    The run goes on without: it may be long, and worth more than what was printed of it.
    """

    def __init__(self, write: Write, folder: Path | None) -> None:
        self._write = write
        self._kept = f"its whole output is in {folder}" if folder else "its output is kept nowhere"

    def __call__(self, text: str, stream: Stream) -> None:
        try:
            self._write(text, stream)
        except OSError as error:
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), getattr(sys, stream).fileno())
            what = {"stdout": "standard output", "stderr": "standard error"}[stream]
            why = "whoever read it has left" if isinstance(error, BrokenPipeError) else error.strerror
            say(f"{what} cannot be written any more ({why}). The run goes on, {self._kept}; Ctrl-C ends it")


@final
class _Terminations:
    """What SIGTERM and SIGHUP do to the run: its ranks stop at a step and save, or are interrupted if they cannot.

    Ranks that have not ended `grace` seconds later are interrupted, as by Ctrl-C; a second signal kills.
    """

    def __init__(self, grace: float) -> None:
        self.received: list[int] = []
        self._grace, self._since = grace, 0.0
        self._run: Run | None = None
        self._timer: threading.Timer | None = None
        self._at_once = False

    @property
    def overdue(self) -> bool:
        """Whether the first signal is longer ago than the ranks may take."""
        return bool(self.received) and time.monotonic() > self._since + self._grace

    def watch(self, run: Run) -> Run:
        """From now on this run is the one to be ended."""
        self._run = run
        if self.received:
            run.interrupt()  # it came between two attempts
        return run

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """While entered there is no run: a signal ends the command there and then."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self._since = time.monotonic()
        self.received.append(number)
        if self._at_once:
            sys.exit(128 + number)
        run = self._run
        if run is None:
            return
        if len(self.received) > 1:
            run.kill()
        elif not run.state.options:  # no Accelerator that could stop at a step
            run.interrupt()
        else:
            run.save()  # kept where there is a project_dir
            run.stop()
            self._timer = threading.Timer(self._grace, run.interrupt)
            self._timer.daemon = True
            self._timer.start()

    def close(self) -> None:
        """Forget the interrupt that was to come."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()


@contextmanager
def terminations(grace: float) -> Iterator[_Terminations]:
    """While entered, SIGTERM is taken as the wish to stop, and SIGHUP too: the terminal was closed, or the
    connection to it lost. What ignores SIGHUP, as under nohup, goes on doing so."""
    ending = _Terminations(grace)
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, ending)
    try:
        yield ending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        ending.close()


def report(error: BaseException | None) -> None:
    """Show how a run failed; nothing when it did not."""
    if error is None:
        return
    if isinstance(error, WorkerError):
        text = "\n".join(error.rendered) if sys.stderr.isatty() and error.rendered else str(error)
    elif isinstance(error, KeyboardInterrupt):
        text = f"nbaccel: stopped: {error}"
    else:
        text = f"nbaccel: {error}"
    print(text, file=sys.stderr, flush=True)


def exit_code(error: BaseException | None) -> int:
    """What the command leaves with after a run that ended with `error`."""
    if error is None:
        return 0
    if isinstance(error, WorkerError):
        return _worker_code(error)
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, RunTimeout):
        return 124
    return 125 if isinstance(error, LaunchError) else 2


def _worker_code(error: WorkerError) -> int:
    """The script's own exit code where it has one; a rank that left with 0 before the script's end has failed too."""
    cause = error.__cause__
    if isinstance(cause, SystemExit):
        left_with = cause.args[0] if cause.args else 1  # what travelled has its arguments, not its `code`
        return (left_with % 256 or 1) if isinstance(left_with, int) else 1
    code = error.exitcodes.get(error.ranks[0]) if error.ranks else None
    if code is None:
        return 1
    return 128 - code if code < 0 else code or 1


def run_here(request: Request, target: Target) -> int:
    """The script in this very process, which another launcher started as a rank."""
    for note in request.plan.notes:
        say(note)
    os.environ.update({**request.plan.variables, **request.env})
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    function: Callable[..., Any] = target.function
    try:
        with asked_here(request.config):
            function(target.path, target.arguments)
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001  # shown as Python shows it, without our own frames
        tb = error.__traceback__
        while tb is not None and "nbaccel" in tb.tb_frame.f_globals.get("__name__", "").split("."):
            tb = tb.tb_next
        traceback.print_exception(type(error), error, tb)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0
