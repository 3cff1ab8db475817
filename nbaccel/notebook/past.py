"""Runs of other kernels and of earlier days, from their folders: shown below a cell, and followed while they go on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nbaccel.notebook.cell import Cell
from nbaccel.notebook.dashboard import show
from nbaccel.notebook.front import running_kernel, with_tilde
from nbaccel.session import reopen
from nbaccel.session.reopen import PastRun, PastRuns

__all__ = ["runs"]

_READ_SECONDS = 1.0  # its whole folder is read for each painting


def runs(root: Path | None = None, limit: int = 20) -> PastRuns:
    """The latest runs of this user, of all processes; the newest first."""
    in_kernel = running_kernel() is not None
    return reopen.runs(root, limit, show=_show if in_kernel else None)


def _show(run: PastRun) -> None:
    folder = None if run.heading.folder is None else with_tilde(Path(run.heading.folder))
    show(Cell(running_kernel()), replace(run.heading, folder=folder), run, every=_READ_SECONDS)
