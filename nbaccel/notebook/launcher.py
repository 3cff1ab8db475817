"""`notebook_launcher` and `launch`: a function from a cell onto N ranks."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from nbaccel.config import Device, Precision, StartMethod
from nbaccel.errors import ConfigError
from nbaccel.notebook.front import Dashboard, build_front
from nbaccel.notebook.kernel import cell_label, cell_source, culprit
from nbaccel.notebook.past import runs
from nbaccel.notebook.session import Session
from nbaccel.notebook.streams import Streams, say
from nbaccel.parallel import StrategyLike
from nbaccel.session.inplace import asked_here, only_rank
from nbaccel.session.interrupts import Presses
from nbaccel.session.record import record
from nbaccel.session.reopen import PastRun
from nbaccel.session.request import Configuration, Request, make_folder, make_request, make_task
from nbaccel.session.restarts import attempt, run_again
from nbaccel.session.results import Results
from nbaccel.session.run import Run
from nbaccel.session.session import start_run
from nbaccel.session.sinks.text import Mode

__all__ = ["last_run", "launch", "notebook_launcher", "own_last_run"]

_INLINE = {"config", "device", "mixed_precision", "name", "output", "returns", "strategy"}
"""Options that mean the same for one rank in this process, or nothing."""


def notebook_launcher(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    num_processes: int | None = None,
    mixed_precision: Precision | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    inline: bool = False,
    session: Session | None = None,
    **options: Any,
) -> Results:
    """Run `function(*args, **kwargs)` on `num_processes` ranks and return their values, in rank order.

    Blocks until no process of the run is left; `launch` takes the same options and does not block. In a
    process that torchrun or another launcher started as a rank, the function runs right there.

    Args:
        function: any function, also a lambda or closure defined in the notebook.
        args: its positional arguments, a tuple or list.
        num_processes: ranks; None is every accelerator, or on the CPU every core this process may use.
        mixed_precision: "no", "fp16", "bf16" or "auto", for the `Accelerator` the function makes.
        kwargs: its keyword arguments.
        inline: run one rank in this very process, for a debugger; it has torchrun's variables meanwhile.
        session: run it on the ranks of this session, which keep their variables; `num_processes` is then its
            own, and so are all other options but `returns` and `name`.
        **options: as `launch`.

    Raises:
        ConfigError: something asked cannot be done; nothing was started.
        LaunchError: the ranks could not be brought up.
        WorkerError: a rank failed; its own exception is the `__cause__`.
        RunTimeout: it took longer than `max_time`.
        KeyboardInterrupt: it was interrupted (■); its `results` are what ranks returned all the same.
    """
    if not isinstance(args, (tuple, list)):
        raise ConfigError(f"args must be a tuple, not {type(args).__name__}: write args=({args!r:.60},)")
    options = {**options, "num_processes": num_processes, "mixed_precision": mixed_precision}
    if session is not None:
        return _run_in(session, function, tuple(args), kwargs, options)
    if inline:
        return _run_inline(function, tuple(args), kwargs, options)
    request = make_request(function, tuple(args), kwargs, str(culprit() or ""), **options)
    if request.plan.in_place:
        with asked_here(request.config):
            return Results([request.task.function(*request.task.args, **request.task.kwargs)])
    with Presses() as presses:  # from before the first process: no press may find ranks that nobody waits for
        limit = request.config.max_restarts or 0
        run = run_again(
            lambda number: _start(replace(request, plan=attempt(request.plan, number, limit))),
            lambda run: run.wait_done(presses),
            limit=limit,
            resumes=request.config.resume == "auto",
            say=say,
            report=lambda error: print("\n".join(error.rendered), file=sys.stderr, flush=True),
        )
        presses.absorb()
    # it came too late for the ranks; a loop around us is to stop all the same
    if presses.pressed and run.exception() is None:
        raise KeyboardInterrupt(f"{run.name} had ended already: nbaccel.last_run().result() has its values")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError, AttributeError):  # closed, or none at all
            stream.flush()
    return run.take_result()


def launch(
    function: Callable[..., Any],
    /,
    *args: Any,
    num_processes: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
    mixed_precision: Precision | None = None,
    device: Device | None = None,
    devices: Sequence[int] | Literal["free"] | None = None,
    strategy: StrategyLike | None = None,
    config: Configuration | None = None,
    returns: Literal["all", "rank0", "none"] = "all",
    output: Mode = "auto",
    dashboard: Dashboard = "auto",
    max_time: float | str | None = None,
    collective_timeout: float | str | None = None,
    start_timeout: float | str = 60,
    grace: float = 1.0,
    stall_after: float | str = 30,
    park_for: float | str = "10min",
    env: Mapping[str, str] | None = None,
    name: str | None = None,
    start_method: StartMethod | None = None,
    folder: str | Path | bool | None = None,
    **foreign: Any,
) -> Run:
    """Run `function(*args, **kwargs)` on `num_processes` ranks and return a `Run` at once.

    Args:
        device: "cpu", "cuda", "xpu", "mps" or "tpu"; "auto" (the same as None) is the accelerators there are.
        devices: which accelerators, by index ([4, 5]), or "free" for the least used ones.
        strategy: how an `Accelerator` in the function spreads the model: "ddp", "fsdp", FSDP(...), …; see
            docs/strategies.md.
        config: further options, as a RunConfig, a mapping or a file (a path; "auto" is the project's or the
            user's, see docs/cli.md); one asked twice must have one value.
        returns: whose values come back: "all", "rank0" or "none". The list is one per rank all the same.
        output: "auto" folds what several ranks print alike, "all" labels every line, "rank0", "none".
        dashboard: "auto" is a live panel where somebody looks on: a notebook that is open, a terminal when
            rich is installed; True insists on it in any notebook, False is text alone.
        max_time: seconds, or "2h30m", after which the run is ended with RunTimeout.
        collective_timeout: seconds a collective waits for the other ranks before it raises; None never raises,
            but after half an hour of waiting the run is ended, naming the rank that is missed.
        start_timeout: seconds until all ranks must be ready to call the function.
        grace: seconds the other ranks get after one failed, and all after an interrupt.
        stall_after: seconds after which ranks that wait for one another are named with every rank's stack;
            a word comes after 5 s. 0 never looks.
        park_for: seconds, or "10min", for which the first rank that fails is kept for `Run.debug`, in a live
            notebook; the error's last line says so. 0 keeps none.
        env: environment variables for the ranks.
        name: what the run is called; the function's name otherwise.
        start_method: "fork" from the warm server (default on Linux), or "spawn".
        folder: where the run folder goes; False for none; None for the user's state folder.
        **foreign: what other launchers take (`use_port`, `num_nodes`, …); see `session.arguments`.

    Raises:
        ConfigError: something asked cannot be done; nothing was started.
    """
    if "args" in foreign:
        raise ConfigError(
            "launch takes the function's arguments as they are: launch(train, 1, 2) instead of "
            "launch(train, args=(1, 2)); notebook_launcher takes args="
        )
    request = make_request(
        function,
        args,
        kwargs,
        str(culprit() or ""),
        num_processes=num_processes,
        mixed_precision=mixed_precision,
        device=device,
        devices=devices,
        strategy=strategy,
        config=config,
        returns=returns,
        output=output,
        dashboard=dashboard,
        max_time=max_time,
        collective_timeout=collective_timeout,
        start_timeout=start_timeout,
        grace=grace,
        stall_after=stall_after,
        park_for=park_for,
        env=env,
        name=name,
        start_method=start_method,
        folder=folder,
        **foreign,
    )
    if request.config.max_restarts:
        raise ConfigError(
            "max_restarts is for notebook_launcher and `nbaccel launch`, which wait for the run's end"
        )
    if request.plan.in_place:
        raise ConfigError(
            "launch() in a process that already is a rank (RANK and WORLD_SIZE are set): call the function itself"
        )
    run = _start(request)
    if request.environment.kernel != "ipykernel":  # whose end everybody expects to end its runs
        _in_background[:] = [(pid, one) for pid, one in _in_background if not one.done()]
        _in_background.append((os.getpid(), run))
    return run


_in_background: list[tuple[int, Run]] = []
"""Runs that `launch` has left to themselves, each with the process that launched it."""


@atexit.register
def _tell_of_unfinished() -> None:
    for pid, run in _in_background:
        if pid == os.getpid() and not run.done():
            say(f"{run.name} was still running and ends with this process: run.result() waits for it")


_last: list[Run] = []


def last_run() -> Run | PastRun | None:
    """The latest run of this process; before its first, the latest of this user, from its folder; None without any."""
    return own_last_run() or next(iter(runs(limit=1)), None)


def own_last_run() -> Run | None:
    """The latest run of this process; None before the first."""
    return _last[-1] if _last else None


def _start(request: Request) -> Run:
    """The run, with its sinks chosen by the front end."""
    environment, plan = request.environment, request.plan
    streams = Streams()
    for note in plan.notes:
        streams.say(note)
    folder = make_folder(request.task.name, request.folder, streams.say)
    made: list[Run] = []
    front = build_front(
        environment,
        plan,
        name=request.task.name,
        precision=request.config.mixed_precision,
        folder=folder,
        write=streams.write,
        mode=request.output,
        dashboard=request.dashboard,
        made=made,
        label=cell_label,
    )
    kept = record(
        folder,
        request.task,
        config=request.config,
        plan=plan,
        environment=environment,
        cell=cell_source(),
        report=front.say,
    )
    run = start_run(
        request.task,
        config=request.config,
        plan=plan,
        limits=request.limits,
        env=request.env,
        sinks=[*front.sinks, *kept],
        folder=folder,
        say=front.say,
        label=cell_label,
        meanwhile=front.meanwhile,
        panel=front.panel,
        heading=front.heading,
        show=front.show,
        # a failure that is tried again, or that nobody looks at, keeps nothing
        park_for=request.park_for if environment.live and not request.config.max_restarts else 0.0,
    )
    made.append(run)
    _last[:] = [run]
    return run


def _run_in(
    session: Session,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> Results:
    """On ranks that are there already."""
    asked = {name: value for name, value in options.items() if value is not None}
    num_processes = asked.pop("num_processes", session.num_processes)
    own = {name: asked.pop(name) for name in ("returns", "name") if name in asked}
    if asked or num_processes != session.num_processes:
        what = ", ".join(sorted(asked)) or f"num_processes={num_processes}"
        raise ConfigError(
            f"{what} was asked, but the session's {session.num_processes} ranks are there already: "
            "ask for it where the session starts"
        )
    return session.launch(make_task(function, args, kwargs, **own))


def _run_inline(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> Results:
    """One rank in this very process."""
    asked = {name: value for name, value in options.items() if value is not None}
    if asked.pop("num_processes", 1) != 1 or not asked.keys() <= _INLINE:
        what = ", ".join(sorted(asked.keys() - _INLINE)) or f"num_processes={options['num_processes']}"
        raise ConfigError(f"inline=True runs one rank in this process: leave out {what}")
    request = make_request(function, args, kwargs, num_processes=1, **asked)
    with asked_here(request.config), only_rank():
        value = request.task.function(*args, **request.task.kwargs)
    return Results([None if request.task.returns == "none" else value])
