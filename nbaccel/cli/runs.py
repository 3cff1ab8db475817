"""`nbaccel runs`: the run folders of this user."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from nbaccel.session.reopen import find_run
from nbaccel.session.runs import RunRecord, default_root, recent

__all__ = ["complete_run", "find_run", "read_json", "runs"]


@click.command()
@click.option("-n", "limit", default=20, show_default=True, help="At most so many, the newest first.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where the run folders are.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def runs(limit: int, folder: Path | None, as_json: bool) -> None:
    """List the latest runs: what they were, when, how they ended."""
    listed = recent(folder or default_root(), limit)
    if as_json:
        rows = [
            {
                "run": record.folder.name,
                "name": record.name,
                "started": record.started,
                "state": record.state,
                "duration": record.duration,
                "folder": str(record.folder),
            }
            for record in listed
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    if not listed:
        click.echo(f"no runs in {folder or default_root()}")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("run", "started", "took", "ranks", "state"):
        table.add_column(title, no_wrap=True, overflow="ellipsis")
    for record in listed:
        table.add_row(
            record.folder.name,
            time.strftime("%Y-%m-%d %H:%M", time.localtime(record.started)),
            _took(record.duration),
            str(read_json(record.folder / "run.json").get("plan", {}).get("num_processes", "")),
            _styled(record),
        )
    # into a file or a pipe nothing is cut off
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _styled(record: RunRecord) -> str:
    colour = {"done": "green", "failed": "red", "lost": "red", "running": "cyan"}.get(record.state, "yellow")
    if record.state != "failed":
        return f"[{colour}]{record.state}[/]"
    failure = read_json(record.folder / "result.json").get("failure") or {}
    words = str((failure.get("error") or {}).get("message") or failure.get("detail") or "").splitlines()
    words = words or [f"exit code {failure.get('exitcode')}"]
    from rich.markup import escape

    return f"[{colour}]failed[/] rank {failure.get('rank', '?')}: {escape(words[-1][:80])}"


def _took(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def complete_run(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """For the shell: the runs there are."""
    names = ["last", *(record.folder.name for record in recent(default_root(), 50))]
    return [name for name in names if name.startswith(incomplete)]


def read_json(path: Path) -> dict[str, Any]:
    """A file of a run folder; empty when it is not there or was cut short."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
