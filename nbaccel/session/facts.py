"""What a run folder says about a run besides its events: code, versions, machine."""

from __future__ import annotations

import inspect
import os
import platform
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nbaccel.provenance import git_commit, package_versions
from nbaccel.session.environment import Environment
from nbaccel.session.resolve import Plan

__all__ = ["run_facts"]


def run_facts(
    function: Callable[..., Any], name: str, cell: str | None, plan: Plan, environment: Environment
) -> Callable[[], dict[str, object]]:
    """A function that gathers the facts: it takes milliseconds, so the relay calls it once the ranks run.

    Args:
        cell: text of the cell that launched.
    """
    launched, folder = time.time(), os.getcwd()

    def gather() -> dict[str, object]:
        return {
            "name": name,
            "function": f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', name)}",
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


def _source(function: Callable[..., Any]) -> str | None:
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return None  # a builtin, or its cell is gone
