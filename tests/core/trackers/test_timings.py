"""`acc.track` and `acc.timed`: sums by step, nested names, main process only."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from nbaccel import Accelerator
from nbaccel.core.trackers import Timings
from nbaccel.errors import ConfigError


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


@pytest.mark.parametrize("by", ["timed", "track"])
def test_async_function_is_timed_to_the_end_of_its_await(by: str) -> None:
    timings, _, _ = book()

    @getattr(timings, by)("answer")
    async def answer(number: int) -> int:
        await asyncio.sleep(0.02)
        with timings.track("inner"):
            return number + 1

    async def both() -> list[int]:
        return list(await asyncio.gather(answer(1), answer(2)))

    assert asyncio.run(both()) == [2, 3]
    known = timings.read()
    assert {name: one.count for name, one in known.items()} == {"answer/inner": 2, "answer": 2}
    assert known["answer"].seconds >= 0.04


def test_generator_is_one_block_of_the_time_within_it() -> None:
    timings, _, _ = book()

    @timings.timed("numbers")
    def numbers(most: int) -> Generator[int, str | None, str]:
        for at in range(most):
            time.sleep(0.01)
            with timings.track("inner"):
                got = None
            try:
                got = yield at
            except KeyError as error:
                got = str(error)
            if got is not None:
                return got
        return "all"

    found = []
    start = time.perf_counter()
    for number in numbers(3):
        with timings.track("body"):
            time.sleep(0.05)
        found.append(number)
    elapsed = time.perf_counter() - start
    assert found == [0, 1, 2]
    known = timings.read()
    assert {name: one.count for name, one in known.items()} == {"numbers/inner": 3, "body": 3, "numbers": 1}
    assert known["numbers"].seconds >= 0.03
    assert known["numbers"].seconds + known["body"].seconds <= elapsed, "the body is not its time"

    def outcome(run: Generator[int, str | None, str], how: Any) -> str:
        next(run)
        with pytest.raises(StopIteration) as ended:
            how(run)
        return str(ended.value.value)

    assert outcome(numbers(3), lambda run: run.send("sent")) == "sent"
    assert outcome(numbers(3), lambda run: run.throw(KeyError("thrown"))) == "'thrown'"
    left = numbers(3)
    next(left)
    left.close()
    begun = numbers(3)
    next(begun)
    with pytest.raises(ValueError, match="outside"):
        begun.throw(ValueError("outside"))
    assert timings.read()["numbers"].count == 5


def test_asynchronous_generator_is_refused_with_the_way() -> None:
    timings, _, _ = book()
    with pytest.raises(ConfigError, match=r"with acc\.track\('stream'\)"):

        @timings.timed("stream")
        async def stream() -> AsyncIterator[int]:
            yield 1


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


def test_blocks_of_one_optimizer_step_are_logged_together_whatever_steps_the_script_counts(
    tmp_path: Path,
) -> None:
    acc = Accelerator(cpu=True, project_dir=tmp_path, log_with="jsonl", gradient_accumulation_steps=4)
    model = torch.nn.Linear(1, 1)
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    acc.init_trackers("run")
    for micro_step in range(8):
        with acc.accumulate(model):
            with acc.track("forward"):
                loss = model(torch.ones(1, 1)).sum()
            acc.backward(loss)
            optimizer.step()
        acc.log({"loss": loss}, step=micro_step)
    acc.end_training()
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["forward/count"]) for line in found if "forward/count" in line] == [
        (0, 4),
        (1, 4),
    ]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_block_where_no_optimizer_is_prepared_is_of_the_step_that_was_named_last(tmp_path: Path) -> None:
    acc = Accelerator(cpu=True, project_dir=tmp_path, log_with="jsonl")
    acc.init_trackers("run")
    for step in range(6):
        acc.log({"loss": 1.0}, step=step)
        if step % 2:
            with acc.track("eval"):
                pass
    acc.log({"last": 1.0})
    acc.end_training()
    found = [(line["step"], *(name for name in line if "/" not in name)) for line in lines(tmp_path / "run")]
    assert [step for step, *_ in found] == [0, 1, 1, 2, 3, 3, 4, 5, 5, 5]  # in order: W&B drops what is late
    assert found[-2:] == [(5, "step", "time", "last"), (5, "step", "time")]


def test_picture_of_a_later_step_is_kept_after_the_blocks_before_it(tmp_path: Path) -> None:
    kept: list[Any] = []

    class Kept:
        name, tracker = "kept", None
        store_init_configuration = finish = staticmethod(lambda *_: None)
        log = log_images = staticmethod(lambda values, step: kept.append((step, *values)))

    acc = Accelerator(cpu=True, log_with=Kept())
    acc.init_trackers("run")
    acc.log({"loss": 1.0}, step=0)
    with acc.track("eval"):
        pass
    acc.log_images({"picture": torch.rand(3, 4, 4)}, step=1)
    acc.end_training()
    assert kept == [(0, "loss"), (0, "eval/seconds", "eval/count"), (1, "picture")]


def test_block_is_of_the_run_in_which_it_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    acc = Accelerator(cpu=True, project_dir=tmp_path, log_with="jsonl")

    def block(name: str) -> None:
        with acc.track(name):
            pass

    block("before")
    acc.init_trackers("one")
    block("early")
    acc.init_trackers("two")
    acc.end_training()
    block("between")
    assert "end_training" not in caplog.text
    acc.init_trackers("three")
    acc.log({"loss": 1.0}, step=1)
    acc.end_training()
    (first,), (last,) = lines(tmp_path / "one"), lines(tmp_path / "three")
    assert {name for name in first if "/" in name} == {
        "before/seconds",
        "before/count",
        "early/seconds",
        "early/count",
    }
    assert last["loss"] == 1.0
    assert lines(tmp_path / "two") == []
    assert "end_training has ended them" in caplog.text  # of the block between two runs


def test_run_begun_again_takes_the_place_of_one_whose_accelerator_is_gone(tmp_path: Path) -> None:
    def begin(number: int) -> tuple[Accelerator, Any]:
        acc = Accelerator(cpu=True, project_dir=tmp_path, log_with="jsonl")
        acc.init_trackers("run")
        optimizer = acc.prepare(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1))
        acc.log({"number": number}, step=number)
        with acc.track("eval"):
            pass
        return acc, optimizer

    optimizer = begin(0)[1]  # as a notebook's name keeps it until the cell that made it has run again
    acc, optimizer = begin(1)
    other, _ = begin(2)
    for one in (acc, other):
        one.end_training()
    del optimizer
    found = [[name for name in line if name in ("number", "eval/count")] for line in lines(tmp_path / "run")]
    assert found == [["number"], ["eval/count"]] * 2
    assert [line.get("number") for line in lines(tmp_path / "run-2")] == [2, None]
