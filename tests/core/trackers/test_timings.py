"""`acc.track` and `acc.timed`: sums by step, nested names, main process only."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

from nbaccel import Accelerator
from nbaccel.core.trackers import Timings


def book(active: bool = True) -> tuple[Timings, list[Any], list[int]]:
    logged: list[Any] = []
    step = [0]
    return (
        Timings(active=active, log=lambda v, at: logged.append((at, v)), step=lambda: step[0]),
        logged,
        step,
    )


def test_blocks_of_one_step_are_logged_together_once_the_loop_is_past_it() -> None:
    timings, logged, step = book()
    for samples in (4, 6):
        with timings.track("eval") as block:
            time.sleep(0.01)
            block.count("samples", samples)
            block.log({"accuracy": samples / 10})
    assert logged == []
    step[0] = 1
    with timings.track("eval"):
        pass
    ((at, values),) = logged
    assert at == 0
    assert values.pop("eval/seconds") >= 0.02
    assert values == {"eval/count": 2, "eval/samples": 10, "eval/accuracy": 0.6}
    timings.flush()
    timings.flush()
    assert [(at, values["eval/count"]) for at, values in logged] == [(0, 2), (1, 1)]
    known = timings.read()["eval"]
    assert (known.count, known.counts, known.metrics) == (3, {"samples": 10}, {"accuracy": 0.6})


def test_names_are_nested_and_a_block_that_raises_counts() -> None:
    timings, logged, _ = book()

    @timings.timed("inner")
    def inner(x: int) -> int:
        if x < 0:
            raise ValueError("negative")
        return x + 1

    @timings.timed
    def alone() -> None:
        """Kept."""

    with timings.track("outer"):
        assert inner(1) == 2
        with pytest.raises(ValueError, match="negative"):
            inner(-1)
    alone()
    assert alone.__doc__ == "Kept."
    assert {name: one.count for name, one in timings.read().items()} == {
        "outer/inner": 2,
        "outer": 1,
        "alone": 1,
    }
    assert timings.read()["outer"].seconds >= timings.read()["outer/inner"].seconds
    assert logged == []


def test_other_ranks_run_the_block_and_keep_nothing() -> None:
    timings, logged, _ = book(active=False)
    with timings.track("eval") as block:
        block.count("samples")
    timings.flush()
    assert timings.read() == {}
    assert logged == []


def _tracked(folder: str) -> list[str]:
    acc = Accelerator(cpu=True, project_dir=folder, log_with="jsonl")
    acc.init_trackers("run")
    with acc.track("eval") as block:
        block.log({"rank": acc.process_index})
    acc.end_training()
    return list(acc.tracked())


def test_accelerator_logs_blocks_of_the_main_process(tmp_path: Path) -> None:
    assert run_ranks(_tracked, str(tmp_path)) == [["eval"], []]
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert (line["step"], line["eval/count"], line["eval/rank"]) == (0, 1, 0)


def test_block_of_an_earlier_step_is_logged_before_what_is_logged_now(tmp_path: Path) -> None:
    acc = Accelerator(cpu=True, project_dir=tmp_path, log_with="jsonl")
    acc.init_trackers("run")
    with acc.track("eval"):
        pass
    acc.log({"loss": 1.0}, step=0)
    acc.log({"loss": 0.5}, step=1)
    acc.end_training()
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "eval/count" in line) for line in found] == [(0, False), (0, True), (1, False)]
