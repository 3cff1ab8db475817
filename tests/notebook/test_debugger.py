"""Post-mortem, breakpoint(), stacks and the doctor in a real kernel, with a front end that types answers."""

from __future__ import annotations

import re

import pytest

from tests.conftest import Kernel, named, wait_until

pytestmark = pytest.mark.kernel

FAILS = """
def train():
    import os, time, torch, torch.distributed as dist
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    secret, store = 40 + int(os.environ["RANK"]), dist.distributed_c10d._get_default_store()
    if secret == 42:
        store.wait([f"rank {40 + rank} waits" for rank in range(dist.get_world_size()) if 40 + rank != secret])
        time.sleep(0.5)
        raise ValueError("boom")
    store.set(f"rank {secret} waits", "")
    dist.all_reduce(torch.ones(3))
notebook_launcher(train, num_processes=3)
"""


@pytest.fixture(scope="module")
def live(kernel: Kernel) -> Kernel:
    """The kernel with the magics."""
    kernel.ok("%load_ext nbaccel\nfrom nbaccel import last_run")
    return kernel


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
    short = FAILS.replace("num_processes=3", "num_processes=3, park_for=5")
    assert "or after 5 s" in live.run(short, answers=[]).traceback
    assert ranks_left(live) == ["nb-rank-2"]
    wait_until(lambda: not ranks_left(live), 30, "the end of the parked rank")


def test_no_rank_is_parked_when_nobody_can_look(live: Kernel) -> None:
    failed = live.run(FAILS)
    assert failed.error == "WorkerError"
    assert "is kept" not in failed.traceback
    assert ranks_left(live) == []


def test_breakpoint_asks_rank_after_rank(live: Kernel) -> None:
    code = """
def look():
    import os
    mine = int(os.environ["RANK"])
    breakpoint()
    return mine
notebook_launcher(look, num_processes=2)
"""
    for _ in range(5):  # on a starved machine a rank may be slow to ask again, and lose its turn
        cell = live.ok(code, answers=["p mine", "mine = 7", "c", "p mine", "c"])
        first, second = cell.asked[0], cell.asked[-1]
        if in_turn := cell.asked == [first] * 3 + [second] * 2:
            break
    assert in_turn, cell.asked
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
