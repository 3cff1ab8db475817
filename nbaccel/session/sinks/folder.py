"""The run folder: what happened, on disk, for whoever asks later.

    config.json     what was asked
    run.json        name, source, versions, devices… as given
    events.jsonl    every event but raw output, one JSON object a line
    rank-<n>.log    the bytes a rank wrote, both streams in order; the middle left out when too long
    result.json     written at the end: the state of each rank, the first failure, times

NaN and infinities stand as the strings "nan", "inf" and "-inf", which `float()` reads. A disk that is
full or read-only is reported once and never ends the run.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, final

from nbaccel.session.runs import LOCK
from nbaccel.session.sinks.capped import CappedLog
from nbaccel.session.state import Failure, RankState, RunState
from nbaccel.wire.events import (
    CommMessage,
    Concluded,
    Died,
    Event,
    ExceptionInfo,
    Heartbeat,
    Output,
    Raised,
    Returned,
    Status,
)

__all__ = ["Facts", "FolderSink", "log_path"]

Facts = Mapping[str, object]

_FLUSH_SECONDS = 0.1
_FLUSH_BYTES = 1 << 18
_LONGEST_LINE = 1 << 20
_DEEPEST_CHAIN = 20
# Of what ranks hold one measurement in so many seconds is kept: for months to come that tells enough.
_BEAT_SECONDS = 30.0


def _complain(message: str) -> None:
    print(message, file=sys.stderr)


def log_path(folder: Path, rank: int) -> Path:
    """The log of a rank in a run folder; `capped.read_log` reads it while the run lives, too."""
    return folder / f"rank-{rank}.log"


@final
class FolderSink:
    """Writes a run's folder. Making one touches no disk: all is done at ticks, on the relay thread.

    Args:
        folder: exists; `runs.new_folder` makes it.
        config: goes into config.json.
        run: goes into run.json; a function is called at the first tick, which keeps what takes time
            (git, versions) off the launch's path.
        log_bytes: the most a rank's log takes; past it the middle is left out.
        event_bytes: the most events.jsonl takes; past it only the ranks' states and ends are written.
        report: told, once, that the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config: Facts,
        run: Facts | Callable[[], Facts],
        log_bytes: int = 16 << 20,
        event_bytes: int = 32 << 20,
        report: Callable[[str], None] = _complain,
    ) -> None:
        self._folder = folder
        self._facts: tuple[Facts, Facts | Callable[[], Facts]] | None = (config, run)
        self._log_bytes = log_bytes
        self._event_room = event_bytes
        self._events_dropped = 0
        self._report = report
        self._logs: dict[int, CappedLog] = {}
        self._lines: list[str] = []
        self._beats: dict[int, float] = {}
        self._buffered = 0
        self._due = 0.0
        self._broken = False
        self._closed = False

    def handle(self, event: Event, state: RunState) -> None:
        if self._broken or self._closed:
            return
        if isinstance(event, Output):
            log = self._logs.get(event.rank)
            if log is None:
                log = self._logs[event.rank] = CappedLog(log_path(self._folder, event.rank), self._log_bytes)
            log.write(event.data)
            self._buffered += len(event.data)
        else:
            self._keep(event)
        if self._buffered > _FLUSH_BYTES:
            self._try(self._flush)

    def tick(self, now: float) -> None:
        if now < self._due or self._closed:
            return
        self._due = now + _FLUSH_SECONDS
        self._try(self._flush)

    def close(self, state: RunState) -> None:
        if self._closed:
            return
        self._try(self._flush)
        self._closed = True
        for log in self._logs.values():
            self._try(log.close, always=True)
        self._try(lambda: self._write_json("result.json", self._result(state)), always=True)
        # From now on the folder may be pruned.
        self._try(lambda: (self._folder / LOCK).unlink(missing_ok=True), always=True)

    def _keep(self, event: Event) -> None:
        if isinstance(event, Heartbeat):
            if event.time - self._beats.get(event.rank, 0.0) < _BEAT_SECONDS:
                return
            self._beats[event.rank] = event.time
        line = _dumps(_event_fields(event)) + "\n"
        if len(line) > _LONGEST_LINE:
            brief = {"type": type(event).__name__, "rank": event.rank, "time": event.time, "bytes": len(line)}
            line = _dumps(brief) + "\n"
        if len(line) > self._event_room and not isinstance(
            event, (Status, Returned, Raised, Died, Concluded)
        ):
            self._events_dropped += 1
            return
        self._event_room -= len(line)
        self._lines.append(line)
        self._buffered += len(line)

    def _flush(self) -> None:
        if self._facts is not None:
            (config, run), self._facts = self._facts, None
            self._write_json("config.json", config)
            self._write_json("run.json", _asked(run) if callable(run) else run)
        self._buffered = 0
        if self._lines:
            text, self._lines = "".join(self._lines), []
            with (self._folder / "events.jsonl").open("a", encoding="utf-8") as file:
                file.write(text)
        for log in self._logs.values():
            log.flush()

    def _try(self, action: Callable[[], None], *, always: bool = False) -> None:
        """Do something that writes. After a failure nothing more is tried, but what is `always` needed."""
        if self._broken and not always:
            return
        try:
            action()
        except OSError as problem:
            if not self._broken:
                self._broken = True
                self._lines, self._buffered = [], 0
                self._report(
                    f"nbaccel: the run folder {self._folder} cannot be written ({problem}); the run goes on, "
                    "and its logs are incomplete. Free some space, or place it with folder=…"
                )
                for log in self._logs.values():
                    self._try(log.close, always=True)
                self._logs = {}

    def _write_json(self, name: str, value: Facts) -> None:
        new = self._folder / f".{name}"
        new.write_text(_dumps(value, indent=1) + "\n", encoding="utf-8")
        os.replace(new, self._folder / name)

    def _result(self, state: RunState) -> Facts:
        ended = state.ended if state.ended is not None else time.time()
        dropped = {str(rank): log.dropped for rank, log in self._logs.items() if log.dropped}
        return {
            "state": state.situation,
            "started": state.started,
            "ended": ended,
            "duration": ended - state.started,
            "failure": _failure(state.failure) if state.failure else None,
            "problem": state.problem or None,
            "ranks": [_rank(rank) for rank in state.ranks],
            "rates": _rates(state),
            "output_bytes_left_out": dropped,
            "events_left_out": self._events_dropped,
            "complete": not self._broken,
        }


def _asked(run: Callable[[], Facts]) -> Facts:
    try:
        return run()
    except Exception as problem:  # noqa: BLE001 - gathered about the user's code; it is written down instead
        return {"error": f"{type(problem).__name__}: {problem}"}


def _rates(state: RunState) -> Facts:
    """Steps per second of each loop at the end, the slowest rank's."""
    found: dict[str, float] = {}
    for rank in state.ranks:
        for name, pace in rank.paces.items():
            if pace.rate is not None:
                found[name] = min(pace.rate, found.get(name, pace.rate))
    return found


def _failure(failure: Failure) -> Facts:
    known = {
        "rank": failure.rank,
        "time": failure.time,
        "exitcode": failure.exitcode,
        "detail": failure.detail,
    }
    return {**known, "error": _exception(failure.info)}


def _rank(rank: RankState) -> Facts:
    known = {"rank": rank.rank, "state": rank.state, "detail": rank.detail, "pid": rank.pid}
    return {**known, "exitcode": rank.exitcode, "error": _exception(rank.error), "seen": rank.seen}


def _exception(info: ExceptionInfo | None, depth: int = 0) -> Facts | None:
    if info is None or depth > _DEEPEST_CHAIN:
        return None
    frames = [{f.name: getattr(frame, f.name) for f in fields(frame)} for frame in info.frames]
    return {
        "type": info.type_name,
        "message": info.message,
        "frames": frames,
        "cause": _exception(info.cause, depth + 1),
        "context": _exception(info.context, depth + 1),
        "exceptions": [_exception(inner, depth + 1) for inner in info.exceptions if depth < _DEEPEST_CHAIN],
    }


def _event_fields(event: Event) -> dict[str, object]:
    known: dict[str, object] = {"type": type(event).__name__}
    for f in fields(event):
        value = getattr(event, f.name)
        if value is None:
            continue
        if isinstance(value, ExceptionInfo):
            value = _exception(value)
        elif isinstance(event, (Returned, Raised)) and f.name in ("value", "error"):
            value = "not kept"  # the user's own objects: they go to the caller, never to disk
        elif isinstance(event, CommMessage) and f.name in ("data", "buffers"):
            value = "not kept"  # it may be a password that somebody has typed into a widget
        elif isinstance(value, Mapping):
            value = dict(value)
        known[f.name] = value
    return known


def _dumps(value: object, *, indent: int | None = None) -> str:
    try:
        return json.dumps(value, allow_nan=False, default=_plain, indent=indent)
    except (TypeError, ValueError):  # NaN and the like, odd keys
        return json.dumps(_sanitized(value), indent=indent, default=_plain)


def _plain(value: Any) -> object:
    """Stands in for a value JSON does not know: its number, else its type."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, Path):
        return str(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return f"<{type(value).__name__}>"
    return number if math.isfinite(number) else str(number)


def _sanitized(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _sanitized(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_sanitized(one) for one in value]
    return value
