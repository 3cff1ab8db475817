"""How well a run scales: its speed beside that of the same function on one rank, from an earlier run's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nbaccel.session.panel.reading import Heading
from nbaccel.session.runs import recent

__all__ = ["compared", "ideal_rates"]

_MOST_FOLDERS = 50


def compared(heading: Heading) -> Heading:
    """The heading of a run, with what its speed is to be compared with."""
    if heading.folder is None or heading.ideal:
        return heading
    return replace(heading, ideal=ideal_rates(Path(heading.folder).expanduser()))


def ideal_rates(folder: Path) -> Mapping[str, float]:
    """By loop, the steps per second of a rank of the run in `folder` if nothing were lost by having several.

    That is what one rank alone made in the latest run of the very same code on the same kind of device, whose
    folder lies beside this one; as many times that as there are ranks when they share a batch (split_batches).
    Empty when there is no such run. Reads up to a hundred small files: not for the path of a launch.
    """
    own = _json(folder / "run.json")
    num_ranks = own.get("plan", {}).get("num_processes", 1)
    if not own.get("source") or num_ranks == 1:
        return {}
    shares = num_ranks if _json(folder / "config.json").get("split_batches") else 1
    for record in recent(folder.parent, _MOST_FOLDERS):
        if record.folder == folder or record.state not in ("done", "stopped"):
            continue
        other = _json(record.folder / "run.json")
        if other.get("plan", {}).get("num_processes") == 1 and _what_ran(other) == _what_ran(own):
            rates = _json(record.folder / "result.json").get("rates") or {}
            if rates:
                return {str(name): shares * float(rate) for name, rate in rates.items()}
    return {}


def _what_ran(run: Mapping[str, Any]) -> tuple[Any, ...]:
    """What must be equal for two runs to be compared; `run` is what run.json holds."""
    return run.get("function"), run.get("source"), run.get("host"), run.get("plan", {}).get("device")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
