"""Who is named, from recorded stacks and collectives; on real ranks in `test_stacks_on_ranks`."""

from __future__ import annotations

from typing import Any

from nbaccel.session.diagnosis import diagnose
from nbaccel.session.stacks import Condition, Process, RankView, StackReport, WorkerView
from nbaccel.wire.snapshot import Collective, Line, Peer, Records, Thread

TORCH = "/venv/lib/python3.11/site-packages/torch"
USER = "/home/ada/train.py"
C10D = f"{TORCH}/distributed/distributed_c10d.py"
BACKWARD = Line(f"{TORCH}/autograd/graph.py", 979, "_engine_run_backward")
SLEEPS, RUNS = Process(state="S", cpu=0.4), Process(state="R", cpu=97.0)


def at(line: int, function: str = "train", seconds: float | None = None) -> Line:
    return Line(USER, line, function, seconds)


def in_op(op: str, line: int) -> tuple[Line, ...]:
    return Line(C10D, 3252, op), at(line)


def records(
    *ops: str, pending: bool = False, size: int = 4, dtype: str = "Float", seconds: float = 41, ranks: int = 4
) -> Records:
    """These collectives in the default group, one after another; the last one pending or not."""
    found = tuple(
        Collective("0", n, op, ((size,),), (dtype,), pending and n == len(ops), seconds)
        for n, op in enumerate(ops, 1)
    )
    return Records(found, members=(("0", tuple(range(ranks))),))


def view(rank: int, *frames: Line, **more: Any) -> RankView:
    condition: Condition = more.pop("condition", "answers")
    more.setdefault("process", SLEEPS)
    return RankView(
        rank=rank,
        pid=100 + rank,
        condition=condition,
        threads=(Thread("MainThread", 1, frames, True),),
        **more,
    )


def waiting(rank: int, op: str = "all_reduce", *, before: int = 10, line: int = 88, **more: Any) -> RankView:
    return view(rank, *in_op(op, line), records=records(*["all_reduce"] * before, op, pending=True, **more))


def text(*views: RankView) -> str:
    return "\n".join(one.text for one in diagnose(views))


def test_the_absent_rank_is_named_when_the_others_wait() -> None:
    absent = view(2, at(31, "__getitem__", 41.2), at(60), records=records(*["all_reduce"] * 10))
    (found,) = diagnose([waiting(0), waiting(1), absent, waiting(3)])
    assert found.text == (
        "rank 2 has not called all_reduce #11; it is in __getitem__ train.py:31 for 41 s; "
        "ranks 0-1,3 wait 41 s, called from train.py:88"
    )
    assert (found.culprits, found.waiting, found.seconds) == ((2,), (0, 1, 3), 41)


def test_the_backward_is_named_when_ddp_waits_in_it() -> None:
    first = view(0, BACKWARD, at(70), records=records("all_reduce", pending=True, ranks=2))
    absent = view(1, at(23, "spin"), records=records(ranks=2), process=RUNS)
    assert text(first, absent) == (
        "rank 1 has not called all_reduce #1 (DDP backward); it runs in spin train.py:23 (computes, cpu 97 %); "
        "rank 0 waits 41 s, called from train.py:70"
    )


def test_uneven_batches_are_named_when_the_absent_rank_has_returned() -> None:
    first = view(0, BACKWARD, at(70), records=records("all_reduce", pending=True, ranks=2))
    returned = view(1, records=records(ranks=2), ended="its function returned")
    assert "its function returned (it had fewer backward passes than the others: uneven batches?)" in text(
        first, returned
    )


def test_a_cells_name_is_used_when_the_front_end_has_one() -> None:
    absent = view(1, at(31, "__getitem__", 5), records=records(ranks=2))
    views = [waiting(0, before=0, ranks=2), absent]
    found = diagnose(views, lambda name: "Cell In[7]" if name == USER else None)
    assert "it is in __getitem__ Cell In[7] line 31 for 5 s" in found[0].text


def test_different_collectives_are_a_mismatch_before_anybody_is_absent() -> None:
    odd = view(2, *in_op("barrier", 99), records=records(*["all_reduce"] * 10, "barrier", pending=True))
    (found,) = diagnose([waiting(0), waiting(1), odd, waiting(3)])
    assert found.kind == "mismatch"
    assert found.culprits == (2,)
    assert found.text.startswith(
        "mismatch at #11, different collectives: ranks 0-1,3 called all_reduce #11 [4]"
    )
    assert "rank 2 called barrier #11 [4] Float, called from train.py:99" in found.text


def test_a_skipped_backward_is_asked_about_when_one_side_is_in_it() -> None:
    first = view(0, BACKWARD, at(70), records=records("all_reduce", pending=True, ranks=2))
    other = view(1, *in_op("barrier", 99), records=records("barrier", pending=True, ranks=2))
    assert "a rank skipped a backward pass" in text(first, other)


def test_other_shapes_are_a_mismatch_when_the_collective_is_the_same() -> None:
    found = diagnose([waiting(0, ranks=2), waiting(1, size=7, ranks=2)])
    assert [one.kind for one in found] == ["mismatch"]
    assert "[4] Float" in found[0].text
    assert "[7] Float" in found[0].text


def test_other_types_are_a_mismatch_when_the_shapes_are_the_same() -> None:
    found = diagnose([waiting(0, ranks=2), waiting(1, dtype="Double", ranks=2)])
    assert "[4] Double" in found[0].text


def test_finished_collectives_of_other_shapes_are_none() -> None:
    done = records("all_gather", "all_reduce", size=9, ranks=2)
    absent = view(1, at(5), records=done)
    now = waiting(0, before=2, ranks=2)
    assert [one.kind for one in diagnose([now, absent])][:1] != ["slow"]
    assert "mismatch at #2" not in text(now, absent)


def test_a_stuck_loader_worker_is_named_with_its_line() -> None:
    wait = Line("/usr/lib/python3.11/selectors.py", 415, "select")
    fetch = Line(f"{TORCH}/utils/data/dataloader.py", 700, "_MultiProcessingDataLoaderIter._next_data", 40)
    stuck = WorkerView(
        pid=555, name="w", process=SLEEPS, threads=(Thread("m", 0, (at(51, "__getitem__"),), True),)
    )
    idle_frames = (wait, Line("/usr/lib/python3.11/multiprocessing/connection.py", 440, "_poll"), at(14))
    idle = WorkerView(pid=556, name="w", process=SLEEPS, threads=(Thread("m", 0, idle_frames, True),))
    loading = view(1, wait, fetch, at(14), records=records(ranks=2), workers=(idle, stuck))
    assert (
        "rank 1 has not called all_reduce #1; it waits for its DataLoader: worker pid 555 is in "
        "__getitem__ train.py:51; rank 0 waits" in text(waiting(0, before=0, ranks=2), loading)
    )
    alone = diagnose([loading])
    assert [(one.kind, one.seconds) for one in alone] == [("loader", 40)]


def test_a_spawned_loader_worker_is_not_said_to_have_nothing_to_do() -> None:
    fetch = Line(f"{TORCH}/utils/data/dataloader.py", 700, "_MultiProcessingDataLoaderIter._next_data", 40)
    spawned = WorkerView(pid=555, name="w", process=RUNS)
    assert text(view(0, fetch, at(14), workers=(spawned,))) == (
        "rank 0: it waits for its DataLoader: worker pid 555 does not say where it is, as spawned ones never do"
    )


def test_a_stopped_rank_and_a_silent_one_are_told_apart() -> None:
    stopped = view(1, condition="stopped", seconds=9.0)
    silent = view(2, at(78, "match"), condition="silent", seconds=9.0, process=RUNS)
    said = text(waiting(0, before=0, ranks=3), stopped, silent)
    assert "rank 1 is the one left for all_reduce #1; it is stopped (SIGSTOP)" in said
    assert "rank 2 is the one left for" in said
    assert "in C code that holds the interpreter's lock (computes, cpu 97 %)" in said


def test_nobody_is_called_silent_when_only_a_moment_has_passed() -> None:
    assert diagnose([view(0, at(1), condition="silent", seconds=0.3, process=RUNS)]) == ()


def test_a_wait_for_one_peer_names_both() -> None:
    first = view(0, *in_op("recv", 63), peer=Peer("recv", 1, 7), seconds=12.0)
    assert text(first, view(1, at(75, "train", 11.0))).startswith(
        "rank 0 waits in recv(src=1, tag=7) for 12 s, called from train.py:63; rank 1: it is in train train.py:75"
    )


def test_groups_in_opposite_order_name_both_sides() -> None:
    def in_group(rank: int, group: str) -> RankView:
        pending = Collective(group, 1, "all_reduce", ((1,),), ("Float",), True, 8)
        return view(
            rank, *in_op("all_reduce", 9), records=Records((pending,), (("1", (0, 1)), ("2", (0, 1))))
        )

    found = diagnose([in_group(0, "1"), in_group(1, "2")])
    assert {one.culprits for one in found} == {(0,), (1,)}
    assert "it waits in all_reduce, called from train.py:9" in found[0].text


def test_missing_init_process_group_is_named() -> None:
    init = Line(C10D, 1899, "init_process_group")
    assert text(view(0, init, at(3), seconds=6.0), view(1, at(8, "load", 6.0))) == (
        "rank 1 has not called init_process_group; it is in load train.py:8 for 6 s; rank 0 waits 6 s, "
        "called from train.py:3"
    )


def test_torchs_count_serves_when_there_is_no_flight_recorder() -> None:
    def counted(rank: int, count: int, *frames: Line) -> RankView:
        return view(rank, *frames, records=Records((), (("0", (0, 1)),), (("0", count),)), seconds=7.0)

    assert text(counted(0, 5, *in_op("broadcast", 12)), counted(1, 4, at(20, "load", 7.0))) == (
        "rank 1 has not called broadcast #5; it is in load train.py:20 for 7 s; rank 0 waits 7 s, "
        "called from train.py:12"
    )


def test_ranks_of_other_hosts_are_not_blamed_unseen() -> None:
    here = [waiting(2, before=0), waiting(3, before=0)]
    assert text(*here) == (
        "ranks 2-3 are all in all_reduce #1 for 41 s: the ranks of other hosts, which are not seen from here, "
        "have not come or not finished"
    )


def test_a_rank_that_starts_is_not_taken_for_dead() -> None:
    shown = repr(StackReport(views=(RankView(rank=0, pid=None, condition="starting"),)))
    assert shown == "no rank waits for another\nrank 0: starting"


def test_nothing_is_found_when_ranks_compute() -> None:
    busy = [view(rank, at(5), records=records("all_reduce", ranks=2), process=RUNS) for rank in (0, 1)]
    assert diagnose(busy) == ()
    assert repr(StackReport(views=tuple(busy))).startswith(
        "no rank waits for another\nranks 0-1: runs, cpu 97 %"
    )


def test_equal_stacks_are_shown_once() -> None:
    shown = repr(StackReport(views=(waiting(0), waiting(1), view(2, at(31, "load", 40)), waiting(3))))
    assert shown.count("train.py:88 in train") == 1
    assert "ranks 0-1,3: " in shown
    assert "train.py:31 in load for 40 s" in shown
