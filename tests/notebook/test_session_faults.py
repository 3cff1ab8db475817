"""Whatever happens to a rank: an error that names it in bounded time, and the next cell works."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from nbaccel import Session
from nbaccel.errors import NbaccelError

RANKS = 3
FAULTS = {
    "exception": "raise ValueError('a fault')",
    "SIGKILL": "os.kill(os.getpid(), signal.SIGKILL)",
    "SIGSTOP": "os.kill(os.getpid(), signal.SIGSTOP)",
    "os._exit": "os._exit(7)",
    "segfault": "ctypes.string_at(0)",
    "loop": "re.match(r'(a+)+$', 'a' * 60 + 'b')",  # C code with the interpreter's lock held
    "absent": "time.sleep(600)",
    "mismatch": "dist.all_reduce(torch.ones(5000))",
    "memory": "resource.setrlimit(resource.RLIMIT_AS, (1 << 33, 1 << 33)); bytearray(1 << 40)",
}
# A hundred were run (3.5 min on two busy cores); the suite takes some of them.
MANY = int(os.environ.get("NBACCEL_TEST_FAULTS", "15"))


@pytest.fixture(scope="module")
def session(warm: None) -> Iterator[Session]:
    with Session(RANKS, device="cpu", grace=0.5, output="none") as started:
        yield started


def suffer(session: Session, kind: str, bad: int, delay: float) -> str:
    """Have a rank fail in a cell; what the person is told."""
    cell = (
        "import ctypes, os, re, resource, signal, time, torch\n"
        f"if rank == {bad}:\n    time.sleep({delay})\n    {FAULTS[kind]}\n"
        "for _ in range(3): dist.all_reduce(torch.ones(100))"
    )
    run = session.submit(in_cell, cell)
    try:
        try:
            run.result(timeout=3.0)
        except TimeoutError:  # it hangs: the person looks, and presses ■
            report = str(run.stacks())
            assert f"rank {bad}" in report, report
            run.interrupt()
            run.result(timeout=20.0)
    except (NbaccelError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return "returned"


def in_cell(source: str) -> None:
    import __main__

    exec(compile(source, "cell", "exec"), __main__.__dict__)


def check(session: Session, kind: str, bad: int, delay: float) -> None:
    told = suffer(session, kind, bad, delay)
    assert f"rank {bad}" in told or "ranks 0-2" in told, f"{kind} on rank {bad} after {delay:.2f} s: {told}"
    shown = session.execute("import torch\nt = torch.ones(1); dist.all_reduce(t); int(t), 1 + 1")
    assert [repr(one) for one in shown] == [f"({RANKS}, 2)"] * RANKS, kind


@pytest.mark.parametrize("kind", FAULTS)
def test_next_cell_works_when_a_rank_suffers(session: Session, kind: str) -> None:
    check(session, kind, bad=1, delay=0.0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_next_cell_works_after_each_of_many_random_faults(session: Session) -> None:
    chance = random.Random(int(os.environ.get("NBACCEL_TEST_SEED", "5")))
    for _ in range(MANY):
        check(session, chance.choice(list(FAULTS)), chance.randrange(RANKS), chance.random() * 0.1)
