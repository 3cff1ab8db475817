"""Post-mortem, breakpoint(), stacks and the doctor in a real kernel, with a front end that types answers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import Kernel, named, wait_until

pytestmark = pytest.mark.kernel

FAILS = """
def train():
    import os, torch, torch.distributed as dist
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    secret = 40 + int(os.environ["RANK"])
    if secret == 42:
        raise ValueError("boom")
    dist.all_reduce(torch.ones(3))
notebook_launcher(train, num_processes=3)
"""


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, state_home: None) -> Iterator[Kernel]:
    """A kernel with the magics and a warm server."""
    started = Kernel(tmp_path_factory.mktemp("kernel"))
    started.ok("%load_ext nbaccel\nfrom nbaccel import last_run, launch, notebook_launcher")
    started.ok("notebook_launcher(lambda: None, num_processes=2)", timeout=120)
    yield started
    started.close()


def ranks_left(kernel: Kernel) -> list[str]:
    return [name for name in ("nb-rank-0", "nb-rank-1", "nb-rank-2") if named(kernel.pid, name)]


def test_the_failed_rank_of_a_launch_can_be_debugged_until_the_next_one(live: Kernel) -> None:
    failed = live.run(FAILS, answers=[])
    assert failed.error == "WorkerError"
    assert "ranks 0-1 waited in all_reduce, called from Cell In[" in failed.traceback
    last = failed.traceback.rstrip().splitlines()[-1]
    assert re.search(r"rank 2 is kept with its frames for a look, and holds \d+ MB of memory", last)
    assert ranks_left(live) == ["nb-rank-2"]
    looked = live.ok("%nbaccel debug 2", answers=["p secret + 1000", "q"])
    assert looked.asked == ["[rank 2] (Pdb) ", "[rank 2] (Pdb) "]
    assert "ValueError: boom" in looked.stdout
    assert "1042" in looked.stdout
    assert "train()" in live.ok("%rank_debug 2", answers=["w", "q"]).stdout  # again, as often as one likes
    assert "only rank 2 is kept" in live.run("%rank_debug 1", answers=[]).output
    live.ok("notebook_launcher(int, num_processes=2)", answers=[])
    assert ranks_left(live) == []
    assert "nothing is kept" in live.run("%rank_debug 2", answers=[]).output


def test_a_parked_rank_ends_when_it_is_released_and_when_its_time_is_over(live: Kernel) -> None:
    live.run(FAILS, answers=[])
    live.ok("last_run().release()", answers=[])
    assert ranks_left(live) == []
    short = FAILS.replace("num_processes=3", "num_processes=3, park_for=1")
    assert "or after 1 s" in live.run(short, answers=[]).traceback
    assert ranks_left(live) == ["nb-rank-2"]
    wait_until(lambda: not ranks_left(live), 10, "the end of the parked rank")


def test_no_rank_is_parked_when_nobody_can_look(live: Kernel) -> None:
    failed = live.run(FAILS)
    assert failed.error == "WorkerError"
    assert "is kept" not in failed.traceback
    assert ranks_left(live) == []


@pytest.mark.slow
def test_a_parked_rank_dies_with_the_kernel(tmp_path: Path, state_home: None) -> None:
    kernel = Kernel(tmp_path)
    try:
        kernel.ok("from nbaccel import notebook_launcher")
        kernel.run(FAILS, timeout=120, answers=[])
        (parked,) = named(kernel.pid, "nb-rank-2")
        kernel.kill()
        wait_until(lambda: not psutil.pid_exists(parked), 5, "the parked rank's end")
    finally:
        kernel.close()


def test_breakpoint_asks_rank_after_rank(live: Kernel) -> None:
    code = """
def look():
    import os
    mine = int(os.environ["RANK"])
    breakpoint()
    return mine
notebook_launcher(look, num_processes=2)
"""
    cell = live.ok(code, answers=["p mine", "mine = 7", "c", "p mine", "c"])
    first, second = cell.asked[0], cell.asked[3]
    assert cell.asked == [first] * 3 + [second] * 2
    assert {first, second} == {"[rank 0] (Pdb) ", "[rank 1] (Pdb) "}
    assert "-> return mine" in cell.stdout
    assert "7" in str(cell.result)


def test_an_interrupt_at_the_prompt_ends_the_debugger(live: Kernel) -> None:
    live.run(FAILS, answers=[])
    for typed in (["p secret"], ["interact", "secret"]):
        looking = live.start("%nbaccel debug", answers=[*typed])
        live.pump(lambda: len(looking.asked) == len(typed) + 1, 30, "the prompt")  # noqa: B023  # called at once
        live.settle(0.5)
        live.interrupt()
        live.finish(looking, timeout=20)
        assert "42" in looking.stdout
    live.ok("last_run().release()", answers=[])


def test_python_at_a_frame_is_left_for_the_debugger(live: Kernel) -> None:
    live.run(FAILS, answers=[])
    typed = ["secret = 50", "interact", "def twice():", "    return secret * 2", "", "twice() + 1000"]
    for leaves in ("quit()", "q", "raise SystemExit"):
        looked = live.ok("%nbaccel debug", answers=[*typed, leaves, "p secret + 2000", "q"])
        assert "1100" in looked.stdout
        assert "2050" in looked.stdout
    live.ok("last_run().release()", answers=[])


def test_a_sessions_failed_rank_is_debugged_and_keeps_its_variables(live: Kernel) -> None:
    live.ok("%nbaccel start -n 2", answers=[])
    failed = live.run("%%ranks\ny = rank * 10\nif rank == 1:\n    1 / 0", answers=[])
    assert failed.error == "WorkerError"
    looked = live.ok("%nbaccel debug 1", answers=["p y + 1", "q"])
    assert "ZeroDivisionError" in looked.stdout
    assert "11" in looked.stdout
    assert "rank 0 has kept no failure" in live.run("%nbaccel debug 0", answers=[]).output
    stacks = live.ok("%nbaccel stacks", answers=[])
    assert stacks.result is not None
    assert stacks.result.startswith("no rank waits for another")
    asked = live.ok("%%ranks 1\n%debug", answers=["p y + 2", "q"])
    assert "12" in asked.stdout
    live.ok("%%ranks\nassert y == rank * 10", answers=[])
    live.ok("%nbaccel stop", answers=[])
    assert "no ranks" in live.run("%nbaccel stacks", answers=[]).output


def test_the_rank_that_is_asked_for_or_failed_last_is_debugged_beside_a_parked_one(live: Kernel) -> None:
    live.ok("%nbaccel start -n 2", answers=[])
    parked = FAILS.replace("== 42", "== 40").replace("num_processes=3", "num_processes=2")
    assert "rank 0 is kept" in live.run(parked, answers=[]).traceback
    live.run("%%ranks\nif rank == 1:\n    in_session = 1000 + rank\n    1 / 0", answers=[])
    assert "1001" in live.ok("%nbaccel debug 1", answers=["p in_session", "q"]).stdout
    assert "ValueError: boom" in live.ok("%nbaccel debug 0", answers=["q"]).stdout
    live.ok("%nbaccel vars")
    assert "ZeroDivisionError" in live.ok("%nbaccel debug", answers=["q"]).stdout
    assert "rank 1 was replaced" in live.run("%%ranks 1\nimport os; os._exit(3)", answers=[]).traceback
    assert "rank 1 has kept no failure: its process is a fresh one" in (
        live.run("%nbaccel debug 1", answers=[]).output
    )
    live.ok("last_run().release()\n%nbaccel stop", answers=[])


def test_the_doctor_answers_as_a_magic(live: Kernel) -> None:
    live.ok("import threading\nlock = threading.Lock()\ndef locked():\n    return lock")
    found = live.ok("%nbaccel doctor locked").result
    assert found is not None
    assert "✓ leftover ranks" in found
    assert "✗ function locked" in found
