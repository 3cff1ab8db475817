"""What a run folder says about a run besides its events: code, versions, machine."""

from __future__ import annotations

import inspect
import os
import platform
import re
import reprlib
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nbaccel.provenance import git_commit, package_versions
from nbaccel.session.environment import Environment
from nbaccel.session.resolve import Plan

__all__ = ["run_facts"]

_BRIEF = reprlib.Repr()
_BRIEF.maxlevel = 4
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxset = _BRIEF.maxfrozenset = _BRIEF.maxdict = 20
_BRIEF.maxstring = _BRIEF.maxother = 200
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def run_facts(
    function: Callable[..., Any],
    name: str,
    cell: str | None,
    plan: Plan,
    environment: Environment,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Callable[[], dict[str, object]]:
    """A function that gathers the facts: it takes milliseconds, so the relay calls it once the ranks run.

    Args:
        cell: text of the cell that launched.
        args, kwargs: what the function is called with; kept in brief, as of this moment.
    """
    launched, folder, arguments = time.time(), os.getcwd(), _told(function, args, kwargs or {})

    def gather() -> dict[str, object]:
        return {
            "name": name,
            "function": f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', name)}",
            "arguments": arguments,
            "source": _source(function),
            "cell": cell,
            "launched": launched,
            "cwd": folder,
            "git_commit": git_commit(Path(folder)),
            "host": platform.node(),
            "kernel": environment.kernel,
            "front_end": environment.front_end,
            "python": sys.version.split()[0],
            "versions": package_versions(),
            "plan": asdict(plan),
            "cores": environment.resources.cores,
            "memory": environment.resources.memory,
        }

    return gather


def _told(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, object]:
    """Arguments by name, by which `compare` tells runs apart."""
    try:
        given: Mapping[str, Any] = inspect.signature(function).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # a builtin: it has no signature
        given = {**{str(number): value for number, value in enumerate(args)}, **kwargs}
    return {name: _brief(value) for name, value in given.items()}


def _brief(value: Any) -> object:
    """A value for run.json; without the address in memory that an object may show, which says nothing."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return (
            {str(key): _brief(one) for key, one in value.items()}
            if len(value) <= _BRIEF.maxdict
            else len(value)
        )
    if isinstance(value, str) and len(value) <= _BRIEF.maxstring:
        return value
    return _ADDRESS.sub("", _BRIEF.repr(value))


def _source(function: Callable[..., Any]) -> str | None:
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return None  # a builtin, or its cell is gone
