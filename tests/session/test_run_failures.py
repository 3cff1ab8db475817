"""One rank fails: who, where, why, what became of the others, and how soon."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from nbaccel import notebook_launcher
from nbaccel.errors import LaunchError, PayloadError, WorkerError

pytestmark = pytest.mark.usefixtures("clean")

# An error, and what opens the call, are not in the same process in both; an end is seen from the same one.
METHODS = pytest.mark.parametrize("method", ["fork", "spawn"])


def rank() -> int:
    return int(os.environ["RANK"])


def meet(folder: str, *ranks: int) -> None:
    """Say that this rank is there, and wait until these are."""
    Path(folder, str(rank())).touch()
    while not all(Path(folder, str(other)).exists() for other in ranks):
        time.sleep(0.01)


class Broken(Exception):
    """An exception with a state of its own."""

    def __init__(self, code: int) -> None:
        super().__init__(f"broken with code {code}")
        self.code = code


def failure(*args: Any, **kwargs: Any) -> WorkerError:
    with pytest.raises(WorkerError) as caught:
        notebook_launcher(*args, **kwargs)
    return caught.value


def raise_on_one(folder: str) -> None:
    meet(folder, 0, 1)
    if rank() == 1:
        raise Broken(7)
    time.sleep(60)


@METHODS
def test_worker_error_names_rank_line_and_cause_when_one_raises(method: Any, tmp_path: Path) -> None:
    error = failure(raise_on_one, (str(tmp_path),), num_processes=2, start_method=method)
    text = str(error)
    assert error.ranks == (1,)
    assert "rank 1 of 2 failed" in text
    assert "broken with code 7" in text
    assert "raise Broken(7)" in text
    assert "in raise_on_one" in text
    assert "test_run_failures.py" in text
    assert "rank 0 did not end in the 1 s given: ended by SIGTERM" in text
    assert "nbaccel/rank/" not in text
    assert type(error.__cause__) is Broken
    assert str(error.__cause__) == "broken with code 7"
    assert error.__cause__.code == 7


def raise_in_lines() -> None:
    raise ValueError("first line\nsecond line")


def raise_group() -> None:
    raise ExceptionGroup(  # noqa: F821  # of Python 3.11
        "two failed", [ValueError("of one"), KeyError("of the other")]
    )


def test_headline_has_type_and_first_line_when_message_has_several() -> None:
    error = failure(raise_in_lines, num_processes=2)
    assert "ranks 0-1 of 2 failed: ValueError: first line … (at test_run_failures.py:" in str(error)
    assert "\nsecond line\n" in str(error)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups come with Python 3.11")
def test_what_is_in_a_group_is_told() -> None:
    text = str(failure(raise_group, num_processes=1))
    assert "failed: ExceptionGroup: two failed (2 sub-exceptions): ValueError: of one" in text
    assert "in it, 2 of 2:\n  KeyError: 'of the other'" in text


def decode() -> None:
    b"\xff".decode()


def leave_with_3() -> None:
    raise SystemExit(3)


def test_cause_has_the_state_of_its_built_in_class() -> None:
    cause = failure(decode, num_processes=1).__cause__
    assert isinstance(cause, UnicodeDecodeError)
    assert (cause.end, str(cause)) == (
        1,
        "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
    )
    ended = failure(leave_with_3, num_processes=1).__cause__
    assert isinstance(ended, SystemExit)
    assert ended.code == 3


def fork_and_come_out(path: str) -> int:
    child = os.fork()
    if child == 0:
        Path(path).write_text(str(os.getpid()))
        return 7
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fork_and_raise() -> int:
    child = os.fork()
    if child == 0:
        raise ValueError("of the child")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_child_of_a_rank_is_no_second_rank(tmp_path: Path) -> None:
    assert notebook_launcher(fork_and_come_out, (str(tmp_path / "child"),), num_processes=1) == [0]
    assert (tmp_path / "child").exists()
    assert notebook_launcher(fork_and_raise, num_processes=1) == [1]


def raise_everywhere_but_0() -> None:
    if rank():
        raise ValueError("bad batch")
    time.sleep(60)


def test_ranks_are_grouped_when_they_fail_alike() -> None:
    error = failure(raise_everywhere_but_0, num_processes=4, grace=0.5)
    assert set(error.ranks) == {1, 2, 3}
    assert "ranks 1-3 of 4 failed: ValueError: bad batch" in str(error)
    assert str(error).count("Traceback") == 1


def end_all_differently(folder: str) -> None:
    meet(folder, *range(4))
    if rank() == 0:
        raise KeyError("first")
    if rank() == 1:
        return
    if rank() == 2:
        time.sleep(0.4)
        raise OSError("second")  # within the grace
    time.sleep(60)


def test_fates_of_others_are_told_when_one_raises(tmp_path: Path) -> None:
    text = str(failure(end_all_differently, (str(tmp_path),), num_processes=4, grace=3))
    assert "rank 0 of 4 failed: KeyError: 'first'" in text
    assert "rank 2 raised after it: OSError: second" in text
    assert "rank 3 did not end in the 3 s given: ended by SIGTERM" in text
    assert "rank 1 had returned" in text


def chained() -> None:
    try:
        {}["missing"]  # type: ignore[index]
    except KeyError as error:
        raise RuntimeError("outer") from error


def test_chain_is_shown_when_exception_has_a_cause() -> None:
    error = failure(chained, num_processes=1)
    text = str(error)
    assert text.index("KeyError: 'missing'") < text.index("direct cause") < text.index("RuntimeError: outer")


class Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__("has a lock")
        self.lock = threading.Lock()


def raise_unpicklable() -> None:
    raise Unpicklable


class NeedsTwo(Exception):
    """Pickles, and cannot be made again from its `args`."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def raise_needs_two() -> None:
    raise NeedsTwo("this", "that")


def test_failure_is_told_in_words_when_exception_cannot_travel() -> None:
    error = failure(raise_unpicklable, num_processes=1)
    assert "has a lock" in str(error)
    assert error.__cause__ is None


def test_cause_is_whole_when_its_class_takes_other_arguments_than_it_keeps() -> None:
    error = failure(raise_needs_two, num_processes=1)
    assert type(error.__cause__) is NeedsTwo
    assert str(error.__cause__) == "this and that"


class BrokenText(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


def raise_broken_text() -> None:
    raise BrokenText


def test_failure_is_told_when_exception_has_no_text() -> None:
    assert "BrokenText" in str(failure(raise_broken_text, num_processes=1))


def recurse(n: int = 0) -> int:
    return recurse(n + 1) + 1


def test_traceback_is_shortened_when_function_recurses() -> None:
    text = str(failure(recurse, num_processes=1))
    assert "RecursionError" in text
    assert "frames …" in text
    assert len(text.splitlines()) < 200


def die_by(number: int) -> None:
    if rank() == 1:
        print("last words before the end", end="", flush=False)
        os.kill(os.getpid(), number)
    time.sleep(60)


def test_signal_is_named_when_rank_is_killed() -> None:
    error = failure(die_by, (signal.SIGKILL,), num_processes=2, grace=0.2)
    assert error.ranks == (1,)
    assert error.exitcodes[1] == -signal.SIGKILL
    assert "rank 1 of 2 was ended by SIGKILL" in str(error)
    assert "out of memory" in str(error)
    assert "last words before the end" in str(error)


def segfault() -> None:
    print("about to crash")
    ctypes.string_at(0)


def test_crash_is_named_when_compiled_code_segfaults() -> None:
    error = failure(segfault, num_processes=1)
    assert error.exitcodes == {0: -signal.SIGSEGV}
    assert "SIGSEGV" in str(error)
    assert "about to crash" in str(error)


def abort() -> None:
    os.abort()


def test_crash_is_named_when_compiled_code_aborts() -> None:
    assert "SIGABRT" in str(failure(abort, num_processes=1))


def leave(code: int) -> None:
    if rank() == 1:
        print("leaving")
        os._exit(code)
    time.sleep(60)


@pytest.mark.parametrize("code", [0, 3])
def test_exit_code_is_told_when_rank_leaves_by_os_exit(code: int) -> None:
    error = failure(leave, (code,), num_processes=2, grace=0.2)
    assert error.ranks == (1,)
    assert error.exitcodes[1] == code
    assert f"exit code {code}" in str(error)
    assert "leaving" in str(error)


def sys_exit(code: Any) -> str:
    sys.exit(code)


@pytest.mark.parametrize("code", [None, 0])
def test_value_is_none_when_function_exits_well(code: Any) -> None:
    assert notebook_launcher(sys_exit, (code,), num_processes=2) == [None, None]


@pytest.mark.parametrize("code", [3, "no data"])
def test_run_fails_when_function_exits_with_a_code(code: Any) -> None:
    error = failure(sys_exit, (code,), num_processes=2)
    assert error.ranks in ((0, 1), (1, 0))
    assert f"SystemExit: {code}" in str(error)
    assert isinstance(error.__cause__, SystemExit)


def eat_memory() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    held = [bytearray(1 << 30) for _ in range(8)]
    print(len(held))


def test_memory_error_is_told_when_address_space_is_limited() -> None:
    assert "MemoryError" in str(failure(eat_memory, num_processes=1))


def words_from(stream: str) -> None:
    if stream == "python":
        sys.stdout.write("words of python")
    elif stream == "c":
        ctypes.CDLL(None).printf(b"words of c")
        ctypes.CDLL(None).fflush(None)
    elif stream == "fd":
        os.write(2, b"words of fd")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("stream", ["python", "c", "fd"])
def test_last_words_are_kept_when_rank_dies(stream: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = failure(words_from, (stream,), num_processes=1)
    captured = capsys.readouterr()
    assert f"words of {stream}" in captured.out + captured.err
    assert f"words of {stream}" in str(error)


def register_exit(path: str) -> None:
    atexit.register(Path(path, str(rank())).write_text, "ran")
    if rank() == 1:
        threading.Thread(target=lambda: (time.sleep(0.3), Path(path, "thread").touch())).start()


def register_and_raise(path: str) -> None:
    register_exit(path)
    raise ValueError


def test_exit_handlers_run_when_function_returns(tmp_path: Path) -> None:
    notebook_launcher(register_exit, (str(tmp_path),), num_processes=2)
    assert sorted(os.listdir(tmp_path)) == ["0", "1", "thread"]


def test_exit_handlers_run_when_function_raises(tmp_path: Path) -> None:
    failure(register_and_raise, (str(tmp_path),), num_processes=1)
    assert os.listdir(tmp_path) == ["0"]


class FailsToOpen:
    """Pickles well and raises where it is opened."""

    def __reduce__(self) -> Any:
        return _fail_to_open, ()


def _fail_to_open() -> None:
    raise OSError("the data set is not mounted here")


@METHODS
def test_launch_fails_with_traceback_when_argument_cannot_be_opened(method: Any) -> None:
    with pytest.raises((LaunchError, WorkerError)) as caught:
        notebook_launcher(print, (FailsToOpen(),), num_processes=1, start_method=method)
    assert "the data set is not mounted here" in str(caught.value)
    assert "_fail_to_open" in str(caught.value)


class DiesToOpen:
    def __reduce__(self) -> Any:
        return os._exit, (5,)


def test_launch_fails_when_opening_an_argument_ends_the_process() -> None:
    with pytest.raises((LaunchError, WorkerError)):
        notebook_launcher(print, (DiesToOpen(),), num_processes=2)
    assert notebook_launcher(rank, num_processes=2) == [0, 1]


def give_lock() -> Any:
    return threading.Lock()


def test_run_fails_by_name_when_value_cannot_travel() -> None:
    error = failure(give_lock, num_processes=1)
    assert "lock" in str(error)


class FailsAtHome:
    def __reduce__(self) -> Any:
        return _fail_at_home, (os.getpid(),)


def _fail_at_home(pid: int) -> None:
    if os.getpid() != pid:
        raise OSError("not in this process")


def give_failing() -> Any:
    return FailsAtHome()


def test_caller_is_told_when_a_value_cannot_be_opened_here() -> None:
    match = "rank 0's value has come and cannot be opened here: OSError: not in this process"
    with pytest.raises(PayloadError, match=match) as caught:
        notebook_launcher(give_failing, num_processes=1)
    assert isinstance(caught.value.__cause__, OSError)


def fail_after_returning() -> None:
    atexit.register(os._exit, 9)


def test_values_come_back_with_a_word_when_a_rank_dies_after_it_returned(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert notebook_launcher(fail_after_returning, num_processes=2) == [None, None]
    said = capsys.readouterr().err
    assert "had returned, then ended without a result, exit code 9" in said


def ignore_sigterm(folder: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    meet(folder, 0)
    if rank() == 1:
        raise ValueError("first")
    while True:
        time.sleep(1)


def test_rank_is_killed_when_it_ignores_sigterm(tmp_path: Path) -> None:
    error = failure(ignore_sigterm, (str(tmp_path),), num_processes=2, grace=0.2)
    assert "rank 0 did not end in the 0.2 s given: ended by SIGKILL" in str(error)


def stop_self(folder: str) -> None:
    meet(folder)
    if rank() == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    meet(folder, 0)
    time.sleep(0.2)
    raise ValueError("while the other is stopped")


def test_stopped_rank_is_killed_when_another_fails(tmp_path: Path) -> None:
    error = failure(stop_self, (str(tmp_path),), num_processes=2, grace=0.2)
    assert error.ranks == (1,)
    assert "rank 0 did not end" in str(error)


def train_with_a_dead_peer() -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(10))


def test_dead_rank_is_the_cause_when_peers_see_a_broken_connection() -> None:
    error = failure(train_with_a_dead_peer, num_processes=3)
    assert error.ranks == (1,)
    assert "rank 1 of 3 was ended by SIGKILL" in str(error)
    assert "ranks 0,2 waited in all_reduce, called from test_run_failures.py:" in str(error)


def test_next_launch_works_when_the_one_before_failed(tmp_path: Path) -> None:
    for _ in range(2):
        failure(raise_on_one, (str(tmp_path),), num_processes=2, grace=0.05)
        assert notebook_launcher(rank, num_processes=2) == [0, 1]
