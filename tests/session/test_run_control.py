"""A run is watched, waited for, interrupted, killed, and followed by the next."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from nbaccel import last_run, launch, notebook_launcher, runs
from nbaccel.errors import ConfigError, LaunchError, RunInterrupted, RunTimeout, WorkerError
from nbaccel.session.reopen import PastRun
from tests.conftest import named, wait_until

pytestmark = pytest.mark.usefixtures("clean")


def rank() -> int:
    return int(os.environ["RANK"])


def wait_until_there(path: str) -> int:
    while not Path(path).exists():
        time.sleep(0.01)
    return rank()


def sleep(seconds: float, folder: str | None = None) -> int:
    if folder is not None:
        Path(folder, str(rank())).touch()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)
    return rank()


def wait_for(folder: Path, num_ranks: int) -> None:
    end = time.monotonic() + 60
    while len(list(folder.iterdir())) < num_ranks:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_result_raises_timeout_and_run_goes_on_when_time_is_short(tmp_path: Path) -> None:
    over = tmp_path / "over"
    run = launch(wait_until_there, str(over), num_processes=2)
    with pytest.raises(TimeoutError, match="still running after"):
        run.result(timeout=0.05)
    with pytest.raises(TimeoutError):
        run.exception(timeout=0.05)
    assert not run.done()
    over.touch()
    assert run.result(timeout=60) == [0, 1]
    assert run.done()
    assert run.exception() is None
    assert run.result() == [0, 1]
    assert last_run() is run


def first_requests(count: int) -> list[tuple[str, str, Any]]:
    from nbaccel.wire import events

    found: list[tuple[str, str, Any]] = []
    end = time.monotonic() + 30
    while len(found) < count and time.monotonic() < end:
        found += [(one.kind, one.name, one.value) for one in events.requests()]
        time.sleep(0.005)
    return found


def test_requests_reach_every_rank_when_made_before_and_during_the_call() -> None:
    run = launch(first_requests, 3, num_processes=2)
    with pytest.warns(UserWarning, match="has not asked for a knob 'lr' .it has none so far"):
        run.set_knob("lr", 0.5)  # no rank is there yet
    time.sleep(0.3)
    with pytest.warns(UserWarning, match="has made no Accelerator so far, which could save"):
        run.save()
    with pytest.warns(
        UserWarning, match="could stop at a step of all ranks.*run.interrupt.. ends it at once"
    ):
        run.stop()
    assert run.result(timeout=60) == [[("knob", "lr", 0.5), ("save", "", None), ("stop", "", None)]] * 2
    with pytest.raises(ConfigError, match="is over; knob 'lr' cannot be set any more"):
        run.set_knob("lr", 0.5)


def test_past_run_says_what_only_the_run_itself_has() -> None:
    notebook_launcher(rank, num_processes=1)
    past = runs()[0]
    with pytest.raises(
        AttributeError, match="no 'debug': it is read from its folder, and debug is of the run itself"
    ):
        past.debug(0)
    with pytest.raises(AttributeError, match=r"a past run has no 'colour'$"):
        past.colour  # noqa: B018
    assert not hasattr(past, "_ipython_display_")


def test_run_can_be_awaited() -> None:
    async def main() -> Any:
        first, second = launch(sleep, 0.1, num_processes=1), launch(sleep, 0.1, num_processes=2)
        return await asyncio.gather(_wait(first), _wait(second))

    async def _wait(run: Any) -> Any:
        return await run

    assert asyncio.run(main()) == [[0], [0, 1]]


@pytest.mark.parametrize("how", ["interrupt", "kill"])
def test_loop_and_its_other_tasks_go_on_when_an_awaited_run_is_stopped(tmp_path: Path, how: str) -> None:
    async def main() -> Any:
        run = launch(sleep, 60, str(tmp_path), num_processes=1)
        task = asyncio.gather(run, launch(rank, num_processes=1), return_exceptions=True)
        wait_for(tmp_path, 1)
        getattr(run, how)()
        return await task

    stopped, others = asyncio.run(main())
    assert isinstance(stopped, RunInterrupted)
    assert str(stopped).startswith("rank 0 was")
    assert isinstance(stopped.__cause__, KeyboardInterrupt)
    assert others == [0]


LEAVES = """
import sys, time
from pathlib import Path
from nbaccel import launch
def work():
    print("at work", flush=True)
    time.sleep(60)
run = launch(work, num_processes=2, folder=sys.argv[1])
while not all(rank.tail for rank in run.state.ranks):
    time.sleep(0.02)
"""


def test_run_is_stopped_and_no_rank_blamed_when_the_process_that_launched_it_exits(tmp_path: Path) -> None:
    script = tmp_path / "leaves.py"
    script.write_text(LEAVES)
    command = [sys.executable, str(script), str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (
        "nbaccel: work was still running and ends with this process: run.result() waits for it" in done.stderr
    )
    past = runs(tmp_path / "runs")[0]
    assert past.state.situation == "stopped"
    assert [known.detail for known in past.state.ranks] == [
        "the kernel or process that launched it has ended"
    ] * 2
    assert "SIGKILL" not in str(past.report())


@pytest.mark.parametrize(("method", "num_ranks"), [("fork", 2), ("spawn", 1)])
def test_interrupt_raises_in_ranks_then_here(tmp_path: Path, method: Any, num_ranks: int) -> None:
    """Signals come to a fresh interpreter in its first state, and to a fork as they were there."""
    run = launch(sleep, 60, str(tmp_path), num_processes=num_ranks, start_method=method)
    wait_for(tmp_path, num_ranks)
    run.interrupt()
    with pytest.raises(KeyboardInterrupt, match="in sleep"):
        run.result(timeout=40)
    assert notebook_launcher(rank, num_processes=2) == [0, 1]


def test_interrupt_ends_the_run_when_ranks_start(tmp_path: Path) -> None:
    for delay in (0.0, 0.01, 0.03, 0.1):
        run = launch(sleep, 60, num_processes=2)
        time.sleep(delay)
        run.interrupt()
        with pytest.raises(KeyboardInterrupt):
            run.result(timeout=20)
    assert notebook_launcher(rank, num_processes=2) == [0, 1]


def survive(folder: str) -> str:
    Path(folder, str(rank())).touch()
    try:
        sleep(60)
    except KeyboardInterrupt:
        Path(folder, f"caught-{rank()}").touch()
    return "survived"


def test_run_is_interrupted_when_function_swallows_the_interrupt(tmp_path: Path) -> None:
    run = launch(survive, str(tmp_path), num_processes=2, grace=40)
    wait_for(tmp_path, 2)
    run.interrupt()
    with pytest.raises(
        KeyboardInterrupt,
        match=r"had returned; nbaccel.last_run\(\).exception\(\).results has what came back",
    ):
        run.result(timeout=50)
    assert run.exception().results == ["survived", "survived"]  # type: ignore[union-attr]
    assert {"caught-0", "caught-1"} <= set(os.listdir(tmp_path))


def deaf(folder: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(folder, str(rank())).touch()
    while True:
        time.sleep(1)


def test_ranks_are_killed_when_they_ignore_the_interrupt(tmp_path: Path) -> None:
    run = launch(deaf, str(tmp_path), num_processes=2, grace=0.2)
    wait_for(tmp_path, 2)
    run.interrupt()
    with pytest.raises(KeyboardInterrupt, match="did not react"):
        run.result(timeout=10)


def test_kill_ends_deaf_ranks_at_once(tmp_path: Path) -> None:
    run = launch(deaf, str(tmp_path), num_processes=2, grace=60)
    wait_for(tmp_path, 2)
    run.kill()
    with pytest.raises(KeyboardInterrupt):
        run.result(timeout=10)
    assert run.folder is not None
    assert json.loads((run.folder / "result.json").read_text())["state"] == "stopped"
    run.kill()
    run.interrupt()
    assert notebook_launcher(rank, num_processes=2) == [0, 1]


def test_sigint_interrupts_when_the_main_thread_waits(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    run = launch(sleep, 60, str(tmp_path), num_processes=2)
    wait_for(tmp_path, 2)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        run.result(timeout=20)
    assert signal.getsignal(signal.SIGINT) is before


def told() -> dict[str, Any]:
    """What the folder says of the last run: as its report does, and the run read again from the folder."""
    run = last_run()
    assert run is not None
    assert run.folder is not None
    result: dict[str, Any] = json.loads((run.folder / "result.json").read_text())
    for values in (run.report().values, PastRun(run.folder).report().values):
        assert values["state"] == result["state"]
        assert "\n".join(values["error"]["lines"]) == result["problem"]
    return result


def test_run_times_out_when_max_time_passes() -> None:
    with pytest.raises(RunTimeout, match=r"max_time=3 s") as caught:
        notebook_launcher(sleep, (60,), num_processes=2, max_time=3)
    assert "in sleep" in str(caught.value)
    said = told()
    assert said["state"] == "failed"
    assert "max_time=3 s" in said["problem"]


class SlowToOpen:
    def __reduce__(self) -> Any:
        return _open_slowly, ()


def _open_slowly() -> None:
    time.sleep(30)


def test_launch_error_gives_each_state_when_start_times_out() -> None:
    with pytest.raises(LaunchError, match="start_timeout") as caught:
        notebook_launcher(print, (SlowToOpen(), bytes(100_000)), num_processes=2, start_timeout=1)
    assert "rank 0: " in str(caught.value)
    assert "rank 1: " in str(caught.value)
    said = told()
    assert (said["state"], said["failure"]) == ("failed", None)
    assert "start_timeout" in said["problem"]
    assert {rank["state"] for rank in said["ranks"]} == {"starting"}
    assert notebook_launcher(rank, num_processes=2) == [0, 1]


def wait_in_vain() -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if rank() == 0:
        dist.all_reduce(torch.ones(1))
    sleep(60)


def test_collective_fails_when_collective_timeout_passes() -> None:
    with pytest.raises(WorkerError, match=r"(?i)timed? ?out") as caught:
        notebook_launcher(wait_in_vain, num_processes=2, collective_timeout=3, grace=0.2)
    assert caught.value.ranks == (0,)


def totals() -> tuple[int, int, int]:
    me = psutil.Process()
    return len(me.children(recursive=True)), me.num_threads(), me.num_fds()


def fail_on(number: int) -> int:
    if number % 10 == 3:
        raise ValueError
    if number % 10 == 7:
        os._exit(2)
    return number


def settled_totals() -> tuple[int, int, int]:
    """The totals once what waits for the next launch is there."""
    waiting: list[int] = []
    while not waiting or waiting != named(os.getpid(), "nb-waiting"):
        waiting = named(os.getpid(), "nb-waiting")
        time.sleep(1.0)
    return totals()


@pytest.mark.parametrize("times", [20, pytest.param(50, marks=pytest.mark.long)])
def test_nothing_grows_when_launched_many_times(times: int) -> None:
    def go(number: int) -> None:
        if number % 10 in (3, 7):
            with pytest.raises(WorkerError):
                notebook_launcher(fail_on, (number,), num_processes=2, grace=0.05)
        else:
            assert notebook_launcher(fail_on, (number,), num_processes=2) == [number, number]

    for number in range(3):
        go(number)
    before = settled_totals()
    for number in range(times):
        go(number)
    wait_until(
        lambda: all(now <= then for now, then in zip(totals(), before, strict=True)),
        20,
        f"no more than {before} processes, threads and descriptors",
    )


def multiply() -> float:
    import torch

    return float((torch.ones(600, 600) @ torch.ones(600, 600)).sum())


def test_ranks_multiply_when_this_process_has_used_its_thread_pool() -> None:
    import torch

    torch.set_num_threads(2)
    expected = multiply()
    assert notebook_launcher(multiply, num_processes=2, max_time=60) == [expected, expected]


def meet(value: int) -> int:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor([value])
    dist.all_reduce(total)
    return int(total)


def test_values_do_not_mix_when_threads_launch_at_once() -> None:
    found: dict[int, Any] = {}

    def go(number: int) -> None:
        found[number] = [notebook_launcher(meet, (number + n,), num_processes=2) for n in range(2)]

    threads = [threading.Thread(target=go, args=(100 * number,)) for number in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == {base: [[2 * (base + n)] * 2 for n in range(2)] for base in (100, 200, 300)}


def test_many_ranks_start_when_there_are_more_than_cores() -> None:
    assert notebook_launcher(rank, num_processes=12) == list(range(12))


def test_logs_hold_what_a_rank_printed() -> None:
    run = launch(print, "hello", num_processes=2)
    run.result()
    assert run.logs(1) == "hello\n"
    with pytest.raises(ConfigError, match="there is no rank 2"):
        run.logs(2)
