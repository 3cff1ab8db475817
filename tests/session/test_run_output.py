"""Everything a rank writes is seen, whole, before its result."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from nbaccel import launch, notebook_launcher

pytestmark = pytest.mark.usefixtures("clean")


def rank() -> int:
    return int(os.environ["RANK"])


def write_without_newline(size: int) -> None:
    sys.stdout.write("x" * size)
    sys.stdout.write("END")


def test_nothing_is_lost_when_a_rank_writes_10_mb_without_newline(capfd: pytest.CaptureFixture[str]) -> None:
    notebook_launcher(write_without_newline, (10_000_000,), num_processes=1)
    out = capfd.readouterr().out
    assert out.count("x") == 10_000_000
    assert "END" in out


def write_lines(count: int) -> None:
    for number in range(count):
        sys.stdout.write(f"rank {rank()} line {number} {'y' * 50}\n")


def test_lines_are_whole_and_ordered_when_ranks_write_much(capfd: pytest.CaptureFixture[str]) -> None:
    notebook_launcher(write_lines, (5_000,), num_processes=2, output="all")
    lines = capfd.readouterr().out.splitlines()
    for one in (0, 1):
        mine = [line for line in lines if line.startswith(f"[rank {one}] ")]
        assert mine == [f"[rank {one}] rank {one} line {n} {'y' * 50}" for n in range(5_000)]
    assert len(lines) == 10_000


def write_strange() -> None:
    os.write(1, b"bad \xff\xfe bytes\n")
    os.write(1, b"nul \x00 and bell\n")
    sys.stdout.write("surrogate \udc80 end\n")
    ctypes.CDLL(None).printf(b"from c %d\n", 5)
    subprocess.run(["sh", "-c", "echo from a child; echo its error >&2"], check=True)
    os.system("echo from system")


def test_all_streams_are_seen_when_bytes_are_strange(capfd: pytest.CaptureFixture[str]) -> None:
    notebook_launcher(write_strange, num_processes=1)
    captured = capfd.readouterr()
    for text in ("bad ", " bytes", "and bell", "surrogate", "from c 5", "from a child", "from system"):
        assert text in captured.out, text
    assert "its error" in captured.err


def speak_after_returning() -> int:
    def later() -> None:
        time.sleep(0.4)
        print("from a thread after the return")

    threading.Thread(target=later).start()
    print("from the call")
    return 5


def test_thread_is_heard_when_it_outlives_the_call(capfd: pytest.CaptureFixture[str]) -> None:
    assert notebook_launcher(speak_after_returning, num_processes=1) == [5]
    out = capfd.readouterr().out
    assert out.index("from the call") < out.index("from a thread after the return")


def print_word(word: str) -> str:
    print(word, end="")
    return word


@pytest.mark.parametrize(("method", "times"), [("fork", 3), ("spawn", 1)])
def test_output_is_seen_before_the_result(capfd: pytest.CaptureFixture[str], method: Any, times: int) -> None:
    for number in range(times):
        run = launch(print_word, f"word {number}", num_processes=1, start_method=method)
        run.result()
        assert f"word {number}" in capfd.readouterr().out


def close_streams() -> str:
    sys.stdout.close()
    os.close(2)
    return "closed"


def test_value_comes_back_when_function_closed_its_streams() -> None:
    assert notebook_launcher(close_streams, num_processes=1) == ["closed"]


def read_input() -> str:
    try:
        return input("name? ")
    except EOFError as error:
        return str(error)


def test_input_says_that_a_rank_has_no_keyboard() -> None:
    assert "rank 0" in notebook_launcher(read_input, num_processes=1)[0]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("all", {"[rank 0] hi", "[rank 1] hi"}),
        ("rank0", {"hi"}),
        ("none", set()),
        ("auto", {"[ranks 0-1] hi"}),
    ],
)
def test_output_mode_is_followed(capfd: pytest.CaptureFixture[str], mode: str, expected: set[str]) -> None:
    notebook_launcher(print, ("hi",), num_processes=2, output=mode)
    lines = set(capfd.readouterr().out.split("\n")) - {""}
    assert lines <= expected | {"[rank 0] hi", "[rank 1] hi"} if mode == "auto" else lines == expected


def print_without_end() -> None:
    while True:
        print("goes on")
        time.sleep(0.01)


def test_run_ends_when_whoever_reads_its_output_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    with open(read) as reader, open(write, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        run = launch(print_without_end, num_processes=2)
        assert "goes on" in reader.readline()
        reader.close()
        with pytest.raises(BrokenPipeError, match="the run was interrupted"):
            run.result(timeout=60)
        with open(os.devnull, "w") as nobody:  # what could not be written leaves with the stream
            os.dup2(nobody.fileno(), write)
    assert {rank.state for rank in run.state.ranks} == {"failed"}
    assert "has left" in run.state.problem
