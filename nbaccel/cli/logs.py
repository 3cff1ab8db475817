"""`nbaccel logs`: what the ranks of a run have printed."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import click

from nbaccel.cli.runs import complete_run, find_run
from nbaccel.errors import ConfigError
from nbaccel.session.lines import Lines
from nbaccel.session.sinks.capped import read_log
from nbaccel.session.sinks.folder import log_path

__all__ = ["logs"]

_PAUSE = 0.3


@click.command()
@click.argument("run", default="last", shell_complete=complete_run)
@click.option("-r", "--rank", type=int, help="One rank's, as it is; otherwise all, labelled.")
@click.option("-f", "--follow", is_flag=True, help="Go on while the run lives.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where the run folders are.")
def logs(run: str, rank: int | None, follow: bool, folder: Path | None) -> None:
    """Print what the ranks of RUN have printed; RUN is as `nbaccel runs` names it, or a part of that."""
    path = find_run(run, folder)
    known = sorted(int(m[1]) for p in path.iterdir() if (m := re.fullmatch(r"rank-(\d+)\.log", p.name)))
    if rank is not None and rank not in known and not follow:
        raise ConfigError(f"{path.name} has no output of rank {rank}; it has that of {known or 'no rank'}")
    ranks = known if rank is None else [rank]
    if not follow:
        for one in ranks:
            _print(read_log(log_path(path, one)), None if rank is not None else one, len(ranks))
        return
    _follow(path, rank)


def _follow(path: Path, rank: int | None) -> None:
    """What has come, then what comes until the run has ended."""
    seen: dict[int, int] = {}
    while True:
        living = (path / "lock").exists()
        for log in sorted(path.glob("rank-*.log")):
            one = int(log.stem.removeprefix("rank-"))
            if rank not in (None, one):
                continue
            data = read_log(log)
            new = data[seen.get(one, 0) :]
            whole = len(new) if not living else new.rfind(b"\n") + 1
            seen[one] = seen.get(one, 0) + whole
            _print(new[:whole], None if rank is not None else one, 2)
        if not living:
            return
        time.sleep(_PAUSE)


def _print(data: bytes, label: int | None, num_ranks: int) -> None:
    if label is None or num_ranks == 1:
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
        return
    lines = Lines()
    for text in [*lines.feed(data), *lines.finish()]:
        sys.stdout.write(f"[rank {label}] {text}" + ("" if text.endswith("\n") else "\n"))
    sys.stdout.flush()
