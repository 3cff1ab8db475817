"""A run's state from its folder: for runs of other processes, of an earlier day, or that were cut off."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, final

from nbaccel.errors import ConfigError
from nbaccel.session.panel.pages import Report, page, panel_bundle, report
from nbaccel.session.panel.reading import Heading
from nbaccel.session.restarts import name_attempt
from nbaccel.session.runs import RunRecord, default_root, fate, recent
from nbaccel.session.scaling import compared
from nbaccel.session.sinks.capped import read_log
from nbaccel.session.sinks.folder import log_path
from nbaccel.session.state import RunState, fold, new_state
from nbaccel.wire import events
from nbaccel.wire.events import Concluded, Event, ExceptionInfo, Frame, Output

__all__ = ["PastRun", "PastRuns", "find_run", "load_state", "runs"]

_TAIL = 8 << 10
_LOST = "the kernel or process that had launched it was killed or restarted, and its ranks ended with it"
_KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        events.Applied,
        events.Concluded,
        events.Died,
        events.Halted,
        events.Heartbeat,
        events.Knob,
        events.Metric,
        events.Progress,
        events.Raised,
        events.Returned,
        events.Stalled,
        events.Status,
    )
}


_OF_RUNNING = {
    "debug",
    "exception",
    "interrupt",
    "kill",
    "release",
    "reply",
    "result",
    "save",
    "set_knob",
    "stacks",
    "stop",
    "tell",
}
"""What a run has beyond these, and needs its ranks for."""


@final
class PastRun:
    """A run as its folder tells it; shows itself when it is the last expression of a cell.

    Args:
        folder: a run folder.
        show: paints it in a notebook's cell.
    """

    def __init__(
        self,
        folder: Path,
        record: RunRecord | None = None,
        *,
        show: Callable[[PastRun], None] | None = None,
    ) -> None:
        self.folder = folder
        self.record = record
        self._show = show
        run = _json(folder / "run.json")
        self._asked = _json(folder / "config.json")
        self.name = str(run.get("name") or folder.name)
        plan: Any = run.get("plan")
        plan = plan if isinstance(plan, dict) else {}
        self._num_ranks = int(plan.get("num_processes") or 1)
        self._heading = Heading(
            name=self.name,
            device=str(plan.get("device") or "cpu"),
            precision=self._asked.get("mixed_precision"),
            folder=str(folder),
            attempt=name_attempt(plan.get("variables") or {}),
        )

    @property
    def state(self) -> RunState:
        """What the folder says now; of a run that goes on, as of this moment."""
        return load_state(self.folder, self._num_ranks)

    def logs(self, rank: int) -> str:
        """What a rank printed."""
        try:
            return read_log(log_path(self.folder, rank)).decode(errors="replace")
        except FileNotFoundError:
            return ""

    def done(self) -> bool:
        """Whether it has ended, well or not, or its process has."""
        return fate(self.folder) != "running"

    @property
    def heading(self) -> Heading:
        """What its panel says above everything else."""
        return compared(self._heading)

    def show(self) -> None:
        """Show its panel below the cell that runs now; it goes on there while the run does."""
        if self._show is not None:
            self._show(self)
        else:
            print(self.report())

    def report(self) -> Report:
        """The run in at most 40 lines of text, and as values."""
        return report(self.state, self.heading, _no_label, self._asked)

    def save_html(self, path: str | Path) -> Path:
        """Write the panel as an HTML file of its own."""
        target = Path(path)
        target.write_text(page(self.state, self.heading, _no_label), encoding="utf-8")
        return target

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        return panel_bundle(self.state, self.heading, _no_label)

    def __getattr__(self, name: str) -> NoReturn:
        hint = ""
        if name in _OF_RUNNING:
            hint = (
                f": it is read from its folder, and {name} is of the run itself, in the kernel that launched it"
                + ("; %nbaccel debug looks at what failed in a session" if name == "debug" else "")
            )
        raise AttributeError(f"a past run has no {name!r}{hint}", name=name, obj=self)

    def __repr__(self) -> str:
        record = self.record
        return f"<run {self.name!r}, {record.state if record else '?'}, {self.folder}>"


@final
class PastRuns(list[PastRun]):
    """Runs, the newest first, as a table."""

    def __repr__(self) -> str:
        rows = [
            (str(at), run.record.state, _took(run.record.duration), run.name, run.folder.name)
            for at, run in enumerate(self)
            if run.record is not None
        ]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(5)]
        lines = (
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows
        )
        return "\n".join(line.rstrip() for line in lines) or "no runs yet"


def runs(
    root: Path | None = None, limit: int = 20, *, show: Callable[[PastRun], None] | None = None
) -> PastRuns:
    """The latest runs of this user, of all processes; the newest first."""
    found = recent(root or default_root(), limit)
    return PastRuns(PastRun(record.folder, record, show=show) for record in found)


def find_run(text: str, root: Path | None) -> Path:
    """The run folder that `text` names: its path, its name or the end or beginning of it, or "last".

    Raises:
        ConfigError: there is none, or several.
    """
    path = Path(text)
    if (path / "run.json").is_file():
        return path
    root = root or default_root()
    listed = recent(root)
    if text == "last" and listed:
        return listed[0].folder
    found = [record.folder for record in listed if record.folder.name == text]
    found = found or [
        r.folder for r in listed if r.folder.name.startswith(text) or r.folder.name.endswith(text)
    ]
    found = found or [r.folder for r in listed if text == r.name][:1]  # the latest of that name
    if not found:
        raise ConfigError(
            f"there is no run {text!r} in {root}; `nbaccel runs` lists them, `last` is the latest"
        )
    if len(found) > 1:
        raise ConfigError(
            f"{text!r} may be {', '.join(folder.name for folder in found[:5])}: write more of it"
        )
    return found[0]


def load_state(folder: Path, num_ranks: int) -> RunState:
    """Fold what a folder holds. Lines that cannot be read are left out: the process may have been killed, and the state
    then says so, as of its last event."""
    stream = list(_events(folder / "events.jsonl", num_ranks))
    result = _json(folder / "result.json")
    started = result.get("started") or (stream[0].time if stream else folder.stat().st_mtime)
    state = new_state(num_ranks, float(started))
    for event in stream:
        state = fold(state, event)
    if state.ended is None and fate(folder) == "lost":
        state = fold(state, Concluded(rank=0, time=stream[-1].time if stream else started, problem=_LOST))
    ranks = []
    for known in state.ranks:
        try:
            tail = read_log(log_path(folder, known.rank))[-_TAIL:]
        except OSError:
            tail = b""
        if tail:
            output = Output(rank=known.rank, time=known.seen or started, stream="stdout", data=tail)
            known = fold(state, output).ranks[known.rank]
        ranks.append(known)
    ended = result.get("ended")
    return state._replace(
        ranks=tuple(ranks), ended=float(ended) if isinstance(ended, (int, float)) else state.ended
    )


def _events(path: Path, num_ranks: int) -> Iterator[Event]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            event = _event(json.loads(line))
        except (ValueError, TypeError, KeyError):
            continue
        if event is not None and 0 <= event.rank < num_ranks:
            yield event


def _event(known: Mapping[str, Any]) -> Event | None:
    kind = _KINDS.get(str(known.get("type")))
    if kind is None:
        return None
    names = {f.name for f in fields(kind)}
    values = {name: value for name, value in known.items() if name in names}
    if kind is events.Metric:
        values["values"] = {name: float(value) for name, value in values["values"].items()}
    if kind is events.Raised:
        values["info"] = _exception(values["info"])
        values["error"] = None
    made: Event = kind(**values)
    return made


def _exception(known: Mapping[str, Any]) -> ExceptionInfo:
    return ExceptionInfo(
        str(known["type"]),
        str(known["message"]),
        tuple(Frame(**frame) for frame in known.get("frames") or ()),
        _exception(known["cause"]) if known.get("cause") else None,
        _exception(known["context"]) if known.get("context") else None,
        tuple(_exception(inner) for inner in known.get("exceptions") or ()),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _took(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f} s"


def _no_label(_: str) -> None:
    return None
