"""Where the reporter looks at a rank's thread, and where it must not."""

from __future__ import annotations

import sys
import threading
import time
import types
from collections.abc import Callable

import pytest

from nbaccel.rank.reporter import _Place


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
    place = _Place(thread)
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
