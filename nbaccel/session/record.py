"""What a run folder keeps of a task: its events, and the facts it began with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from nbaccel.config import RunConfig
from nbaccel.session.environment import Environment
from nbaccel.session.facts import run_facts
from nbaccel.session.resolve import Plan
from nbaccel.session.session import Task
from nbaccel.session.sinks.folder import FolderSink

__all__ = ["record"]


def record(
    folder: Path | None,
    task: Task,
    *,
    config: RunConfig,
    plan: Plan,
    environment: Environment,
    cell: str | None,
    report: Callable[[str], None],
) -> tuple[FolderSink, ...]:
    """The sink that writes the run folder; none without a folder.

    Args:
        config: what was asked, as it stands in `config.json`.
        cell: text of the cell that launched.
        report: told once when the disk takes no more.
    """
    if folder is None:
        return ()
    facts = run_facts(task.function, task.name, cell, plan, environment, task.args, task.kwargs)
    return (FolderSink(folder, config=json.loads(config.to_json()), run=facts, report=report),)
