"""The run folder: what is written, how much, and what happens when it cannot be."""

from __future__ import annotations

import json
import os
import time
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from nbaccel.session.runs import LOCK, new_folder
from nbaccel.session.sinks.base import Sink
from nbaccel.session.sinks.folder import FolderSink
from nbaccel.session.state import RunState, fold, new_state
from nbaccel.wire.events import (
    CommMessage,
    Concluded,
    Died,
    Event,
    ExceptionInfo,
    Frame,
    Metric,
    Output,
    Progress,
    Raised,
    Returned,
    Status,
)

INNER = ExceptionInfo("KeyError", "KeyError: 'x'", ())
ERROR = ExceptionInfo("ValueError", "ValueError: bad", (Frame("cell.py", 3, "train", "boom()"),), cause=INNER)


class Loud:
    """A result whose repr must not be asked for."""

    def __repr__(self) -> str:
        raise AssertionError("the user's value was rendered")


def play(sink: Sink, num_ranks: int, events: list[Event]) -> RunState:
    state = new_state(num_ranks, started=10.0)
    for event in events:
        state = fold(state, event)
        sink.handle(event, state)
    return state


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def test_folder_holds_the_whole_story(tmp_path: Path) -> None:
    folder = new_folder(tmp_path, "train")
    sink = FolderSink(folder, config={"num_processes": 2}, run=lambda: {"name": "train", "git": None})
    events: list[Event] = [
        Status(rank=0, time=11, state="idle", pid=7),
        Output(rank=0, time=12, stream="stdout", data=b"hello\n\xff"),
        Output(rank=0, time=12, stream="stderr", data=b"warned\n"),
        Metric(rank=0, time=13, values={"loss": 0.5, "bad": float("nan"), "top": float("inf")}, step=3),
        Progress(rank=1, time=13, name="epoch", step=1, times={"data": 0.1}),
        Returned(rank=0, time=14, call=1, value=Loud()),
        Raised(rank=1, time=15, call=1, info=ERROR, error=Loud()),
        Died(rank=1, time=16, exitcode=1),
    ]
    state = play(sink, 2, events)
    assert os.listdir(folder) == [LOCK]
    sink.tick(1.0)
    assert read(folder, "config.json") == {"num_processes": 2}
    assert read(folder, "run.json") == {"name": "train", "git": None}
    assert (folder / "rank-0.log").read_bytes() == b"hello\n\xffwarned\n"
    sink.close(state)
    sink.close(state)
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [line["type"] for line in lines] == ["Status", "Metric", "Progress", "Returned", "Raised", "Died"]
    assert lines[1]["values"] == {"loss": 0.5, "bad": "nan", "top": "inf"}
    assert lines[2]["times"] == {"data": 0.1}
    assert lines[4]["info"]["frames"] == [
        {"filename": "cell.py", "lineno": 3, "function": "train", "source": "boom()"}
    ]
    assert lines[4]["info"]["cause"]["type"] == "KeyError"
    result = read(folder, "result.json")
    assert (result["state"], result["started"], result["duration"]) == ("failed", 10.0, 5.0)
    assert (result["failure"]["rank"], result["failure"]["error"]["message"]) == (1, "ValueError: bad")
    assert [rank["state"] for rank in result["ranks"]] == ["done", "failed"]
    assert not (folder / LOCK).exists()


def test_rank_logs_keep_their_ends_when_a_rank_floods(tmp_path: Path) -> None:
    sink = FolderSink(tmp_path, config={}, run={}, log_bytes=100_000)
    events: list[Event] = [Output(rank=0, stream="stdout", data=b"%09d\n" % i) for i in range(50_000)]
    sink.close(play(sink, 1, events))
    text = (tmp_path / "rank-0.log").read_text()
    assert text.startswith("000000000\n000000001\n")
    assert text.endswith("\n000049999\n")
    assert "… 400000 bytes left out here …" in text
    assert read(tmp_path, "result.json")["output_bytes_left_out"] == {"0": 400_000}


def test_what_is_typed_into_a_widget_is_not_kept(tmp_path: Path) -> None:
    sink = FolderSink(tmp_path, config={}, run={})
    typed = {"method": "echo_update", "state": {"value": "secret"}}
    sink.close(
        play(sink, 1, [CommMessage(rank=0, kind="comm_msg", comm="c", data=typed, buffers=(b"secret",))])
    )
    kept = (tmp_path / "events.jsonl").read_text()
    assert json.loads(kept)["comm"] == "c"
    assert "secret" not in kept


def test_events_past_the_bound_are_counted_and_ends_still_written(tmp_path: Path) -> None:
    sink = FolderSink(tmp_path, config={}, run={}, event_bytes=2000)
    events: list[Event] = [Progress(rank=0, name="p", step=i) for i in range(1000)]
    sink.close(play(sink, 1, [*events, Returned(rank=0, call=1)]))
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["type"] == "Returned"
    assert read(tmp_path, "result.json")["events_left_out"] == 1001 - len(lines) > 900


def test_event_too_long_for_a_line_leaves_its_size(tmp_path: Path) -> None:
    sink = FolderSink(tmp_path, config={}, run={})
    huge = ExceptionInfo("E", "E: " + "x" * 2_000_000, ())
    sink.close(play(sink, 1, [Raised(rank=0, call=1, info=huge)]))
    line = json.loads((tmp_path / "events.jsonl").read_text())
    assert (line["type"], line["rank"]) == ("Raised", 0)
    assert line["bytes"] > 2_000_000


def test_folder_that_vanished_is_reported_once_and_nothing_is_raised(tmp_path: Path) -> None:
    said: list[str] = []
    sink = FolderSink(tmp_path / "gone", config={}, run={}, report=said.append)
    events: list[Event] = [Output(rank=0, stream="stdout", data=b"x"), Returned(rank=0, call=1)]
    state = play(sink, 1, events)
    for now in range(5):
        sink.tick(float(now))
    sink.close(reduce(fold, events, state))
    assert len(said) == 1
    assert "gone" in said[0]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_full_disk_is_reported_once_and_the_result_is_still_tried(tmp_path: Path) -> None:
    (tmp_path / "rank-0.log").symlink_to("/dev/full")
    said: list[str] = []
    sink = FolderSink(tmp_path, config={}, run={}, report=said.append)
    state = play(sink, 1, [Output(rank=0, stream="stdout", data=b"x" * 1000)])
    sink.tick(1.0)
    state = fold(state, Output(rank=0, stream="stdout", data=b"y" * 1_000_000))
    sink.handle(Output(rank=0, stream="stdout", data=b"y" * 1_000_000), state)
    sink.tick(2.0)
    sink.close(fold(state, Concluded(rank=0)))
    assert len(said) == 1
    assert "No space left" in said[0]
    result = read(tmp_path, "result.json")
    assert (result["state"], result["complete"]) == ("stopped", False)


def test_facts_that_cannot_be_gathered_are_written_down_as_such(tmp_path: Path) -> None:
    def facts() -> dict[str, object]:
        raise RuntimeError("no git")

    sink = FolderSink(tmp_path, config={"odd": {1, 2}, "path": tmp_path, "value": Loud()}, run=facts)
    sink.tick(1.0)
    assert read(tmp_path, "run.json") == {"error": "RuntimeError: no git"}
    assert read(tmp_path, "config.json") == {"odd": ["1", "2"], "path": str(tmp_path), "value": "<Loud>"}


def test_no_file_stays_open_after_close(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    sink = FolderSink(tmp_path, config={}, run={}, log_bytes=1000)
    events: list[Event] = [Output(rank=rank, stream="stdout", data=b"x" * 900) for rank in range(4)]
    state = play(sink, 4, events)
    sink.tick(1.0)
    sink.close(state)
    after = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    assert after == before


def test_making_a_folder_and_its_sink_costs_the_launch_little(tmp_path: Path) -> None:
    started = time.perf_counter()
    for _ in range(20):
        FolderSink(new_folder(tmp_path, "f"), config={}, run=dict)
    # 0.3 ms each here; the bound only tells work that does not belong on this path.
    assert (time.perf_counter() - started) / 20 < 0.1
