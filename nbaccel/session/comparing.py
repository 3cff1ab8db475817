"""Two runs side by side, from their folders: what was asked differently, what came of it."""

from __future__ import annotations

import difflib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, final

from nbaccel.errors import ConfigError
from nbaccel.session.panel import comparison
from nbaccel.session.panel.comparison import Difference, Pair, Side
from nbaccel.session.panel.metrics import Chart, read_charts
from nbaccel.session.panel.reading import Heading, read
from nbaccel.session.reopen import find_run, load_state
from nbaccel.session.runs import fate

__all__ = ["Comparison", "RunLike", "compare"]

_MOST_METRICS = 12
_FACTS = ("function", "git_commit", "host", "python", "versions", "cwd", "front_end")
"""Of what run.json holds, what may explain that two runs differ."""
_PLAN = ("num_processes", "device", "device_names", "threads", "backend")


class RunLike(Protocol):
    """A `Run` or what `nbaccel.runs()` lists."""

    @property
    def folder(self) -> Path | None:
        """Where its files are."""


def compare(run_a: str | Path | RunLike, run_b: str | Path | RunLike) -> Comparison:
    """Two runs' curves, and what was different about them; shows itself when it is the last expression of a cell.

    Args:
        run_a, run_b: runs (`nbaccel.last_run()`, `nbaccel.runs()[0]`), their folders, or names as `nbaccel runs`
            lists them, or the beginning or end of one; "last" is the latest.

    Raises:
        ConfigError: there is no such run, it has no folder, or is still starting.
    """
    return Comparison(_folder(run_a), _folder(run_b))


@final
class Comparison:
    """Two runs as their folders tell them, now."""

    def __init__(self, folder_a: Path, folder_b: Path) -> None:
        a, b = _Run(folder_a), _Run(folder_b)
        self._pair = Pair(
            sides=(a.side, b.side), differences=_differences(a, b), code=_code(a.source, b.source)
        )

    @property
    def differences(self) -> dict[str, tuple[str | None, str | None]]:
        """What was different about them, by name; None where it was not asked."""
        return {one.name: (one.a, one.b) for one in self._pair.differences}

    @property
    def metrics(self) -> dict[str, tuple[float | None, float | None]]:
        """The last value of the first twelve metrics of either run, which a run keeps curves of; None where it was
        not logged."""
        return {
            name: (a.last if a is not None else None, b.last if b is not None else None)
            for name, (a, b) in self._pair.charts()
        }

    def save_html(self, path: str | Path) -> Path:
        """Write it as an HTML file of its own."""
        target = Path(path)
        target.write_text(comparison.document(self._pair), encoding="utf-8")
        return target

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        return {"text/html": comparison.html(self._pair), "text/plain": comparison.text(self._pair)}

    def __repr__(self) -> str:
        return comparison.text(self._pair)


@final
class _Run:
    """What a folder says."""

    def __init__(self, folder: Path) -> None:
        run, asked = _json(folder / "run.json"), _json(folder / "config.json")
        if not run and fate(folder) == "running":
            raise ConfigError(
                f"{folder.name} is still starting: its folder does not say yet what it is. Compare it in a moment."
            )
        plan: Any = run.get("plan")
        plan = plan if isinstance(plan, dict) else {}
        state = load_state(folder, int(plan.get("num_processes") or 1))
        heading = Heading(name=str(run.get("name") or folder.name), device=str(plan.get("device") or "cpu"))
        view = read(state, heading, time.time())
        self.source: str = str(run.get("cell") or run.get("source") or "")
        command: Any = run.get("command")
        self.asked: dict[str, Any] = {
            **_flat({"argument": run.get("arguments")}),
            **_flat({"command line": command.get("arguments") if isinstance(command, dict) else None}),
            **_flat({name: plan[name] for name in _PLAN if name in plan}),
            **_flat({name: value for name, value in asked.items() if name != "sources"}),
            **state.options,
            **{f"knob {name}": knob.value for name, knob in state.knobs.items()},
            **_flat({name: run[name] for name in _FACTS if run.get(name) is not None}),
        }
        charts: dict[str, Chart] = {chart.name: chart for chart in read_charts(state.ranks, _MOST_METRICS)}
        self.side = Side(folder=folder, view=view, started=state.started, charts=charts)


def _folder(run: str | Path | RunLike) -> Path:
    if isinstance(run, (str, Path)):
        return find_run(str(run), None)
    if not hasattr(run, "folder"):
        raise ConfigError(f"compare takes runs, their names or folders, not {run!r}")
    folder = run.folder
    if folder is None:
        raise ConfigError(
            f"{run!r} has no run folder to compare it by: it has not begun, or was launched with folder=False"
        )
    return folder


def _differences(a: _Run, b: _Run) -> tuple[Difference, ...]:
    found = []
    for name in dict.fromkeys([*a.asked, *b.asked]):
        one, other = a.asked.get(name), b.asked.get(name)
        if one != other or isinstance(one, bool) != isinstance(other, bool):
            words = _words(one), _words(other)
            if words[0] == words[1]:  # they differ in digits that a rounded number does not show
                words = _words(one, exact=True), _words(other, exact=True)
            found.append(Difference(name=name, a=words[0], b=words[1]))
    return tuple(found)


def _code(a: str, b: str) -> tuple[str, ...]:
    """How the code differs, as the lines of a unified diff without its header."""
    return tuple(list(difflib.unified_diff(a.splitlines(), b.splitlines(), lineterm="", n=2))[2:])


def _flat(values: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """Nested mappings as one, "fsdp.sharding"; without what is empty."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found.update(_flat(value, f"{within}{name}."))
        elif value not in (None, [], ()):
            found[f"{within}{name}"] = value
    return found


def _words(value: Any, *, exact: bool = False) -> str | None:
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        return ", ".join(str(_words(one, exact=exact)) for one in value)
    return f"{value:g}" if isinstance(value, float) and not exact else str(value)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
