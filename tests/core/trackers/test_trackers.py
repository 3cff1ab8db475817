from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nbaccel.core.trackers import MetricLog, Trackers, open_trackers
from nbaccel.core.trackers.metriclog import Snapshot
from nbaccel.core.world import World, single
from nbaccel.errors import ConfigError
from nbaccel.wire import events

OTHER = World(rank=1, local_rank=1, size=2, local_size=2, device=torch.device("cpu"), backend="gloo")


class Memory:
    """A tracker that remembers; raises when `broken`."""

    name = "memory"

    def __init__(self, broken: bool = False) -> None:
        self.broken, self.config, self.lines, self.finished = broken, {}, [], 0

    @property
    def tracker(self) -> list[Any]:
        return self.lines

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        if self.broken:
            raise ConnectionError("no network")
        self.lines.append((step, values))

    def finish(self) -> None:
        self.finished += 1


class Listener:
    """The rank's end of a channel that keeps what is emitted."""

    def __init__(self) -> None:
        self.points: list[events.Metric] = []

    def emit(self, event: events.Event) -> None:
        assert isinstance(event, events.Metric)
        self.points.append(event)

    def requests(self) -> list[events.Request]:
        return []


@pytest.fixture
def listener() -> Iterator[Listener]:
    port = Listener()
    events.connect(port)
    yield port
    events.connect(None)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_keeps_every_call_and_continues_after_a_restart(tmp_path: Path) -> None:
    for start in (0, 2):
        trackers = open_trackers(
            ["jsonl"],
            folder=tmp_path,
            project="p",
            world=single(),
            config={"lr": 0.1, "net": torch.nn.ReLU()},
        )
        for step in (start, start + 1):
            trackers.log({"loss": 1.5 * step, "bad": math.nan, "vector": torch.arange(2)}, step)
        trackers.finish()
    found = lines(tmp_path / "p" / "metrics.jsonl")
    assert [line["step"] for line in found] == [0, 1, 2, 3]
    assert [line["loss"] for line in found] == [0.0, 1.5, 3.0, 4.5]
    assert found[0]["bad"] == "NaN"
    assert found[0]["vector"] == [0, 1]
    assert json.loads((tmp_path / "p" / "config.json").read_text()) == {"lr": 0.1, "net": "ReLU()"}


def test_jsonl_line_is_on_disk_when_log_returns(tmp_path: Path) -> None:
    trackers = open_trackers(["jsonl"], folder=tmp_path, project="p", world=single())
    trackers.log({"loss": 1.0}, 3)
    assert lines(tmp_path / "p" / "metrics.jsonl")[0]["loss"] == 1.0
    trackers.finish()


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = open_trackers(
        ["tensorboard"], folder=tmp_path, project="p", world=single(), config={"lr": 0.1, "shape": (1, 2)}
    )
    for step in range(3):
        trackers.log({"loss": step / 2, "note": "hello", "weights": torch.randn(8)}, step)
    assert type(trackers.get("tensorboard").tracker).__name__ == "SummaryWriter"
    trackers.finish()
    found = EventAccumulator(str(tmp_path / "p"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert found.Tags()["histograms"] == ["weights"]
    assert "note/text_summary" in found.Tags()["tensors"]
    assert "_hparams_/session_start_info" in found.summary_metadata


def test_trackers_are_imported_only_when_asked_for() -> None:
    code = (
        "import sys, nbaccel.core.trackers; "
        "print([m for m in ('tensorboard', 'torch.utils.tensorboard', 'tensorflow') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"


def test_other_ranks_have_no_trackers(tmp_path: Path) -> None:
    trackers = open_trackers(["jsonl", Memory()], folder=tmp_path, project="p", world=OTHER)
    assert len(trackers) == 0
    assert list(tmp_path.iterdir()) == []
    absent: Any = trackers.get("jsonl")
    assert absent.log({"loss": 1.0}, step=0) is None
    assert absent.tracker.add_figure("f", object()) is None
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="none on this rank"):
        trackers.get("tensorboard")


@pytest.mark.parametrize("world", [single(), OTHER], ids=["main", "other"])
def test_unknown_tracker_is_refused_on_every_rank(tmp_path: Path, world: World) -> None:
    with pytest.raises(
        ConfigError, match="no tracker 'wandbee' built in; there are 'jsonl', 'csv', 'tensorboard'"
    ):
        open_trackers(["wandbee"], folder=tmp_path, project="p", world=world)


def test_failing_tracker_is_reported_once_and_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    broken, good = Memory(broken=True), Memory()
    good.name = "good"  # type: ignore[misc]
    trackers = Trackers([broken, good])
    with caplog.at_level(logging.WARNING, "nbaccel"):
        for step in range(5):
            trackers.log({"loss": 1.0}, step)
        assert len(caplog.records) == 1
        trackers.finish()
        trackers.finish()
    assert "tracker 'memory' failed (ConnectionError: no network)" in caplog.records[0].getMessage()
    assert "failed 5 times" in caplog.records[1].getMessage()
    assert len(caplog.records) == 2
    assert len(good.lines) == 5
    assert good.finished == 1


def test_accelerate_tracker_can_be_passed_as_it_is(tmp_path: Path) -> None:
    from accelerate.tracking import GeneralTracker

    class Mine(GeneralTracker):  # type: ignore[misc]
        name = "mine"
        requires_logging_directory = False

        def __init__(self) -> None:
            super().__init__(_blank=True)
            self.seen: list[Any] = []

        @property
        def tracker(self) -> Any:
            return self.seen

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            self.seen.append(values)

        def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
            self.seen.append((step, values))

    mine = Mine()
    trackers = open_trackers([mine], folder=tmp_path, project="p", world=single(), config={"a": 1})
    trackers.log({"loss": 2.0}, 7)
    trackers.finish()
    assert mine.seen == [{"a": 1}, (7, {"loss": 2.0})]


def test_tensor_logged_is_the_value_of_that_moment() -> None:
    memory = Memory()
    log = MetricLog(Trackers([memory]), world=single())
    loss = torch.tensor(1.0, requires_grad=True)
    log.log({"loss": loss * 1, "vector": (vector := torch.zeros(2))}, step=0)
    with torch.no_grad():
        loss.fill_(9)
        vector.fill_(9)
    log.close()
    log.close()
    (step, values), *rest = memory.lines
    assert (step, values["loss"], rest) == (0, 1.0, [])
    assert values["vector"].tolist() == [0, 0]
    assert memory.finished == 1


def test_dashboard_gets_few_points_and_always_the_last(listener: Listener) -> None:
    memory = Memory()
    log = MetricLog(Trackers([memory]), world=single())
    start = time.monotonic()
    for step in range(2000):
        log.log({"loss": float(step), "name": "x"}, step=step)
        log.log({"lr": step / 10}, step=step)
    log.flush()
    elapsed = time.monotonic() - start
    assert len(memory.lines) == 4000
    assert len(listener.points) <= 2 * (elapsed / 0.1 + 2)
    last = {name: point for point in listener.points for name in point.values}
    assert last["loss"].values["loss"] == 1999
    assert last["lr"].values["lr"] == 199.9
    assert last["loss"].step == last["lr"].step == 1999


def test_reduced_values_are_shown_by_the_main_process_only(listener: Listener) -> None:
    for world in (single(), OTHER):
        log = MetricLog(Trackers(), world=world)
        log.log({"own": float(world.rank)}, step=1)
        log.log({"all": 0.5}, step=1, reduced="mean")
        log.flush()
    shown = [(dict(point.values), point.reduced) for point in listener.points]
    assert shown == [({"own": 0.0}, None), ({"all": 0.5}, "mean"), ({"own": 1.0}, None)]


def test_nothing_is_kept_where_nobody_listens() -> None:
    log = MetricLog(Trackers(), world=single())

    class Untouchable(dict):  # type: ignore[type-arg]
        def items(self) -> Any:
            raise AssertionError("looked at")

    log.log(Untouchable(loss=1.0), step=0)
    log.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_logging_a_device_tensor_does_not_synchronise() -> None:
    memory = Memory()
    log = MetricLog(Trackers([memory]), world=single("cuda:0"))
    value = torch.ones((), device="cuda")
    Snapshot({"warm": value}).read()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(200_000_000)
        for step in range(5):
            log.log({"loss": value * step}, step=step)
        assert memory.lines == []
    finally:
        torch.cuda.set_sync_debug_mode("default")
    log.flush()
    assert [values["loss"] for _, values in memory.lines] == [0, 1, 2, 3, 4]
