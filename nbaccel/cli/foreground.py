"""A run in the foreground of a terminal: its output, its signals, its exit code."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from nbaccel.cli.target import Target
from nbaccel.config import RUN_CONFIG_VARIABLE, duration_seconds
from nbaccel.errors import LaunchError, RunTimeout, WorkerError
from nbaccel.session.facts import run_facts
from nbaccel.session.interrupts import Presses
from nbaccel.session.request import Request, make_folder
from nbaccel.session.run import Run
from nbaccel.session.session import start_run
from nbaccel.session.sinks.base import Sink
from nbaccel.session.sinks.folder import FolderSink
from nbaccel.session.sinks.text import TextSink

__all__ = ["exit_code", "run_here", "run_to_end"]


def run_to_end(request: Request, target: Target, *, stop_grace: str) -> int:
    """Start the ranks, pass signals on, wait for the end, report a failure; the exit code."""
    seconds = duration_seconds(stop_grace, what="--stop-grace")
    for note in (*request.plan.notes, *target.notes):
        say(note)
    with Presses() as presses:
        run = _start(request, target)
        with _terminations(run, seconds) as terminated:
            run.wait_done(presses)
        presses.absorb()
    error = run.exception()
    if terminated:
        _report(error)
        return 128 + signal.SIGTERM
    _report(error)
    return exit_code(error)


def say(note: str) -> None:
    """Tell the person one sentence."""
    try:
        sys.stderr.write(f"nbaccel: {note}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass  # the stream is closed: nobody is there to be told


def _start(request: Request, target: Target) -> Run:
    """The run, its output going to this process's."""
    environment, plan = request.environment, request.plan
    folder = make_folder(request, say)
    sinks: list[Sink] = [
        TextSink(
            _write,
            num_ranks=plan.num_processes,
            mode=request.output,
            label="long",
            transient=environment.is_tty,
        )
    ]
    if folder is not None:
        facts = run_facts(target.function, request.task.name, None, plan, environment)
        asked = json.loads(request.config.to_json())
        sinks.append(FolderSink(folder, config=asked, run=lambda: {**facts(), **target.facts()}, report=say))
    return start_run(
        request.task,
        config=request.config,
        plan=plan,
        limits=request.limits,
        env=request.env,
        sinks=sinks,
        folder=folder,
        say=say,
        label=lambda _: None,
    )


def _write(text: str, stream: str) -> None:
    file = getattr(sys, stream)
    file.write(text)
    file.flush()


@contextmanager
def _terminations(run: Run, grace: float) -> Iterator[list[int]]:
    """While entered, SIGTERM asks the ranks to stop at a step and save; what has come stands in the list.

    Ranks that have not ended `grace` seconds later are interrupted, as by Ctrl-C; a second SIGTERM kills.
    """
    received: list[int] = []
    timers: list[threading.Timer] = []

    def terminated(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            run.kill()
            return
        run.interrupt()
        timers.append(threading.Timer(grace, run.interrupt))
        timers[0].daemon = True
        timers[0].start()

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)
        for timer in timers:
            timer.cancel()
            timer.join()


def _report(error: BaseException | None) -> None:
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
    """The script's own exit code where it has one."""
    cause = error.__cause__
    if isinstance(cause, SystemExit):
        left_with = cause.args[0] if cause.args else 1  # what travelled has its arguments, not its `code`
        return left_with % 256 if isinstance(left_with, int) else 1
    code = error.exitcodes.get(error.ranks[0]) if error.ranks else None
    if code is None:
        return 1
    return 128 - code if code < 0 else code or 1


def run_here(request: Request, target: Target) -> int:
    """The script in this very process, which another launcher started as a rank."""
    for note in request.plan.notes:
        say(note)
    os.environ.setdefault(RUN_CONFIG_VARIABLE, request.config.to_json())
    os.environ.update({**request.plan.variables, **request.env})
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    function: Callable[..., Any] = target.function
    try:
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
