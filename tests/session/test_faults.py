"""Seeded faults: whatever happens to a rank, the person gets a typed error or a report that names it, in
bounded time, and the next call works."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from nbaccel import Run, Session, launch, notebook_launcher
from nbaccel.errors import WorkerError
from tests.conftest import wait_until

BOUND = 25.0
HANGS = ("stop", "hold the lock", "deadlock", "mismatch")


def rank() -> int:
    return int(os.environ["RANK"])


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def raise_error() -> None:
    raise ValueError("a fault")


def exit_at_once() -> None:
    os._exit(3)


def crash() -> None:
    import ctypes

    ctypes.string_at(0)


def hold_the_lock() -> None:
    re.match(r"(a+)+$", "a" * 60 + "b")


def exhaust_memory() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, resource.RLIM_INFINITY))
    torch.ones(1 << 34)


def deadlock() -> None:
    import threading

    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def call_another() -> None:
    import torch.distributed as dist

    dist.broadcast(torch.ones(4), 0)


FAULTS: dict[str, Callable[[], None]] = {
    "kill": kill,
    "stop": stop,
    "raise": raise_error,
    "exit": exit_at_once,
    "crash": crash,
    "hold the lock": hold_the_lock,
    "deadlock": deadlock,
    "mismatch": call_another,
    "memory": exhaust_memory,
}


def train(victim: int, step: int, fault: Callable[[], None]) -> int:
    """A few synchronised steps; in one of them something happens to one rank."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    for number in range(4):
        if number == step and rank() == victim:
            fault()
        dist.all_reduce(torch.ones(8))
    dist.barrier()
    return rank()


def check(run: Run, name: str, victim: int) -> None:
    """The run told of its fault: an error, or a report while it hangs, then an interrupt."""
    if name in HANGS:
        try:
            stall = wait_until(lambda: run.stall or run.done(), BOUND, f"a word about {name}")
        except AssertionError:
            raise AssertionError(f"{name} on rank {victim}, and this was all:\n{run.stacks()}") from None
        if stall is not True:
            assert f"rank {victim}" in stall.text or "mismatch" in stall.text, stall.text
            run.interrupt()
        with pytest.raises((KeyboardInterrupt, WorkerError)) as ended:
            run.result(timeout=BOUND)
        assert "rank" in str(ended.value)
        return
    with pytest.raises(WorkerError) as caught:
        run.result(timeout=BOUND)
    assert victim in caught.value.ranks, f"{name} on rank {victim}: {caught.value}"


def drawn(seed: int, num_ranks: int) -> tuple[str, int, int]:
    """(fault, victim, step)."""
    chance = random.Random(seed)
    return sorted(FAULTS)[seed % len(FAULTS)], chance.randrange(num_ranks), chance.randrange(4)


def hit_launch(seed: int) -> None:
    name, victim, step = drawn(seed, 2)
    options: dict[str, Any] = {"stall_after": 1, "grace": 0.3, "output": "none", "folder": False}
    run = launch(train, victim, step, FAULTS[name], num_processes=2, **options)
    check(run, name, victim)
    assert notebook_launcher(rank, num_processes=2) == [0, 1]


def hit_session(session: Session, seed: int) -> None:
    name, victim, step = drawn(seed, session.num_processes)
    run = session.submit(train, victim, step, FAULTS[name])
    check(run, name, victim)
    assert session.run(rank) == list(range(session.num_processes))
    total = session.run(sum_of_ranks)
    assert total == [sum(range(session.num_processes))] * session.num_processes


def sum_of_ranks() -> int:
    import torch.distributed as dist

    mine = torch.tensor([rank()])
    dist.all_reduce(mine)
    return int(mine)


@pytest.fixture(scope="module")
def session(warm: None) -> Iterator[Session]:
    with Session(3, stall_after=1, grace=0.5, output="none") as started:
        yield started


@pytest.mark.parametrize("seed", range(0, len(FAULTS), 2), ids=sorted(FAULTS)[::2])
def test_a_launch_tells_of_a_fault_and_the_next_one_works(seed: int, clean: None) -> None:
    hit_launch(seed)


@pytest.mark.parametrize("name", HANGS)
def test_a_session_tells_of_a_hang_by_itself_and_goes_on(session: Session, name: str) -> None:
    """Of the other faults tests/notebook/test_session_faults.py tells."""
    started = time.monotonic()
    hit_session(session, sorted(FAULTS).index(name))
    assert time.monotonic() - started < 2 * BOUND


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_hundred_faults_are_told_and_the_next_call_works(session: Session) -> None:
    for seed in range(100, 200):
        if seed % 2:
            hit_session(session, seed)
        else:
            hit_launch(seed)
