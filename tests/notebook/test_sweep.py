"""`nbaccel.map` on real ranks and in a real kernel."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import nbaccel
from nbaccel.errors import ConfigError, WorkerError
from nbaccel.session.trials import SweepInterrupted, SweepResults, Trial, expand

pytestmark = pytest.mark.usefixtures("clean")


def trial(lr: float, width: int, folder: str) -> dict[str, Any]:
    import torch

    (Path(folder) / f"{lr}-{width}").write_text(f"{time.time()}")
    if lr == 0.2 and width == 2:
        raise ValueError("too wide")
    # the others are at work at the same time: it waits for one of them
    end = time.monotonic() + 60
    while len(os.listdir(folder)) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    print("trained", lr, width)
    return {"loss": lr * width, "threads": torch.get_num_threads(), "world": int(os.environ["WORLD_SIZE"])}


def test_grid_is_every_combination_or_the_items_themselves() -> None:
    assert expand({"a": [1, 2], "b": ("x", "y")}) == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    ]
    assert expand(iter([3, {"a": 1}])) == [3, {"a": 1}]
    for nothing in ({}, {"a": []}, []):
        with pytest.raises(ConfigError, match="no trial"):
            expand(nothing)
    for value in ("adam", 0.1):
        with pytest.raises(ConfigError, match="must be a list of values"):
            expand({"optimizer": value})
    for grid in ("ab", 5, None):
        with pytest.raises(ConfigError, match=r"the grid is .*; it must be \{name: \[values"):
            expand(grid)  # type: ignore[arg-type]


def test_trials_run_beside_each_other_and_a_failing_one_stops_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = {"lr": [0.1, 0.2], "width": [1, 2], "folder": [str(tmp_path)]}
    found = nbaccel.map(trial, grid, parallel=2, device="cpu")
    assert [value and value["loss"] for value in found] == [0.1, 0.2, 0.2, None]
    assert found[0]["world"] == 1
    assert found[0]["threads"] == max(1, len(os.sched_getaffinity(0)) // min(2, len(os.sched_getaffinity(0))))
    states = [one.state for one in found.trials]
    assert states == ["done", "done", "done", "failed"]
    failed = found.trials[3]
    assert isinstance(failed.error, WorkerError)
    assert isinstance(failed.error.__cause__, ValueError)
    run = found.trials[0].run
    assert run is not None
    assert "trained 0.1 1" in run.logs(0)
    assert nbaccel.compare(found.trials[0], found.trials[2]).differences == {"argument.lr": ("0.1", "0.2")}
    assert found.table()[1]["width"] == 2
    assert found.table()[3]["state"] == "failed"
    said = capsys.readouterr().out
    assert "4/4: trial" in said
    assert "trained" not in said  # it is in the run folders
    text = repr(found)
    assert "4 trials: 3 done, 1 failed" in text
    assert "ValueError: too wide" in text
    assert "too wide" in found._repr_mimebundle_()["text/html"]


class Returned:
    """What a trial asks of a run that has ended."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def done(self) -> bool:
        return True

    def exception(self) -> None:
        return None

    def result(self) -> list[Any]:
        return [self.value]


def test_table_keeps_arguments_and_values_of_one_name_apart() -> None:
    trials = [Trial(0, {"lr": 0.1, "seconds": 5}), Trial(1, {"lr": 0.2, "seconds": 6}), Trial(2, 3)]
    for trial, value in zip(trials, ({"lr": 0.01, "state": "good"}, 7, None), strict=True):
        trial.begin(lambda value=value: Returned(value))  # type: ignore[misc]
    first, second, third = SweepResults(trials, "named").table()
    assert (first["lr"], first["returned.lr"], first["state"], first["trial.state"]) == (
        0.1,
        0.01,
        "good",
        "done",
    )
    assert (first["seconds"], second["value"], third["argument"]) == (5, 7, 3)
    assert all(set(row) >= {"trial.state", "trial.seconds"} for row in (first, second, third))


def test_trial_that_has_not_begun_says_so_when_it_is_compared() -> None:
    waiting = Trial(3, {"lr": 0.1})
    assert repr(waiting) == "<trial 3, waiting, {'lr': 0.1}>"
    with pytest.raises(ConfigError, match=r"<trial 3, waiting, .* has no run folder .*: it has not begun"):
        nbaccel.compare(waiting, waiting)


def both(x: int) -> int:
    import torch
    import torch.distributed as dist

    dist.init_process_group()
    total = torch.tensor([x + dist.get_rank()])
    dist.all_reduce(total)
    return int(total)


def test_trial_of_two_ranks_gives_the_value_of_its_first() -> None:
    assert nbaccel.map(both, [1, 10], devices_per_trial=2, device="cpu", dashboard=False) == [3, 21]


def test_trials_of_one_rank_may_ask_for_the_strategy_of_one() -> None:
    assert nbaccel.map(abs, [-1, -2], device="cpu", strategy="single", dashboard=False) == [1, 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_processes": 2}, "map takes no num_processes"),
        ({"devices_per_trial": 0}, "at least 1"),
        ({"parallel": 0}, "at least 1"),
        ({"devices_per_trial": 1.5}, "not 1.5"),
        ({"device": "cpu", "mixed_presicion": "bf16"}, "mixed_presicion"),
        ({"device": "cpu", "strategy": "single", "devices_per_trial": 2}, "there are 2 ranks"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        nbaccel.map(both, [1], **options)


def test_arguments_of_every_trial_are_checked_first() -> None:
    with pytest.raises(ConfigError, match="cannot be called"):
        nbaccel.map(both, [{"x": 1}, {"y": 2}], device="cpu")


def sleep(number: int, folder: str) -> None:
    (Path(folder) / str(number)).touch()
    time.sleep(120)


def test_interrupt_ends_those_that_run_and_starts_no_more(tmp_path: Path) -> None:
    def press() -> None:
        end = time.monotonic() + 60
        while len(os.listdir(tmp_path)) < 2 and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    began = time.monotonic()
    with pytest.raises(SweepInterrupted, match="sleep was interrupted") as caught:
        nbaccel.map(sleep, {"number": [0, 1, 2], "folder": [str(tmp_path)]}, parallel=2, device="cpu")
    presser.join()
    assert isinstance(caught.value, KeyboardInterrupt)
    assert [trial.state for trial in caught.value.results.trials] == ["stopped"] * 3
    assert sorted(os.listdir(tmp_path)) == ["0", "1"]
    assert time.monotonic() - began < 100


@pytest.mark.kernel
def test_table_is_shown_in_a_cell_and_stays_as_html(kernel: Any) -> None:
    cell = kernel.ok(
        "import nbaccel\n"
        "def f(x):\n    acc = nbaccel.Accelerator(cpu=True)\n    acc.log({'loss': x / 2})\n    return x * 2\n"
        "r = nbaccel.map(f, {'x': [3, 4]}, device='cpu', dashboard=True)\nprint(list(r))",
        timeout=120,
    )
    assert cell.stdout.strip().endswith("[6, 8]")
    last = [shown["text/html"] for shown in cell.displays if "2 trials" in shown.get("text/html", "")][-1]
    assert "2 trials: 2 done" in last
    assert "→ 8" in last
    assert "loss 2" in last
    assert not any("widget-view" in kind for kind in cell.displays[-1])
