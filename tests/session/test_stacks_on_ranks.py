"""Hangs on real ranks are named; recorded ones are in `test_diagnosis`."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nbaccel import Run, RunConfig, launch
from nbaccel.errors import ConfigError, WorkerError
from nbaccel.session.ending import Limits
from nbaccel.session.environment import probe
from nbaccel.session.request import make_task
from nbaccel.session.resolve import resolve
from nbaccel.session.session import start_run
from nbaccel.session.stacks import StackReport
from tests.conftest import wait_until

pytestmark = pytest.mark.usefixtures("clean")

Stuck = Callable[[], StackReport]


def rank() -> int:
    return int(os.environ["RANK"])


def join() -> Any:
    """The process group, one collective in."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    dist.barrier()
    return dist


@pytest.fixture
def hang() -> Iterator[Callable[..., Run]]:
    """Starts a run that will hang; it is killed at the end."""
    runs: list[Run] = []

    def start(function: Callable[[], Any], **options: Any) -> Run:
        given = {"num_processes": 2, "stall_after": 0, "output": "none", "folder": False, **options}
        runs.append(launch(function, **given))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()
        with pytest.raises((KeyboardInterrupt, WorkerError)):
            run.result(timeout=60)


def named(run: Run, *words: str) -> StackReport:
    """The first report whose headlines hold all these words."""
    last = ""

    def look() -> StackReport | None:
        nonlocal last
        report = run.stacks()
        last = "\n".join(report.headlines())
        return report if all(word in last for word in words) else None

    try:
        found: StackReport = wait_until(look, 60, f"{words}")
    except AssertionError as error:
        raise AssertionError(f"{error}; the last one:\n{last}") from None
    return found


def sleep_before_a_backward() -> None:
    join()
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 3))
    for step in range(4):
        if step == 2 and rank() == 1:
            time.sleep(300)
        model(torch.ones(2, 3)).sum().backward()


def test_the_rank_that_missed_a_backward_is_named(hang: Callable[..., Run]) -> None:
    run = hang(sleep_before_a_backward)
    report = named(
        run, "rank 1 has not called all_reduce #", "(DDP backward); it is in sleep_before_a_backward"
    )
    assert "rank 0 waits" in report.headlines()[0]
    assert report.of(1).condition == "answers"
    assert re.search(r"test_stacks_on_ranks.py:\d+ in sleep_before_a_backward", repr(report))


def hold_the_lock() -> None:
    dist = join()
    if rank() == 1:
        re.match(r"(a+)+$", "a" * 40 + "b")
    dist.barrier()


def test_a_rank_whose_c_code_holds_the_lock_is_named_with_its_line(hang: Callable[..., Run]) -> None:
    report = named(
        hang(hold_the_lock), "rank 1 is the one left for barrier #2", "holds the interpreter's lock"
    )
    assert report.of(1).condition == "silent"
    assert any(line.function == "hold_the_lock" for line in report.of(1).frames)


def stop_oneself() -> None:
    dist = join()
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier()


def test_a_stopped_rank_is_told_from_a_dead_one(hang: Callable[..., Run]) -> None:
    report = named(hang(stop_oneself), "rank 1 is the one left for barrier #2; it is stopped (SIGSTOP)")
    assert report.of(1).condition == "stopped"


def call_different_collectives() -> None:
    dist = join()
    if rank() == 0:
        dist.all_reduce(torch.ones(4))
    else:
        dist.broadcast(torch.ones(4), 0)
    dist.barrier()


def test_different_collectives_are_named_with_their_lines(hang: Callable[..., Run]) -> None:
    named(
        hang(call_different_collectives, num_processes=3),
        "mismatch at #2, different collectives: rank 0 called all_reduce #2 [4] Float",
        "called broadcast #2",
    )


def run_out_of_batches() -> None:
    join()
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 3))
    for _ in range(3 if rank() == 0 else 2):
        model(torch.ones(2, 3)).sum().backward()


def test_a_rank_with_fewer_batches_is_named(hang: Callable[..., Run]) -> None:
    named(
        hang(run_out_of_batches), "rank 1 has not called all_reduce #", "its function returned (it had fewer"
    )


class SticksAtTen(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        if index >= 10 and rank() == 1:
            time.sleep(300)
        return torch.ones(3)


def load_with_workers() -> None:
    dist = join()
    for batch in torch.utils.data.DataLoader(SticksAtTen(), batch_size=2, num_workers=2):
        dist.all_reduce(batch)


def test_a_stuck_loader_worker_is_named_with_its_line(hang: Callable[..., Run]) -> None:
    report = named(
        hang(load_with_workers),
        "rank 1 has not called all_reduce #",
        "it waits for its DataLoader: worker pid",
    )
    assert re.search(r"is in __getitem__ test_stacks_on_ranks.py:\d+", report.headlines()[0])


def load_apart() -> None:
    for _ in torch.utils.data.DataLoader(SticksAtTen(), batch_size=2, num_workers=2):
        pass
    time.sleep(300)


def test_a_stuck_loader_gets_the_report_though_its_rank_looks_up_every_five_seconds(
    hang: Callable[..., Run],
) -> None:
    run = hang(load_apart, stall_after=8)
    report = wait_until(lambda: run.stall and run.stall.report, 40, "a report")
    assert any("is in __getitem__ test_stacks_on_ranks.py" in line for line in report.headlines())


def wait_for_a_message() -> None:
    dist = join()
    if rank() == 0:
        dist.recv(torch.ones(3), src=1, tag=4)
    time.sleep(300)


def test_a_wait_for_one_peer_is_named(hang: Callable[..., Run]) -> None:
    named(
        hang(wait_for_a_message), "rank 0 waits in recv(src=1, tag=4)", "rank 1: it is in wait_for_a_message"
    )


def come_late() -> None:
    if rank() == 1:
        time.sleep(300)
    join()


def test_a_rank_that_never_joined_is_named(hang: Callable[..., Run]) -> None:
    named(hang(come_late), "rank 1 has not called init_process_group; it is in come_late")


def come_when_called(call: Path) -> str:
    dist = join()
    if rank() == 1:
        while not call.exists():
            time.sleep(0.01)
    dist.barrier()
    return "came"


def test_a_hang_is_told_by_itself_and_its_end_too(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    call = tmp_path / "call"
    run = launch(come_when_called, call, num_processes=2, stall_after=2, folder=tmp_path / "runs")
    wait_until(
        lambda: run.stall and run.stall.report and "rank 1 has not called barrier #2" in run.stall.text,
        60,
        "the report",
    )
    call.touch()
    assert run.result(timeout=60) == ["came", "came"]
    said = capfd.readouterr().err
    assert "nbaccel: rank 1 has not called barrier #2; it is in come_when_called" in said
    assert "  test_stacks_on_ranks.py:" in said
    assert run.folder is not None
    lines = (run.folder / "events.jsonl").read_text().splitlines()
    stalled = [event for event in map(json.loads, lines) if event["type"] == "Stalled"]
    assert any(
        "rank 1 has not called barrier #2" in event["text"] and "in come_when_called" in event["report"]
        for event in stalled
    )
    with pytest.raises(ConfigError, match="is over"):
        run.stacks()


def test_a_word_comes_after_five_seconds(hang: Callable[..., Run]) -> None:
    run = hang(come_late, stall_after=30)
    stall = wait_until(lambda: run.stall, 30, "a word")
    assert "rank 1 has not called init_process_group" in stall.text
    assert stall.report is None  # the stacks come later


def test_a_hang_that_lasts_ends_the_run_and_names_the_rank() -> None:
    config = RunConfig(num_processes=2)
    task = make_task(come_late, (), None)
    limits = Limits(stall=1, hang=3, grace=0.2)
    run = start_run(
        task,
        config=config,
        plan=resolve(config, probe()),
        limits=limits,
        env={},
        sinks=[],
        folder=None,
        say=lambda _: None,
        label=lambda _: None,
    )
    with pytest.raises(WorkerError, match="rank 1 has not called init_process_group") as caught:
        run.result(timeout=60)
    assert caught.value.ranks == (1,)
    assert "ended after 3 s of waiting" in str(caught.value)
    assert "in come_late" in str(caught.value)


def crash() -> None:
    import ctypes

    join()
    if rank() == 1:
        ctypes.string_at(0)
    time.sleep(300)


def test_a_crash_is_told_with_its_python_line() -> None:
    with pytest.raises(WorkerError) as caught:
        launch(crash, num_processes=2, output="none", folder=False, grace=0.1).result(timeout=60)
    assert caught.value.ranks == (1,)
    assert re.search(r"SIGSEGV.*\n.*it was in crash, test_stacks_on_ranks.py:\d+", str(caught.value))
