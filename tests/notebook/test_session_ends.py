"""The end of a session, whatever brings it about: nothing of it stays."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import psutil
import pytest

from nbaccel import Session
from nbaccel.errors import ConfigError, LaunchError, WorkerError
from nbaccel.session.call import CallInFlight, Delivery
from nbaccel.session.ending import Limits
from nbaccel.wire import payload

pytestmark = pytest.mark.usefixtures("clean")


def pid() -> int:
    return os.getpid()


def wait_for(condition: Callable[[], bool], timeout: float = 20.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_nothing_is_left_when_a_session_is_closed() -> None:
    session = Session(2, device="cpu")
    session.execute("import subprocess; child = subprocess.Popen(['sleep', '600'])")
    child = psutil.Process(session.pull("child.pid", ranks=[1])[0])
    session.close()
    session.close()
    assert session.closed
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    with pytest.raises(ConfigError, match="has ended"):
        session.stacks()
    with pytest.raises(LaunchError, match="has ended"):
        session.run(pid)


def test_session_has_ended_when_its_end_was_interrupted() -> None:
    session = Session(2, device="cpu")
    press = f"os.kill({os.getpid()}, signal.SIGINT)"
    session.execute(f"import atexit, os, signal; atexit.register(lambda: {press})", ranks=[1])
    with pytest.raises(KeyboardInterrupt, match="was ending, and has ended") as caught:
        session.close()
    assert caught.value._render_traceback_() == ["KeyboardInterrupt: the session was ending, and has ended"]  # type: ignore[attr-defined]
    session.close()
    assert session.closed


def test_ranks_are_fresh_when_a_session_is_restarted() -> None:
    with Session(2, device="cpu") as session:
        before = session.run(pid)
        session.push(x=1)
        session.restart()
        assert set(session.run(pid)).isdisjoint(before)
        with pytest.raises(WorkerError, match="not defined"):
            session.pull("x")


def test_session_ends_by_itself_when_idle_for_long() -> None:
    session = Session(2, device="cpu", idle_stop=2.0)
    session.run(time.sleep, 2.3)  # a long call is not idle
    assert not session.closed
    wait_for(lambda: session.closed, timeout=30)
    session.close()


def test_open_runs_are_ended_when_the_session_closes() -> None:
    session = Session(2, device="cpu")
    run, waiting = session.submit(time.sleep, 60), session.submit(pid)
    time.sleep(0.2)
    session.close()
    with pytest.raises(KeyboardInterrupt):
        run.result(timeout=10)
    with pytest.raises(LaunchError, match="has ended"):
        waiting.result(timeout=10)


def test_session_says_so_when_its_processes_are_killed() -> None:
    session = Session(2, device="cpu")
    run = session.submit(time.sleep, 60)
    parent = psutil.Process(session.state.ranks[0].pid).parent()
    assert parent is not None
    parent.kill()
    with pytest.raises(LaunchError, match="the process that makes the ranks ended"):
        run.result(timeout=20)
    wait_for(lambda: session.closed)
    with pytest.raises(LaunchError, match="has ended"):
        session.run(pid)
    session.restart()
    assert len(set(session.run(pid))) == 2
    session.close()


def test_everyone_who_waits_is_told_when_the_relay_itself_fails() -> None:
    session = Session(2, device="cpu")
    running = session.submit(time.sleep, 60)
    parcel, fd = payload.pack((int, (), {}), outward=True)
    delivery = Delivery(parcel=parcel, fd=fd, returns="all")
    broken = CallInFlight(delivery, [], num_ranks=2, ranks=[7], limits=Limits(), say=print, keep=True)
    session.relay.submit(broken)  # no check was made: there is no such rank
    waiting = session.submit(pid)
    running.kill()
    for future in (broken.future, waiting):
        assert isinstance(future.exception(timeout=20), (IndexError, LaunchError))
    wait_for(lambda: session.closed)
    session.restart()
    assert len(session.run(pid)) == 2
    session.close()
