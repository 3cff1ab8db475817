"""The speed of several ranks beside that of one, from run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nbaccel.session.panel.pages import report
from nbaccel.session.panel.reading import Heading
from nbaccel.session.runs import new_folder
from nbaccel.session.scaling import compared, ideal_rates
from nbaccel.session.sinks.folder import FolderSink
from nbaccel.session.state import RunState, fold, new_state
from nbaccel.wire.events import Event, Progress
from tests.session.panel.streams import returned, started


def at_speed(num_ranks: int, rate: float) -> list[Event]:
    """Two hundred steps at this many a second."""
    steps = [
        Progress(rank=rank, time=1 + step / rate, name="train", step=step, total=400, unit="batch")
        for step in range(0, 201, 5)
        for rank in range(num_ranks)
    ]
    return [*started(num_ranks), *steps, *returned(num_ranks)]


def write(
    root: Path, num_ranks: int, rate: float, *, split: bool = False, **facts: Any
) -> tuple[Path, RunState]:
    """A run's folder as a launch leaves it."""
    folder = new_folder(root, "train")
    known = {"function": "m.train", "source": "def train(): ...", "host": "here"}
    plan = {"num_processes": num_ranks, "device": "cpu"}
    sink = FolderSink(folder, config={"split_batches": split}, run={**known, "plan": plan, **facts})
    state = new_state(num_ranks, 0.0)
    for event in at_speed(num_ranks, rate):
        state = fold(state, event)
        sink.handle(event, state)
    sink.tick(1.0)
    sink.close(state)
    return folder, state


def test_speed_is_compared_with_the_same_code_on_one_rank(tmp_path: Path) -> None:
    write(tmp_path, 1, 50.0)
    folder, state = write(tmp_path, 4, 40.0)
    assert ideal_rates(folder)["train"] == pytest.approx(50.0, rel=0.01)
    heading = compared(Heading(name="train", folder=str(folder)))
    told = report(state, heading, lambda _: None, {})
    assert told.values["scaling_efficiency"] == pytest.approx(0.8, rel=0.01)
    assert "scaling 80%, 3.2× one rank" in told.text.splitlines()[0]


def test_ranks_that_share_a_batch_should_make_more_steps(tmp_path: Path) -> None:
    write(tmp_path, 1, 50.0)
    folder, _ = write(tmp_path, 4, 100.0, split=True)
    assert ideal_rates(folder)["train"] == pytest.approx(200.0, rel=0.01)


@pytest.mark.parametrize(
    "other",
    [{"source": "def train(): pass"}, {"function": "m.eval"}, {"host": "elsewhere"}, {"source": None}],
)
def test_other_code_or_another_machine_is_no_measure(tmp_path: Path, other: dict[str, Any]) -> None:
    write(tmp_path, 1, 50.0, **other)
    folder, state = write(tmp_path, 4, 40.0)
    assert ideal_rates(folder) == {}
    told = report(state, compared(Heading(name="train", folder=str(folder))), lambda _: None, {})
    assert told.values["scaling_efficiency"] is None
    assert "scaling" not in told.text


def test_one_rank_is_compared_with_nothing(tmp_path: Path) -> None:
    write(tmp_path, 1, 50.0)
    folder, _ = write(tmp_path, 1, 40.0)
    assert ideal_rates(folder) == {}


def test_damaged_folders_are_passed_over(tmp_path: Path) -> None:
    broken, _ = write(tmp_path, 1, 50.0)
    (broken / "run.json").write_text("{")
    folder, _ = write(tmp_path, 2, 40.0)
    assert ideal_rates(folder) == {}
    assert compared(Heading(name="train", folder=str(tmp_path / "gone"))).ideal == {}
