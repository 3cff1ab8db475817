"""From a function and a plan to a run."""

from __future__ import annotations

import inspect
import os
import reprlib
import sys
import types
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from nbaccel.config import RunConfig
from nbaccel.engines.local import LocalEngine
from nbaccel.errors import ConfigError
from nbaccel.rank.notices import read_notices
from nbaccel.rank.spec import HostPlace, RunSpec
from nbaccel.session import parking
from nbaccel.session.call import CallInFlight, Delivery
from nbaccel.session.ending import Limits
from nbaccel.session.panel.reading import Heading
from nbaccel.session.relay import Relay
from nbaccel.session.report import CellLabel
from nbaccel.session.resolve import Plan
from nbaccel.session.run import Run
from nbaccel.session.sinks.base import Sink
from nbaccel.wire import payload

__all__ = ["Task", "check_call", "start_run"]

Returns = Literal["all", "rank0", "none"]
_FOR_EVER = 7 * 24 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The function to run and how its run is called."""

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any]
    name: str
    returns: Returns = "all"


def check_call(task: Task) -> None:
    """That the function takes these arguments.

    Raises:
        ConfigError: it is not callable, or would raise TypeError for its arguments in every rank.
    """
    if not callable(task.function):
        raise ConfigError(
            f"the first argument must be a function to run on every rank, not {type(task.function).__name__}"
        )
    if inspect.iscoroutinefunction(task.function):
        raise ConfigError(
            f"{task.name} is async and would only give a coroutine; launch a function that runs it: "
            f"lambda: asyncio.run({task.name}(…))"
        )
    if _takes(task.function, len(task.args)) and not task.kwargs:
        return
    try:
        signature = inspect.signature(task.function)
    except (TypeError, ValueError):
        return  # some builtins have none: the call itself will tell
    try:
        signature.bind(*task.args, **task.kwargs)
    except TypeError as error:
        given = f"args={reprlib.repr(task.args)}"  # bounded, and safe from an argument's own repr
        given += f", kwargs={reprlib.repr(dict(task.kwargs))}" if task.kwargs else ""
        raise ConfigError(f"{task.name}{signature} cannot be called with {given}: {error}") from None


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Whether it plainly has as many parameters, all positional: asking `inspect` takes long for a short call."""
    if type(function) is not types.FunctionType or function.__dict__:  # or decorated
        return False
    code = function.__code__
    return code.co_argcount == count and code.co_kwonlyargcount == 0


def start_run(
    task: Task,
    *,
    config: RunConfig,
    plan: Plan,
    limits: Limits,
    env: Mapping[str, str],
    sinks: Sequence[Sink],
    folder: Path | None,
    say: Callable[[str], None],
    label: CellLabel,
    meanwhile: Callable[[], None] | None = None,
    panel: bool = False,
    heading: Heading | None = None,
    show: Callable[[Run], None] | None = None,
    park_for: float = 0.0,
    host: HostPlace | None = None,
    lean: bool = False,
) -> Run:
    """Start the ranks `plan` describes and hand them the task; returns at once.

    Args:
        env: variables for the ranks on top of this process's.
        sinks: what shows and keeps the run; they are closed at its end.
        meanwhile: called by the thread that waits for the run, ten times a second or more.
        panel: whether a sink paints the ranks' bars.
        heading: what its panel says above everything else.
        show: paints the run in a cell.
        lean: make the ranks sooner, though their first DDP step comes later, if there is no warm server yet.
        host: where this host stands when there are several.
        park_for: seconds for which the first rank that fails is kept with its frames; 0 keeps none.

    Raises:
        PayloadError: the function or an argument cannot travel; the message names it.
        LaunchError: the process that makes ranks cannot be started.
    """
    parking.release()
    spec = replace(make_spec(config, plan, env, panel=panel, park=park_for > 0), host=host)
    if config.collective_timeout is None and limits.stall > 0:
        # the watch ends a hang, and names who is missed; a timeout of torch's does not
        spec = replace(spec, collective_timeout=_FOR_EVER)
    parcel, fd = payload.pack((task.function, task.args, dict(task.kwargs)), outward=True)
    delivery = Delivery(parcel=parcel, fd=fd, returns=task.returns)
    call = CallInFlight(
        delivery,
        sinks,
        num_ranks=plan.num_processes,
        limits=limits,
        say=say,
        label=label,
        folder=str(folder) if folder else None,
        expected=expectations(config),
    )
    engine = LocalEngine(config.start_method or default_start_method(), lean=lean)
    relay = Relay(
        engine, spec, delivery, call, start_limit=limits.start, say=say, label=label, park_for=park_for
    )
    asked = {name: value for name, value in asdict(config).items() if name != "sources"}
    return Run(
        relay,
        call,
        name=task.name,
        folder=folder,
        meanwhile=meanwhile,
        heading=heading,
        show=show,
        asked=asked,
    )


def make_spec(
    config: RunConfig,
    plan: Plan,
    env: Mapping[str, str],
    *,
    keep: bool = False,
    panel: bool = False,
    park: bool = False,
) -> RunSpec:
    """What the ranks are told.

    Args:
        keep: whether they are a session's.
        panel: whether bars are painted.
        park: whether one that failed waits with its frames.
    """
    environ = {name: value for name, value in {**os.environ, **env}.items() if name not in plan.unset}
    run_id = uuid.uuid4().hex[:12]
    return RunSpec(
        run_id=run_id,
        num_processes=plan.num_processes,
        device=plan.device,
        runtime=plan.runtime,
        replicas=plan.replicas,
        threads=plan.threads,
        environ=environ,
        variables={k: v for k, v in {**_for_peers(config), **plan.variables}.items() if k not in env},
        cwd=os.getcwd(),
        sys_path=tuple(os.path.abspath(entry) if entry == "" else entry for entry in sys.path),
        argv=tuple(sys.argv),
        notices=read_notices(env),
        config=config.to_json(),
        collective_timeout=config.collective_timeout,
        backend=plan.backend if plan.backend != "nccl" else "cpu:gloo,cuda:nccl",
        panel=panel,
        park=park,
        keep=keep,
    )


def _for_peers(config: RunConfig) -> dict[str, str]:
    """What was asked, in the variables that Hugging Face Accelerate reads, for code that uses it."""
    found = {}
    if config.mixed_precision not in (None, "auto"):
        found["ACCELERATE_MIXED_PRECISION"] = str(config.mixed_precision)
    if config.device == "cpu":
        found["ACCELERATE_USE_CPU"] = "true"
    return found


def expectations(config: RunConfig) -> dict[str, str]:
    """What to say at the end of a run in which nothing used an option that only an Accelerator can use."""
    asked = {"mixed_precision": config.mixed_precision, "strategy": config.strategy}
    return {
        option: f"{option}={value!r} was asked, but the function made no Accelerator: it ran as it was written"
        for option, value in asked.items()
        if value not in (None, "no")
    }


def default_start_method() -> str:
    """Forking a process that has loaded macOS's own frameworks is not safe; Linux is where it is."""
    return "fork" if sys.platform == "linux" else "spawn"
