"""A session of ranks: calls, cells, variables, and what becomes of them when something goes wrong."""

from __future__ import annotations

import functools
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbaccel import Session, notebook_launcher
from nbaccel.errors import ConfigError, PayloadError, WorkerError


@pytest.fixture(scope="module")
def marks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a rank leaves its mark when it calls `there`."""
    return tmp_path_factory.mktemp("marks")


@pytest.fixture(scope="module")
def session(warm: None, marks: Path) -> Iterator[Session]:
    """Three ranks that every test of this module finds alive, and leaves so."""
    with Session(3, device="cpu", grace=2.0) as started:
        started.execute("import os, signal, time, torch\ntorch.set_num_threads(1)")
        yield started


def word_has_come() -> bool | None:
    word = sys.modules["__main__"].__dict__["word"]
    return None if word is None else bool(word.wait())


def pid() -> int:
    return os.getpid()


def fail_on(bad: int) -> int:
    import torch.distributed as dist

    if dist.get_rank() == bad:
        raise ValueError(f"rank {bad} gives up")
    dist.barrier()
    return bad


def mean_of_ranks() -> float:
    import torch
    import torch.distributed as dist

    value = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(value)
    return float(value) / dist.get_world_size()


def leave_mark(marks: Path) -> None:
    (marks / os.environ["RANK"]).touch()


def press_when_all_are_there(session: Session, marks: Path, *, times: int = 1) -> None:
    """Press ■ a moment after every rank has called `there`, so often in a row."""
    session.push(there=functools.partial(leave_mark, marks))
    for mark in marks.iterdir():
        mark.unlink()

    def press() -> None:
        wait_for(lambda: len(list(marks.iterdir())) == 3)
        for _ in range(times):
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()


# ── calls and variables ───────────────────────────────────────────────────────────────────────────────


def test_ranks_are_the_same_processes_when_called_again(session: Session) -> None:
    first = session.run(pid)
    assert len(set(first)) == 3
    assert session.run(pid) == first
    assert session.run(mean_of_ranks) == [1.0, 1.0, 1.0]


def test_names_are_prebound_when_a_cell_runs(session: Session) -> None:
    shown = session.execute("rank, local_rank, world_size, str(device), dist.is_initialized()")
    assert [repr(one) for one in shown] == [f"({rank}, {rank}, 3, 'cpu', True)" for rank in range(3)]


def test_variables_live_when_the_next_call_comes(session: Session) -> None:
    session.push(scale=10)
    session.execute("mine = rank * scale")
    assert session.pull("mine") == [0, 10, 20]
    assert session.pull("mine", ranks=[2]) == [20]
    session.execute("layer = torch.nn.Linear(2, 2)", ranks=[1])
    assert session.pull("layer.weight", ranks=[1])[0].shape == (2, 2)
    with pytest.raises(WorkerError, match="name 'layer' is not defined in rank 0"):
        session.pull("layer", ranks=[0])


def test_pull_names_the_rank_when_results_are_shown(session: Session) -> None:
    session.push(flag="on")
    session.execute("flag = 'off'", ranks=[1])
    assert repr(session.pull("flag")) == "[0,2] 'on'\n[1] 'off'"
    assert repr(session.pull("flag", ranks=[1, 2])) == "[1] 'off'\n[2] 'on'"


def test_runs_are_served_in_order_when_submitted_together(session: Session) -> None:
    session.push(trail=[])
    runs = [session.submit(append, number) for number in range(5)]
    assert [run.result(timeout=30)[0] for run in runs] == [1, 2, 3, 4, 5]
    assert session.pull("trail", ranks=[0]) == [[0, 1, 2, 3, 4]]


def append(number: int) -> int:
    import __main__

    __main__.trail.append(number)
    return len(__main__.trail)


def test_waiting_run_never_starts_when_it_is_interrupted(session: Session) -> None:
    first, second = session.submit(time.sleep, 0.3), session.submit(append, 9)
    second.interrupt()
    with pytest.raises(KeyboardInterrupt, match="before its turn"):
        second.result(timeout=10)
    assert first.result(timeout=10) == [None] * 3


def test_large_value_arrives_whole_when_pushed_and_pulled(session: Session) -> None:
    import torch

    big = torch.arange(1_000_000)
    session.push(big=big)
    assert all(torch.equal(one, big) for one in session.pull("big"))


def test_variables_tell_what_differs_when_ranks_disagree(session: Session) -> None:
    session.execute("t = torch.full((2, 3), float(rank // 2)); same = {'a': [1, 2.5, 'x']}")
    found = session.variables()
    t = {rank: next(one for one in listed if one.name == "t") for rank, listed in found.items()}
    assert (t[0].shape, t[0].dtype, t[0].device, t[0].bytes) == ((2, 3), "float32", "cpu", 24)
    assert t[0].checksum == t[1].checksum != t[2].checksum
    same = {one.checksum for listed in found.values() for one in listed if one.name == "same"}
    assert len(same) == 1
    assert "" not in same
    assert not any(one.name in ("torch", "rank", "dist", "append") for one in found[0])


def test_completions_are_the_ranks_names_when_asked(session: Session) -> None:
    session.push(train_loss=0.5)
    assert "train_loss" in session.complete("x = train_l", 11).texts
    assert any(name.endswith("all_reduce") for name in session.complete("dist.all_r", 10).texts)


def test_unknown_rank_is_refused_when_chosen(session: Session) -> None:
    with pytest.raises(ConfigError, match="there is no rank 7: this session has ranks 0 to 2"):
        session.pull("x", ranks=[7])
    with pytest.raises(ConfigError, match="no rank was chosen"):
        session.execute("1", ranks=[])


def test_choice_of_ranks_is_refused_when_it_is_no_list_of_numbers(session: Session) -> None:
    for ranks in (1, "01", [1.0]):
        with pytest.raises(ConfigError, match="write them as a list of numbers"):
            session.pull("rank", ranks=ranks)  # type: ignore[arg-type]
    assert session.pull("rank", ranks=(rank for rank in (2, 0))) == [0, 2]  # type: ignore[arg-type]
    assert list(session.variables(ranks=[1])) == [1]


def test_every_name_can_be_pushed(session: Session) -> None:
    session.push(self=1, values=2)
    assert session.pull("self") == [1] * 3
    with pytest.raises(PayloadError, match=r"^guard is a _thread\.lock.* Instead, create it in the ranks\."):
        session.push(guard=threading.Lock())


def test_wrong_option_is_refused_and_replaces_nothing(session: Session) -> None:
    wrong: list[dict[str, Any]] = [{"output": "foo"}, {"env": {"A": None}}, {"env": [1]}, {"device": "no"}]
    for option in wrong:
        with pytest.raises(ConfigError, match=r"must be one of|one of auto|env must be"):
            Session(2, **{"device": "cpu", **option}, replaces=session)
    assert not session.closed


def test_variables_are_listed_when_one_cannot_be_described(session: Session) -> None:
    session.execute(
        "huge = 10**5000\nlazy = torch.nn.LazyLinear(3)\n"
        "class Odd:\n    @property\n    def shape(self): raise RuntimeError('no')\n"
        "odd = Odd()\nordered = {'a': {1, 2}, 'b': 2} if rank else {'b': 2, 'a': {2, 1}}"
    )
    found = session.variables()
    by_name = [{one.name: one for one in listed} for listed in found.values()]
    assert {"huge", "lazy", "odd", "ordered"} <= by_name[0].keys()
    for name in ("huge", "ordered"):
        assert len({one[name].checksum for one in by_name}) == 1
        assert by_name[0][name].checksum
    session.execute("del huge, lazy, odd, ordered, Odd")


# ── functions written for a launch ────────────────────────────────────────────────────────────────────


def as_launched() -> int:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    size = dist.get_world_size()
    dist.barrier()
    dist.destroy_process_group()
    return size


def test_launcher_function_runs_on_warm_ranks_when_given_the_session(session: Session) -> None:
    before = session.run(pid)
    assert notebook_launcher(as_launched, session=session) == [3, 3, 3]
    assert session.run(mean_of_ranks) == [1.0, 1.0, 1.0], "the group is there again"
    assert notebook_launcher(as_launched, num_processes=3, session=session, returns="rank0") == [
        3,
        None,
        None,
    ]
    assert session.run(pid) == before
    with pytest.raises(ConfigError, match="grace was asked, but the session's 3 ranks"):
        notebook_launcher(as_launched, session=session, grace=3.0)
    with pytest.raises(ConfigError, match="num_processes=2 was asked"):
        notebook_launcher(as_launched, num_processes=2, session=session)


# ── failures ──────────────────────────────────────────────────────────────────────────────────────────


def test_failed_rank_is_named_and_others_keep_variables_when_one_raises(session: Session) -> None:
    before = session.run(pid)
    session.execute("kept = rank")
    began = time.monotonic()
    with pytest.raises(WorkerError, match="rank 1 of 3 failed: ValueError: rank 1 gives up") as caught:
        session.run(fail_on, 1)
    assert time.monotonic() - began < 15  # a bound against a hang
    assert "ranks 0,2 waited in barrier, called from" in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError)
    assert session.pull("kept") == [0, 1, 2]
    assert session.run(mean_of_ranks) == [1.0, 1.0, 1.0]
    assert session.run(pid) == before


# C code that looks at no signal: it waits for a lock that it has itself
DEAF = (
    "[__import__('ctypes').CDLL(None).pthread_mutex_lock(lock)"
    " for lock in 2 * [__import__('ctypes').create_string_buffer(64)]]"
)


def test_error_comes_in_time_when_a_peer_cannot_be_stopped(session: Session) -> None:
    session.execute("kept = rank")
    began = time.monotonic()
    with pytest.raises(WorkerError, match="rank 0 of 3 failed: ZeroDivisionError") as caught:
        session.execute(f"if rank == 0: 1/0\nif rank == 2: {DEAF}\ndist.barrier()")
    assert time.monotonic() - began < 30  # a bound against a hang; that rank never ends by itself
    assert "still busy, and given 2 s in all: rank 2" in str(caught.value)
    assert session.pull("kept", ranks=[0, 1]) == [0, 1]
    assert repr(session.execute("'kept' in globals()", ranks=[2])[0]) == "False"
    assert session.run(mean_of_ranks) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("os._exit(3)", "exit code 3"),
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
    ],
)
def test_dead_rank_is_replaced_and_named_when_it_ends(session: Session, how: str, what: str) -> None:
    session.execute("import os, signal\nkept = rank")
    before = session.run(pid)
    with pytest.raises(WorkerError, match=f"rank 1 of 3 .*{what}") as caught:
        session.execute(f"if rank == 1:\n    {how}\ndist.barrier()")
    assert "rank 1 was replaced by a fresh process: its variables are lost; ranks 0,2 keep theirs" in str(
        caught.value
    )
    after = session.run(pid)
    assert after[0] == before[0]
    assert after[2] == before[2]
    assert after[1] != before[1]
    assert session.pull("kept", ranks=[0, 2]) == [0, 2]
    assert session.run(mean_of_ranks) == [1.0, 1.0, 1.0]


def test_rank_that_died_idle_is_replaced_when_the_next_call_comes(
    session: Session, capfd: pytest.CaptureFixture[str]
) -> None:
    victim = session.run(pid)[2]
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: session.state.ranks[2].pid not in (None, victim))
    assert session.run(mean_of_ranks) == [1.0, 1.0, 1.0]


def wait_for(condition: Any, timeout: float = 20.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# ── interrupts ────────────────────────────────────────────────────────────────────────────────────────


COUNTING = """
import time
count = 0
dist.barrier()
while True:
    count += 1; time.sleep(0.01)
    if count == 5 and rank == 0: os.kill(os.getppid() if False else kernel, signal.SIGINT)
"""


def test_interrupt_keeps_variables_when_ranks_run_python(session: Session, marks: Path) -> None:
    before = session.run(pid)
    press_when_all_are_there(session, marks)
    with pytest.raises(KeyboardInterrupt, match=r"ranks 0-2 were at .*:4, in"):
        session.execute("there(); count = 0\nimport time\nwhile True:\n    time.sleep(0.01); count += 1")
    assert min(session.pull("count")) > 0
    assert session.run(pid) == before
    assert session.run(mean_of_ranks) == [1.0, 1.0, 1.0]


def test_interrupt_reaches_ranks_that_have_not_begun(session: Session) -> None:
    before = session.run(pid)
    os.kill(before[2], signal.SIGSTOP)
    run = session.submit(time.sleep, 60)
    run.interrupt()
    time.sleep(0.1)  # the signal comes while the rank still ignores it
    os.kill(before[2], signal.SIGCONT)
    with pytest.raises(KeyboardInterrupt, match="ranks 0-2 were interrupted"):
        run.result(timeout=20)
    assert session.run(pid) == before


TRAINING = """
import torch
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
pair = dist.new_group([0, 1])
def step(seed):
    torch.manual_seed(seed)
    model.zero_grad()
    model(torch.randn(3, 4) + rank).sum().backward()
    return float(model.module.weight.grad.sum())
expected = step(1)
"""


def test_wrappers_and_groups_work_when_ranks_were_freed_from_a_collective(
    session: Session, marks: Path
) -> None:
    before = session.run(pid)
    session.execute(TRAINING)
    for _ in range(3):
        press_when_all_are_there(session, marks)
        with pytest.raises(KeyboardInterrupt, match=r"ranks 0,2 waited in .*rank 1 was at"):
            session.execute("import time; there()\nif rank == 1:\n    time.sleep(60)\nstep(2)")
    assert session.run(pid) == before
    assert session.execute("abs(step(1) - expected) < 1e-6")[0].data["text/plain"] == "True"
    session.execute("t = torch.ones(1)\nif rank < 2: dist.all_reduce(t, group=pair)")
    assert [float(t) for t in session.pull("t")] == [2.0, 2.0, 1.0]
    assert session.run(mean_of_ranks) == [1.0, 1.0, 1.0]
    session.execute(
        "other = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2)); del model, other"
    )


def come_never(op: str, absent: int) -> None:
    import torch
    import torch.distributed as dist

    if dist.get_rank() == absent:
        if op == "all_reduce":
            return
        time.sleep(60)
    dist.barrier() if op == "barrier" else dist.all_reduce(torch.ones(1))


def test_missing_rank_is_named_when_ranks_were_freed_from_collectives_before(session: Session) -> None:
    session.execute("dist.barrier()")
    with pytest.raises(WorkerError):
        session.run(fail_on, 1)
    # of rank 1 torch's records still hold what it called before: a barrier, and one of the same number
    for op, what in (("all_reduce", "its function returned"), ("barrier", "it is in come_never")):
        run = session.submit(come_never, op, 1)
        missing = f"rank 1 has not called {op} #1; {what}"
        wait_for(lambda run=run, missing=missing: missing in run.stacks().headlines()[0])
        run.interrupt()
        with pytest.raises(KeyboardInterrupt, match=f"ranks 0,2 waited in {op}"):
            run.result(timeout=20)


def test_group_is_made_again_when_a_rank_fails_behind_others_after_an_interrupt(session: Session) -> None:
    nap = session.submit(time.sleep, 60)
    time.sleep(0.3)
    nap.interrupt()
    with pytest.raises(KeyboardInterrupt):
        nap.result(timeout=20)
    with pytest.raises(WorkerError, match="rank 1 of 3 failed: ZeroDivisionError"):
        session.execute("if rank == 1: 1/0\nwork = dist.all_reduce(torch.ones(1), async_op=True)")
    assert session.submit(mean_of_ranks).result(timeout=20) == [1.0, 1.0, 1.0]
    session.execute("work = None")


def test_word_that_is_lost_with_its_connection_is_told_again(session: Session, marks: Path) -> None:
    session.execute("from nbaccel.core.comm.sideline import Sideline\nline = Sideline()")
    session.execute("word = line.start_max(torch.zeros(1)) if rank == 0 else None")
    press_when_all_are_there(session, marks)
    with pytest.raises(KeyboardInterrupt, match="rank 0 waited in barrier"):
        session.execute("import time; there()\nif rank == 0: dist.barrier()\nelse: time.sleep(60)")
    assert session.run(word_has_come) == [False, None, None]
    session.execute("numbers = torch.tensor([rank])\nword = line.start_max(numbers)")
    assert session.run(word_has_come) == [True, True, True]
    assert session.pull("numbers") == [2, 2, 2]
    session.execute("del word, line, numbers")


def test_ranks_come_back_when_interrupted_twice_in_a_row(session: Session, marks: Path) -> None:
    before = session.run(pid)
    session.execute("kept = rank")
    press_when_all_are_there(session, marks, times=2)
    with pytest.raises(KeyboardInterrupt, match=r"rank 0 waited in barrier.*ranks 1-2 were at"):
        session.execute("import time; there()\nif rank == 0: dist.barrier()\nelse: time.sleep(60)")
    assert session.run(pid) == before
    assert session.pull("kept") == [0, 1, 2]


def test_deaf_rank_is_replaced_sooner_when_interrupted_again_after_a_second(session: Session) -> None:
    run = session.submit(deaf_on, 2)
    time.sleep(0.3)
    began = time.monotonic()
    for _ in range(2):
        run.interrupt()
        time.sleep(1.1)
    with pytest.raises(KeyboardInterrupt, match="rank 2 was replaced by a fresh process"):
        run.result(timeout=10)
    assert time.monotonic() - began < 2.0 + 1.0  # grace alone is 2 s after the ranks were freed


def deaf_on(bad: int) -> None:
    import __main__

    if __main__.rank == bad:
        eval(DEAF)


def test_replicas_that_differ_are_named_when_ranks_stopped_at_different_steps(
    session: Session, marks: Path
) -> None:
    session.execute(TRAINING)
    session.execute(
        "held = [torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2)) for _ in range(2)]\n"
        "if rank == 1: del held[1]"
    )
    press_when_all_are_there(session, marks)
    different = "replicas of model are not equal any more: rank 2 differs"
    with pytest.raises(KeyboardInterrupt, match=different) as caught:
        session.execute(
            "if rank == 2:\n    with torch.no_grad(): model.module.weight.add_(1)\nimport time; there(); time.sleep(60)"
        )
    assert "Linear" not in str(caught.value), "ranks have several of these, and not the same ones"
    session.execute("del model, held")


def test_deaf_rank_is_replaced_and_named_when_interrupted(session: Session, marks: Path) -> None:
    session.execute("kept = rank")
    press_when_all_are_there(session, marks)
    lost = "rank 0 was replaced by a fresh process: its variables are lost; ranks 1-2 keep theirs"
    with pytest.raises(KeyboardInterrupt, match=lost):
        session.execute(f"there()\nif rank == 0: {DEAF}\ndist.barrier()")
    assert session.pull("kept", ranks=[1, 2]) == [1, 2]
    assert session.run(mean_of_ranks) == [1.0, 1.0, 1.0]


# ── the session itself ────────────────────────────────────────────────────────────────────────────────


def test_two_sessions_are_independent_when_side_by_side(session: Session) -> None:
    session.push(owner="first")
    with Session(2, device="cpu") as other:
        other.push(owner="second")
        assert session.pull("owner") == ["first"] * 3
        assert other.pull("owner") == ["second"] * 2
        with pytest.raises(WorkerError):
            other.execute("1/0")
        assert session.run(mean_of_ranks) == [1.0, 1.0, 1.0]
    assert session.run(mean_of_ranks) == [1.0, 1.0, 1.0]


def test_nothing_of_ours_wakes_up_when_a_session_is_idle(session: Session) -> None:
    """Gloo's own thread looks at its sockets a hundred times a second; it is torch's, and not counted."""
    pids = session.run(pid)
    time.sleep(1.0)  # what the last call left to do
    before = [_switches(number) for number in pids], _switches(os.getpid(), "nbaccel-relay")
    time.sleep(2.0)
    after = [_switches(number) for number in pids], _switches(os.getpid(), "nbaccel-relay")
    assert after == before


def _switches(number: int, thread: str | None = None) -> dict[str, int]:
    """How often each thread of a process was woken, gloo's left out."""
    known = {one.native_id: one.name for one in threading.enumerate()} if thread else {}
    found = {}
    for task in Path(f"/proc/{number}/task").iterdir():
        name = (task / "comm").read_text().strip()
        if "gloo" in name or (thread is not None and known.get(int(task.name)) != thread):
            continue
        lines = (task / "status").read_text().splitlines()
        found[task.name] = sum(int(line.split()[1]) for line in lines if "_ctxt_switches" in line)
    return found


def test_function_is_called_again_on_the_same_ranks_when_one_was_lost(warm: None, capfd: Any) -> None:
    def flaky(trace: str) -> tuple[int, int]:
        import builtins
        import os
        import signal

        calls = builtins.__dict__.setdefault("calls", [])
        calls.append(1)
        with open(trace, "a") as file:
            file.write("x")
        if os.path.getsize(trace) <= 2 and int(os.environ["RANK"]) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid(), len(calls)

    with Session(2, device="cpu", max_restarts=2) as session:
        before = list(session.run(pid))
        with tempfile.NamedTemporaryFile() as file:
            values = session.run(flaky, file.name)
        assert values[0] == (before[0], 2)
        assert values[1][0] != before[1]
        assert values[1][1] == 1
        said = capfd.readouterr().err
        assert "restart 1 of 2, from its beginning (no resume)" in said
        assert "SIGKILL" in said
        with pytest.raises(WorkerError):  # a cell is run once
            session.execute("raise ValueError('a cell')")
