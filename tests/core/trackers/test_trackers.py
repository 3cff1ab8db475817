from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import threading
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
    trackers.log_table("table", ["a|b", "c"], [["x\ny", 1], ["p|q", ""]], 0)
    assert type(trackers.get("tensorboard").tracker).__name__ == "SummaryWriter"
    trackers.finish()
    found = EventAccumulator(str(tmp_path / "p"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert found.Tags()["histograms"] == ["weights"]
    assert "note/text_summary" in found.Tags()["tensors"]
    assert "_hparams_/session_start_info" in found.summary_metadata
    (table,) = found.Tensors("table/text_summary")
    assert table.tensor_proto.string_val[0].decode().splitlines() == [
        r"| a\|b | c |",
        "| --- | --- |",
        "| x<br>y | 1 |",
        r"| p\|q |  |",
    ]


def test_trackers_are_imported_only_when_asked_for() -> None:
    code = (
        "import sys, nbaccel.core.trackers; "
        "print([m for m in ('tensorboard', 'torch.utils.tensorboard', 'wandb', 'mlflow', 'comet_ml', 'trackio', 'aim',"
        "'pandas', 'PIL') if m in sys.modules])"
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


def test_csv_gains_columns_and_continues_after_a_restart(tmp_path: Path) -> None:
    import csv

    for lines_ in ([{"loss": 1.0}, {"loss": 0.5, "lr": 0.1}], [{"acc": math.nan, "note": 'a "b", c'}]):
        trackers = open_trackers(["csv"], folder=tmp_path, project="p", world=single(), config={"lr": 0.1})
        for step, values in enumerate(lines_):
            trackers.log(values, step)
        trackers.finish()
    with (tmp_path / "p" / "metrics.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == ["step", "time", "loss", "lr", "acc", "note"]
    assert [(row["step"], row["loss"], row["lr"], row["acc"]) for row in found] == [
        ("0", "1.0", "", ""),
        ("1", "0.5", "0.1", ""),
        ("0", "", "", "NaN"),
    ]
    assert found[2]["note"] == 'a "b", c'


def test_pictures_of_any_kind_become_png_files_that_pillow_reads(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    from nbaccel.core.trackers.beside import write_images
    from nbaccel.core.trackers.shapes import pictures

    red = torch.zeros(3, 5, 4)
    red[0] = 1.0
    given = {
        "tensor": red,
        "batch": red.expand(2, 3, 5, 4),
        "array": np.moveaxis(red.numpy(), 0, -1),
        "bytes": np.full((5, 4), 200, dtype=np.uint8),
        "mask": torch.ones(5, 4, dtype=torch.bool),
        "pil": [Image.new("P", (4, 5)), Image.new("RGBA", (4, 5), (1, 2, 3, 4))],
    }
    written = write_images(tmp_path, {name: pictures(value) for name, value in given.items()}, 7)
    read = {path.name: np.asarray(Image.open(path)) for path in written}
    assert len(read) == 8
    assert all(one.shape[:2] == (5, 4) for one in read.values())
    for name in ("tensor-7.png", "batch-7-0.png", "batch-7-1.png", "array-7.png"):
        assert (read[name] == [255, 0, 0]).all()
    assert (read["bytes-7.png"] == 200).all()
    assert (read["mask-7.png"] == 255).all()
    assert (read["pil-7-1.png"] == [1, 2, 3, 4]).all()
    for wrong in (torch.ones(3), torch.ones(2, 7, 5), "text", None):
        with pytest.raises(ConfigError, match="no picture"):
            pictures(wrong)


def test_tracker_that_cannot_be_started_is_reported_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Unwilling(Memory):
        name = "unwilling"

        def start(self) -> None:
            raise ConnectionError("no account")

    with caplog.at_level(logging.WARNING, "nbaccel"):
        trackers = open_trackers(
            ["jsonl", Unwilling()], folder=tmp_path, project="p", world=single(), options={"jsonl": {}}
        )
        trackers.log({"loss": 1.0}, 0)
        trackers.log_images({}, 0)
        trackers.get("unwilling").log({"loss": 2.0})
        trackers.finish()
    (record,) = caplog.records
    assert "'unwilling' could not be started (ConnectionError: no account)" in record.getMessage()
    assert [line["loss"] for line in lines(tmp_path / "p" / "metrics.jsonl")] == [1.0]


def test_options_for_a_tracker_nobody_asked_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="options for 'wandb'"):
        open_trackers(["jsonl"], folder=tmp_path, project="p", world=OTHER, options={"wandb": {}})


def test_what_a_tracker_does_not_keep_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    trackers = Trackers([Memory()])
    with caplog.at_level(logging.WARNING, "nbaccel"):
        for step in range(3):
            trackers.log_images({}, step)
            trackers.log_system({"system/cpu_percent": 1.0}, step, 0.0)
    assert [record.getMessage() for record in caplog.records] == [
        "tracker 'memory' keeps no images; it goes on without them"
    ]


def test_system_is_sampled_beside_the_loop_and_handed_on_in_its_thread(tmp_path: Path) -> None:
    from nbaccel.core.trackers.system import Sampler, facts, sample

    sampler = Sampler(sample(torch.device("cpu")), every=0.02)
    trackers = open_trackers(["jsonl"], folder=tmp_path, project="p", world=single())
    trackers.store_system(facts(single()))
    log = MetricLog(trackers, world=single(), sampler=sampler)
    end = time.monotonic() + 20
    path = tmp_path / "p" / "system.jsonl"
    while time.monotonic() < end and not path.exists():
        time.sleep(0.02)
        log.log({"loss": 1.0}, step=5)
    log.close()
    log.close()
    found = lines(path)
    assert found[0]["step"] == 5
    assert 0 <= found[-1]["system/memory_percent"] <= 100
    assert found[-1]["system/process_memory_gb"] > 0
    assert json.loads((tmp_path / "p" / "system.json").read_text())["versions"]["torch"] == torch.__version__


def test_calls_made_behind_the_loop_keep_their_order_and_tell_what_failed() -> None:
    from nbaccel.core.trackers.behind import Behind

    made: list[int] = []
    behind = Behind("test")

    def fail() -> None:
        raise ConnectionError("gone")

    behind.put(lambda: made.append(1))
    behind.put(fail)
    with pytest.raises(ConnectionError, match="gone"):
        behind.close()
    behind.close()
    assert made == [1]


def test_end_does_not_wait_for_a_server_that_does_not_answer() -> None:
    from nbaccel.core.trackers.behind import Behind

    answered = threading.Event()
    behind = Behind("test")
    behind.put(answered.wait)
    behind.put(lambda: None)
    with pytest.raises(TimeoutError, match="did not take"):
        behind.close(timeout=0.1)
    answered.set()
    behind.close()


def test_object_that_is_no_tracker_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    class Half:
        name = "half"
        tracker = None

    def start(*asked: Any) -> None:
        open_trackers(asked, folder=tmp_path, project="p", world=OTHER)

    with pytest.raises(ConfigError, match="has no store_init_configuration"):
        start(Half())
    with pytest.raises(ConfigError, match="is a class: give an object"):
        start(Memory)
    with pytest.raises(ConfigError, match="two trackers called 'memory'"):
        start(Memory(), Memory())


def test_second_run_of_a_project_writes_beside_the_first_while_that_lives(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, opened = tmp_path / "p", []
    first.mkdir()
    code = (
        "import fcntl, sys\nfile = open(sys.argv[1], 'w')\nfcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(first / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        for _ in range(2):
            opened.append(open_trackers(["jsonl"], folder=tmp_path, project="p", world=single()))
            opened[-1].log({"loss": 1.0}, 0)
        other.communicate()
    for number in (2, 3):
        assert len(lines(tmp_path / f"p-{number}" / "metrics.jsonl")) == 1
    assert list(first.iterdir()) == [first / ".lock"]
    assert "another run writes to" in caplog.text
    opened.append(open_trackers(["jsonl"], folder=tmp_path, project="/../p", world=single()))
    assert opened[-1].get("jsonl").tracker == first / "metrics.jsonl"
    for trackers in opened:
        trackers.finish()


def test_values_of_numpy_and_odd_names_are_kept_as_numbers(tmp_path: Path) -> None:
    import numpy as np

    log = MetricLog(Trackers([memory := Memory()]), world=single())
    log.log(
        {
            "a": np.float32(0.5),
            1: np.int64(2),
            "b/c": np.bool_(True),
            "v": np.arange(2.0),
            "t": np.array("x"),
        },  # type: ignore[dict-item]
        step=0,
    )
    log.log({"half": torch.ones(2, dtype=torch.bfloat16)}, step=0)
    log.close()
    (_, values), (_, half) = memory.lines
    assert (values["a"], values["1"], values["b/c"]) == (0.5, 2, True)
    assert {type(values[name]) for name in ("a", "1", "b/c")} == {float, int, bool}
    assert values["v"].tolist() == [0.0, 1.0]
    assert str(values["t"]) == "x"
    assert half["half"].dtype == torch.float32


def test_logging_before_the_start_is_said_once_and_odd_files_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from nbaccel import Accelerator

    acc = Accelerator(cpu=True, log_with="jsonl", project_dir=tmp_path)
    with caplog.at_level(logging.WARNING, "nbaccel"):
        for step in range(3):
            acc.log({"loss": 1.0}, step=step)
        with pytest.raises(ConfigError, match="call init_trackers first"):
            acc.get_tracker("jsonl")
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "log_with asks for trackers, and init_trackers was not called before the first log"
    ]
    acc.init_trackers("p")
    for name in ("/etc/kept", "../kept"):
        with pytest.raises(ConfigError, match="give a name or a relative path"):
            acc.log_artifact(tmp_path / "p", name)
    with pytest.raises(ConfigError, match="no pixel"):
        acc.log_images({"empty": torch.zeros(3, 0, 4)})
    acc.end_training()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "nbaccel"):
        acc.log({"loss": 1.0}, step=4)
        acc.log_images({"late": torch.zeros(3, 4, 4)})
    (record,) = caplog.records
    assert (
        record.getMessage()
        == "log_with asks for trackers, and end_training has ended them: they keep nothing of it"
    )
    acc.init_trackers("again")
    acc.log({"loss": 2.0}, step=5)
    acc.end_training()
    assert [line["loss"] for line in lines(tmp_path / "again" / "metrics.jsonl")] == [2.0]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metrics_called_step_and_time_leave_those_of_the_line(tmp_path: Path, kind: str) -> None:
    import csv

    trackers = open_trackers([kind], folder=tmp_path, project="p", world=single())
    trackers.log({"step": 99, "time": 5.0, "loss": 1.0}, 1)
    trackers.finish()
    path = tmp_path / "p" / f"metrics.{kind}"
    with path.open(newline="") as file:
        (line,) = csv.DictReader(file) if kind == "csv" else lines(path)
    assert (int(line["step"]), int(line["metrics.step"]), float(line["metrics.time"])) == (1, 99, 5.0)
    assert abs(float(line["time"]) - time.time()) < 60


def test_tracker_that_ends_the_process_is_only_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Leaving(Memory):
        name = "leaving"

        def log(self, values: dict[str, Any], step: int | None = None) -> None:
            sys.exit("quota")

    class Unwilling(Memory):
        name = "unwilling"

        def start(self) -> None:
            raise SystemExit(2)

    class Interrupted(Memory):
        def log(self, values: dict[str, Any], step: int | None = None) -> None:
            raise KeyboardInterrupt

    with caplog.at_level(logging.WARNING, "nbaccel"):
        trackers = open_trackers([Leaving(), Unwilling()], folder=tmp_path, project="p", world=single())
        trackers.log({"loss": 1.0}, 0)
    assert "'unwilling' could not be started (SystemExit: 2)" in caplog.records[0].getMessage()
    assert "'leaving' failed (SystemExit: quota)" in caplog.records[1].getMessage()
    with pytest.raises(KeyboardInterrupt):
        Trackers([Interrupted()]).log({}, 0)


def test_call_behind_the_loop_that_ends_its_thread_does_not_lose_the_next() -> None:
    from nbaccel.core.trackers.behind import Behind

    made: list[int] = []
    behind = Behind("test")
    all_are_put = threading.Event()
    behind.put(all_are_put.wait)  # else the second put may raise what the first has
    behind.put(sys.exit)
    behind.put(lambda: made.append(1))
    all_are_put.set()
    with pytest.raises(SystemExit):
        behind.close()
    behind.close()
    assert made == [1]


def test_trackers_end_in_reverse_order_of_their_start() -> None:
    ended: list[str] = []

    class Ends(Memory):
        def finish(self) -> None:
            ended.append(self.name)

    opened = [Ends(), Ends(), Ends()]
    for name, one in zip("abc", opened, strict=True):
        one.name = name  # type: ignore[misc]
    Trackers(opened).finish()
    assert ended == ["c", "b", "a"]


def test_project_folder_is_not_copied_into_itself(tmp_path: Path) -> None:
    from nbaccel.core.trackers.beside import write_copy

    home = tmp_path / "out" / "p"
    (home / "artifacts").mkdir(parents=True)
    (home / "metrics.jsonl").write_text("line")
    for _ in range(3):
        write_copy(home, tmp_path / "out", "out")
        write_copy(home, home / "metrics.jsonl", "metrics.jsonl")
        write_copy(home, home / "files" / "metrics.jsonl", "metrics.jsonl")  # is there
        write_copy(home, home / "files" / "out", "out")
    found = sorted(
        str(path.relative_to(home / "files")) for path in home.rglob("files/**/*") if path.is_file()
    )
    assert found == ["metrics.jsonl", "out/p/metrics.jsonl"]
    write_copy(home, home / "files", "files")
    write_copy(home, home / "files", "files")
    assert not (home / "files" / "files" / "files").exists()


def test_many_values_not_taken_are_named_in_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    from nbaccel.core.trackers.each import keep_each

    class Numbers(Memory):
        def log(self, values: dict[str, Any], step: int | None = None) -> None:
            keep_each(values, lambda name, value: self.lines.append((name, float(value))))

    trackers = Trackers([numbers := Numbers()])
    with caplog.at_level(logging.WARNING, "nbaccel"):
        for step in range(2):
            trackers.log({**dict.fromkeys("abcdefg", "text"), "loss": 1.0}, step)
    (record,) = caplog.records
    assert "'memory' does not take 'a' (ValueError" in record.getMessage()
    assert record.getMessage().endswith("and 2 more; it keeps the other values")
    assert numbers.lines == [("loss", 1.0)] * 2


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("/loss", "loss"),
        ("a//b/../c", "a/b/c"),
        ("lr (1)", "lr _1_"),
        ("x" * 250, "x" * 250),
        ("x" * 251, None),
        ("..", None),
    ],
)
def test_name_for_mlflow_is_one_it_takes_or_refused_by_itself(name: str, key: str | None) -> None:
    from nbaccel.core.trackers.mlflow import _key

    if key is None:
        with pytest.raises(ValueError, match="1 to 250 characters"):
            _key(name)
    else:
        assert _key(name) == key
