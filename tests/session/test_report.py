"""A failure in words, from recorded events; on real ranks in `test_run_failures`."""

from __future__ import annotations

import signal
from dataclasses import replace

from nbaccel.errors import LeftLoopError, TrustError
from nbaccel.session.report import Outcome, worker_error
from nbaccel.wire.events import Died, ExceptionInfo, Frame, Raised

TORCH = "/venv/lib/python3.11/site-packages/torch"
CELL, FILE = "/tmp/ipykernel_1/7.py", "/home/ada/train.py"
ALL_REDUCE = Frame(f"{TORCH}/distributed/distributed_c10d.py", 3252, "all_reduce", "work.wait()")
BACKWARD = Frame(f"{TORCH}/autograd/graph.py", 979, "_engine_run_backward", "")


def raised(rank: int, name: str, message: str, *frames: Frame, time: float = 1.0) -> Raised:
    info = ExceptionInfo(type_name=name, message=f"{name}: {message}", frames=frames)
    return Raised(rank=rank, time=time, call=0, info=info)


def words(*events: Raised | Died) -> str:
    outcome = Outcome(num_ranks=4, failures={event.rank: event for event in events})
    return str(worker_error(outcome, lambda name: "Cell In[7]" if name == CELL else None))


def test_peers_that_waited_are_grouped_when_one_rank_raises() -> None:
    place = Frame(FILE, 88, "train", "dist.all_reduce(x)")
    first = raised(3, "ValueError", "boom", Frame(CELL, 12, "f", "raise"), time=0.0)
    peers = [
        raised(
            rank, "RuntimeError", f"[gloo] Connection closed by peer [127.0.0.1]:{rank}", place, ALL_REDUCE
        )
        for rank in (0, 1, 2)
    ]
    said = words(first, *peers)
    assert "rank 3 of 4 failed: ValueError: boom (at Cell In[7] line 12)" in said
    assert "ranks 0-2 waited in all_reduce, called from train.py:88" in said


def test_peers_in_backward_are_told_so_when_a_rank_dies() -> None:
    said = words(
        Died(rank=1, time=0.0, exitcode=-9),
        raised(0, "RuntimeError", "Connection reset by peer", Frame(FILE, 20, "train", ""), BACKWARD),
        raised(2, "KeyboardInterrupt", "", Frame(FILE, 20, "train", ""), BACKWARD),
    )
    assert "ranks 0,2 waited in backward, called from train.py:20" in said


def test_an_error_of_its_own_is_kept_when_it_was_raised_in_a_collective() -> None:
    said = words(
        raised(0, "ValueError", "boom", time=0.0),
        raised(1, "RuntimeError", "Expected all tensors to be on the same device", ALL_REDUCE),
    )
    assert "rank 1 raised after it: RuntimeError: Expected all tensors" in said


def test_rank_that_heard_of_an_error_before_it_was_told_is_not_its_cause() -> None:
    left = "nbaccel.errors.LeftLoopError"
    assert issubclass(LeftLoopError, TrustError)
    assert f"{LeftLoopError.__module__}.{LeftLoopError.__qualname__}" == left
    heard = raised(0, left, "rank 0 goes on; rank 1 has left the loop", time=1.0)
    own = raised(1, "ValueError", "boom", Frame(CELL, 12, "f", "raise"), time=1.01)
    assert "rank 1 of 4 failed: ValueError: boom" in words(heard, own)
    assert "rank 0 of 4 failed" in words(heard, replace(own, time=9.0))


def test_error_raised_from_a_broken_connection_is_no_cause_of_a_death_in_its_moment() -> None:
    broken = raised(0, "RuntimeError", "Connection closed by peer").info
    wrapped = ExceptionInfo(type_name="MyError", message="MyError: no step", frames=(), context=broken)
    died = Died(rank=2, time=1.2, exitcode=-9)
    assert "rank 2 of 4 was ended by SIGKILL" in words(Raised(rank=0, time=1.0, call=0, info=wrapped), died)


def test_rank_had_returned_though_it_was_ended_while_it_was_leaving() -> None:
    failed = raised(1, "ValueError", "boom")
    outcome = Outcome(
        num_ranks=3,
        failures={1: failed},
        ended_by_us={0: signal.SIGTERM, 2: signal.SIGTERM},
        returned=frozenset({0}),
    )
    said = str(worker_error(outcome, lambda name: None))
    assert "rank 0 had returned\nrank 2 did not end in the 1 s given: ended by SIGTERM" in said


def test_memory_is_blamed_for_a_kill_only_where_nothing_else_is_known() -> None:
    assert "running out of memory" in words(Died(rank=1, time=0.0, exitcode=-9))
    said = words(Died(rank=1, time=0.0, exitcode=-9, detail="the process that made it is gone"))
    assert "rank 1 of 4 was ended by SIGKILL\nthe process that made it is gone" in said


def test_several_ranks_that_ended_alike_were_ended() -> None:
    said = words(*(Died(rank=rank, time=0.0, exitcode=-15) for rank in (0, 1)))
    assert "ranks 0-1 of 4 were ended by SIGTERM" in said
