"""Where the reporter looks at a rank's thread, and where it must not."""

from __future__ import annotations

import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Callable

import pytest

from nbaccel import launch
from nbaccel.rank import here
from nbaccel.rank.port import Port
from nbaccel.rank.reporter import _Place, _stacks, _usage
from nbaccel.rank.spec import Exit
from nbaccel.wire.channel import Channel, pair


def looked(place: _Place, wanted: Callable[[list[str]], bool]) -> list[str]:
    """What the thread is in, looked at until it is as wanted."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.2)
        place.look()
        names = [code.co_name for code in place.codes]
        if wanted(names):
            return names
    raise AssertionError(names)


@pytest.mark.parametrize("traces", [False, True])
def test_frames_of_a_thread_that_works_when_it_traces_graphs_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, traces: bool
) -> None:
    """A frame that is held keeps tensors alive, each of which is one more result of XLA's graph."""
    if traces:
        monkeypatch.setitem(sys.modules, "torch_xla", types.ModuleType("torch_xla"))
    else:
        monkeypatch.delitem(sys.modules, "torch_xla", raising=False)
    enough, stop = threading.Event(), threading.Event()

    def works() -> None:
        while not enough.is_set():
            sum(range(1000))
        stop.wait()

    thread = threading.Thread(target=works, daemon=True)
    thread.start()
    place = _Place(thread, {})
    try:
        if traces:
            looked(place, lambda names: not names)
        else:
            assert "works" in looked(place, lambda names: bool(names))
        enough.set()
        assert "works" in looked(place, lambda names: "wait" in names)
    finally:
        enough.set()
        stop.set()
        thread.join()


def test_thread_that_tells_of_progress_has_moved_though_it_stands_in_one_place() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, daemon=True)
    thread.start()
    moves: Counter[int] = Counter()
    place = _Place(thread, moves)
    try:
        looked(place, lambda names: "wait" in names)
        assert place.look() > 0
        moves[threading.get_ident()] += (
            1  # tqdm has a thread of its own, which paints a bar that does not move
        )
        assert place.look() > 0
        moves[thread.ident or 0] += 1
        assert place.look() == 0
    finally:
        stop.set()
        thread.join()


def test_thread_has_moved_when_it_was_given_the_same_call_again() -> None:
    ours, theirs = map(Channel, pair())
    port = Port(theirs)
    begun, go_on = threading.Event(), threading.Event()

    def serve() -> None:
        for _ in range(2):
            port.next_command()
            begun.set()
            go_on.wait()
            go_on.clear()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    place = _Place(thread, port.moves)
    try:
        ours.send(Exit())
        looked(place, lambda _: begun.is_set() and place.look() > 0)
        begun.clear()
        go_on.set()
        ours.send(Exit())
        assert begun.wait(30)
        time.sleep(1.5)  # so long that its few wake-ups tell nothing
        assert place.look() == 0
        assert set(place._seen.values()) == {place._looked}
    finally:
        go_on.set()
        thread.join()
        ours.close()
        theirs.close()


def used() -> float:
    return _usage(threading.main_thread())[0]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_processor_time_of_a_forked_rank_s_main_thread_is_known(clean: None) -> None:
    values = launch(used, num_processes=2, start_method="fork", folder=False).result()
    assert all(seconds > 0 for seconds in values)


def test_threads_of_another_rank_of_the_process_are_not_told_of() -> None:
    stop, there = threading.Event(), threading.Barrier(3)

    def rank(index: int) -> None:
        here.belong(index)
        there.wait()
        stop.wait()

    threads = [threading.Thread(target=rank, args=(index,), name=f"rank-{index}") for index in range(2)]
    for thread in threads:
        thread.start()
    there.wait()
    try:
        for index, thread in enumerate(threads):
            told = {one.name for one in _stacks(_Place(thread, {})).threads}
            assert told & {"rank-0", "rank-1"} == {f"rank-{index}"}
    finally:
        stop.set()
        for thread in threads:
            thread.join()
