"""`notebook_launcher` and `launch`: a function from a cell onto N ranks."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from nbaccel.config import Device, Precision, RunConfig, StartMethod, combine, duration_seconds
from nbaccel.errors import ConfigError
from nbaccel.notebook.kernel import cell_label
from nbaccel.session.arguments import foreign_arguments
from nbaccel.session.environment import Environment, probe
from nbaccel.session.relay import Limits
from nbaccel.session.resolve import Plan, resolve
from nbaccel.session.results import Results
from nbaccel.session.run import Run
from nbaccel.session.session import Task, check_call, start_run
from nbaccel.session.sinks.base import Sink
from nbaccel.session.sinks.text import Mode, TextSink

__all__ = ["last_run", "launch", "notebook_launcher"]

_last: list[Run] = []


def notebook_launcher(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    num_processes: int | None = None,
    mixed_precision: Precision | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Results:
    """Run `function(*args, **kwargs)` on `num_processes` ranks and return their values, in rank order.

    Blocks until no process of the run is left; `launch` takes the same options and does not block.

    Args:
        function: any function, also a lambda or closure defined in the notebook.
        args: its positional arguments, a tuple or list.
        num_processes: ranks; None is every accelerator, or on the CPU every core this process may use.
        mixed_precision: "no", "fp16", "bf16" or "auto", for the `Accelerator` the function makes.
        kwargs: its keyword arguments.
        **options: as `launch`.

    Raises:
        ConfigError: something asked cannot be done; nothing was started.
        LaunchError: the ranks could not be brought up.
        WorkerError: a rank failed; its own exception is the `__cause__`.
        RunTimeout: it took longer than `max_time`.
        KeyboardInterrupt: it was interrupted (■).
    """
    if not isinstance(args, (tuple, list)):
        raise ConfigError(f"args must be a tuple, not {type(args).__name__}: write args=({args!r:.60},)")
    if options.get("inline"):
        return _run_inline(function, tuple(args), kwargs or {}, num_processes, options)
    run = launch(
        function,
        *args,
        num_processes=num_processes,
        kwargs=kwargs,
        mixed_precision=mixed_precision,
        **options,
    )
    if isinstance(run, Results):
        return run
    try:
        return run.result()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def launch(
    function: Callable[..., Any],
    /,
    *args: Any,
    num_processes: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
    mixed_precision: Precision | None = None,
    device: Device | None = None,
    devices: Sequence[int] | Literal["free"] | None = None,
    strategy: str | None = None,
    config: RunConfig | Mapping[str, Any] | None = None,
    returns: Literal["all", "rank0", "none"] = "all",
    output: Mode = "auto",
    max_time: float | str | None = None,
    collective_timeout: float | str | None = None,
    start_timeout: float | str = 60,
    grace: float = 1.0,
    env: Mapping[str, str] | None = None,
    name: str | None = None,
    start_method: StartMethod | None = None,
    folder: str | Path | bool | None = None,
    **foreign: Any,
) -> Run:
    """Run `function(*args, **kwargs)` on `num_processes` ranks and return a `Run` at once.

    Args:
        device: "cpu", "cuda", "xpu" or "mps"; "auto" (the same as None) is the accelerators there are.
        devices: which accelerators, by index ([4, 5]), or "free" for the least used ones.
        strategy: how an `Accelerator` in the function spreads the model: "ddp" or "single".
        config: further options, as a RunConfig or a mapping; one asked twice must have one value.
        returns: whose values come back: "all", "rank0" or "none". The list is one per rank all the same.
        output: "auto" folds what several ranks print alike, "all" labels every line, "rank0", "none".
        max_time: seconds, or "2h30m", after which the run is ended with RunTimeout.
        collective_timeout: seconds a collective waits for the other ranks; None is torch's default.
        start_timeout: seconds until all ranks must be ready to call the function.
        grace: seconds the other ranks get after one failed, and all after an interrupt.
        env: environment variables for the ranks.
        name: what the run is called; the function's name otherwise.
        start_method: "fork" from the warm server (default on Linux), or "spawn".
        folder: where the run folder goes; False for none; None for the user's state folder.
        **foreign: what other launchers take (`use_port`, `num_nodes`, …); see `session.arguments`.

    Raises:
        ConfigError: something asked cannot be done; nothing was started.
    """
    accepted, notes = foreign_arguments(foreign, own=_OWN)
    for note in notes:
        warnings.warn(note, stacklevel=3)
    task = Task(
        function=function,
        args=args,
        kwargs=dict(kwargs or {}),
        name=name or getattr(function, "__name__", type(function).__name__),
        returns=_one_of("returns", returns, ("all", "rank0", "none")),
    )
    check_call(task)
    asked = RunConfig.from_mapping(
        {
            "num_processes": num_processes,
            "mixed_precision": mixed_precision,
            "device": device,
            "devices": devices if devices is None or isinstance(devices, str) else tuple(devices),
            "strategy": strategy,
            "start_method": start_method,
            "collective_timeout": None
            if collective_timeout is None
            else duration_seconds(collective_timeout),
        },
        place="the launch",
    )
    limits = Limits(
        start=duration_seconds(start_timeout, what="start_timeout"),
        grace=0.0 if grace == 0 else duration_seconds(grace, what="grace"),
        run=None if max_time is None else duration_seconds(max_time, what="max_time"),
    )
    layers = [asked, RunConfig.from_mapping(accepted, place="the launch's other arguments")]
    if config is not None:
        layers.append(
            config if isinstance(config, RunConfig) else RunConfig.from_mapping(config, place="config")
        )
    resolved = combine(*layers)
    environment = probe()
    plan = resolve(resolved, environment)
    return _start(task, resolved, plan, environment, limits, env or {}, output, folder)


_OWN = tuple(launch.__kwdefaults__ or ()) + ("args", "inline")


def last_run() -> Run | None:
    """The latest run of this process; None before the first."""
    return _last[-1] if _last else None


def _start(
    task: Task,
    config: RunConfig,
    plan: Plan,
    environment: Environment,
    limits: Limits,
    env: Mapping[str, str],
    output: Mode,
    folder: str | Path | bool | None,
) -> Run:
    terminal = environment.kernel != "ipykernel"
    # taken now: a later cell may have redirected them
    streams = {"stdout": sys.stdout, "stderr": sys.stderr}

    def write(text: str, stream: str) -> None:
        streams[stream].write(text)

    def say(note: str) -> None:
        write(f"nbaccel: {note}\n", "stderr")

    for note in plan.notes:
        say(note)

    def sinks(run_id: str, place: Path | None) -> list[Sink]:
        return [
            TextSink(
                write,
                num_ranks=plan.num_processes,
                mode=output,
                label="long" if terminal else "short",
                transient=environment.live or environment.is_tty,
            )
        ]

    run = start_run(
        task,
        config=config,
        plan=plan,
        limits=limits,
        env=env,
        sinks=sinks,
        folder=None,
        say=say,
        label=cell_label,
    )
    _last[:] = [run]
    return run


def _run_inline(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    num_processes: int | None,
    options: Mapping[str, Any],
) -> Results:
    """One rank in this very process, for a debugger."""
    others = sorted(name for name, value in options.items() if name != "inline" and value is not None)
    if num_processes not in (None, 1) or others:
        what = f"num_processes={num_processes}" if num_processes not in (None, 1) else ", ".join(others)
        raise ConfigError(f"inline=True runs one rank in this process: leave out {what}")
    check_call(
        Task(function=function, args=args, kwargs=kwargs, name=getattr(function, "__name__", "function"))
    )
    return Results([function(*args, **kwargs)])


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> Any:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")
    return value
