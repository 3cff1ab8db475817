"""A launch as it was asked, checked and resolved: what the notebook's functions and the CLI both start from."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from nbaccel.config import RUN_CONFIG_VARIABLE, RunConfig, combine, duration_seconds
from nbaccel.errors import ConfigError
from nbaccel.layout import require_layout
from nbaccel.session.arguments import foreign_arguments
from nbaccel.session.ending import Limits
from nbaccel.session.environment import Environment, probe
from nbaccel.session.resolve import Plan, resolve
from nbaccel.session.runs import default_root, new_folder, prune
from nbaccel.session.session import Task, check_call
from nbaccel.session.sinks.text import Mode

__all__ = [
    "Configuration",
    "Request",
    "make_folder",
    "make_request",
    "make_task",
    "read_config",
    "read_variables",
]

# For the nearest name, when one is misspelt.
_OWN_NAMES = frozenset(
    {
        "args",
        "dashboard",
        "env",
        "folder",
        "grace",
        "inline",
        "kwargs",
        "max_time",
        "name",
        "output",
        "park_for",
        "returns",
        "stall_after",
        "start_timeout",
    }
)
# torchrun's variables that a rank's own values go over (`rank.spec.rank_environ`).
_PLACE_NAMES = frozenset(
    {
        *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
        *("ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
        *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"),
        *("TORCHELASTIC_USE_AGENT_STORE", RUN_CONFIG_VARIABLE),
    }
)
_launches = itertools.count()
_PRUNE_EVERY = 20  # it looks at every file of every kept run


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A launch that has been checked and resolved."""

    task: Task
    config: RunConfig
    environment: Environment
    plan: Plan
    limits: Limits
    env: Mapping[str, str]
    """Variables for the ranks on top of this process's."""
    output: Mode
    dashboard: Literal["auto"] | bool
    """Whether the run has a panel; "auto" is where somebody looks on."""
    park_for: float
    """Seconds for which the first rank that fails is kept with its frames, in a live notebook."""
    folder: str | Path | bool | None
    """Where the run folder goes; None is the user's state folder, False for none."""


Configuration = RunConfig | Mapping[str, Any] | str | Path
"""Options, or the file they stand in; "auto" searches for the project's or the user's."""


def read_config(config: Configuration) -> RunConfig:
    """What a `config=` argument asks.

    Raises:
        ConfigError: it is none, or something in it is wrong.
    """
    if isinstance(config, RunConfig):
        return config
    if isinstance(config, Mapping):
        return RunConfig.from_mapping(config, place="config")
    if isinstance(config, (str, Path)):
        from nbaccel.session.configfile import load_config  # YAML's reader, for who has a file only

        return load_config(config)
    raise ConfigError(f"config must be a RunConfig, a mapping or a file, not {config!r}")


def make_task(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    name: str | None = None,
    returns: Literal["all", "rank0", "none"] = "all",
) -> Task:
    """The call, checked.

    Raises:
        ConfigError: the function does not take these arguments.
    """
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"name must be a string, not {name!r}")
    own = getattr(function, "__name__", None)
    called = name or (own if isinstance(own, str) else type(function).__name__)
    task = Task(function=function, args=args, kwargs=dict(kwargs or {}), name=called, returns=returns)
    check_call(task)
    return task


def make_request(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    opened_by: str = "",
    whole: bool = True,
    /,
    *,
    config: Configuration | None = None,
    returns: Any = "all",
    output: Any = "auto",
    dashboard: Any = "auto",
    max_time: float | str | None = None,
    start_timeout: float | str = 60,
    grace: float = 1.0,
    stall_after: float | str = 30,
    park_for: float | str = "10min",
    env: Mapping[str, str] | None = None,
    name: str | None = None,
    folder: str | Path | bool | None = None,
    **options: Any,
) -> Request:
    """Everything that can be found wrong before a process starts is found here.

    Args:
        opened_by: what in this process first opened an accelerator, for messages.
        whole: whether the plan's ranks are those of one run: not one host's of several, nor what trials divide.

    Raises:
        ConfigError: something asked cannot be done.
    """
    known = RunConfig.names() - {"sources"}
    accepted, idle = foreign_arguments(
        {k: v for k, v in options.items() if k not in known}, own=_OWN_NAMES | known, function=function
    )
    for note in idle:
        warnings.warn(note, stacklevel=4)
    task = make_task(function, args, kwargs, name, _one_of("returns", returns, ("all", "rank0", "none")))
    asked = RunConfig.from_mapping({k: v for k, v in options.items() if k in known}, place="the launch")
    layers = [asked, RunConfig.from_mapping(accepted, place="the launch's other arguments")]
    if config is not None:
        layers.append(read_config(config))
    combined = combine(*layers)
    for_ranks = read_variables(env)
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ConfigError("this process's working folder is gone; os.chdir(…) to one that is there") from None
    environment = probe()
    environment = replace(environment, variables={**environment.variables, **for_ranks}, opened_by=opened_by)
    plan = resolve(combined, environment)
    if whole and not plan.in_place and plan.device != "tpu":
        require_layout(combined, plan.num_processes, plan.num_processes)
    return Request(
        task=task,
        config=combined,
        environment=environment,
        plan=plan,
        limits=Limits(
            start=duration_seconds(start_timeout, what="start_timeout"),
            grace=0.0 if grace == 0 else duration_seconds(grace, what="grace"),
            run=None if max_time is None else duration_seconds(max_time, what="max_time"),
            stall=0.0 if stall_after == 0 else duration_seconds(stall_after, what="stall_after"),
            hang=Limits.hang_after(combined.collective_timeout),
        ),
        env=for_ranks,
        output=_one_of("output", output, ("auto", "all", "rank0", "none")),
        dashboard=_one_of("dashboard", dashboard, ("auto", True, False)),
        park_for=0.0 if park_for == 0 else duration_seconds(park_for, what="park_for"),
        folder=folder,
    )


def read_variables(env: Mapping[str, str] | None) -> dict[str, str]:
    """What an `env=` argument asks.

    Raises:
        ConfigError: it is no mapping, or has what no environment can hold or what tells a rank its place.
    """
    if env is not None and (not isinstance(env, Mapping) or None in env.values()):
        raise ConfigError(f"env must be a mapping of variables, as {{'NAME': 'value'}}, not {env!r:.60}")
    found = {str(key): str(value) for key, value in (env or {}).items()}
    for name, value in found.items():
        if name in _PLACE_NAMES:
            raise ConfigError(
                f"env has {name}, which tells a rank its place and is set for each: leave it out "
                "(how many ranks there are is num_processes=)"
            )
        if not name or "=" in name or "\0" in name + value:
            raise ConfigError(f"env has {name!r}={value!r:.60}, which no environment can hold")
    return found


def make_folder(name: str, place: str | Path | bool | None, say: Callable[[str], None]) -> Path | None:
    """A new folder for the files of the run `name`; None when none is wanted or none can be written.

    Args:
        place: where it goes; False for none; None for the user's state folder.
    """
    if place is False:
        return None
    root = default_root() if place in (None, True) else Path(str(place)).expanduser()
    try:
        folder = new_folder(root, name)
        if next(_launches) % _PRUNE_EVERY == 0:
            prune(root)
    except OSError as error:
        say(
            f"no run folder: {root} cannot be written ({error}); give folder=… to place it, folder=False for none"
        )
        return None
    return folder


def _one_of(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")
    return value
