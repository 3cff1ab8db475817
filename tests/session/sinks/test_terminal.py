"""The live table in a terminal of its own."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPT = """
import os, sys, time
import readline  # without it Python's own input() writes its prompt to stderr
from nbaccel import notebook_launcher

def work():
    from tqdm import tqdm
    for step in tqdm(range(60), desc="train"):
        if step % 20 == 0:
            print("at", step, flush=True)
        time.sleep(0.03)

notebook_launcher(work, num_processes=2)
print("after work")

def step_by_step():
    for step in range(5):
        sys.stderr.write(f"\\rstep {step}")
        time.sleep(0.4)
    sys.stderr.write("\\n")

notebook_launcher(step_by_step, num_processes=1)
print("after steps", flush=True)

def ask():
    from tqdm import tqdm
    for step in tqdm(range(60), desc="train"):
        if step == 40:
            print("to the file", file=sys.stderr, flush=True)
            print("x" * 100_000, "its end", flush=True)
        time.sleep(0.03)
    if os.environ["RANK"] == "0":
        print("got", repr(input("overwrite [/tmp/x]? ")), flush=True)

os.dup2(os.open("err.log", os.O_WRONLY | os.O_CREAT), 2)
notebook_launcher(ask, num_processes=2)
"""
PROMPT = "[rank 0] overwrite [/tmp/x]? "


def run_in_terminal(folder: Path, code: str, answers: Mapping[str, str]) -> str:
    """What a terminal is sent by a script.

    Args:
        folder: where the script runs.
        answers: what is typed once these words have been shown.
    """
    script = folder / "script.py"
    script.write_text(code)
    main, terminal = pty.openpty()
    env = {
        **os.environ,
        "XDG_STATE_HOME": str(folder),
        "PYTHONPATH": ROOT,
        "TERM": "xterm",
        "COLUMNS": "100",
    }
    process = subprocess.Popen(
        [sys.executable, str(script)], stdin=terminal, stdout=terminal, stderr=terminal, env=env, cwd=folder
    )
    os.close(terminal)
    shown, end, open_ones = b"", time.monotonic() + 150, dict(answers)
    while time.monotonic() < end:
        if select.select([main], [], [], 1)[0]:
            try:
                shown += os.read(main, 1 << 16)
            except OSError:  # the terminal's last user has gone
                break
        for words in [words for words in open_ones if words.encode() in shown]:
            os.write(main, f"{open_ones.pop(words)}\n".encode())
    os.close(main)
    assert process.wait(timeout=30) == 0, shown
    return shown.decode()


@dataclass(frozen=True)
class Shown:
    """What the terminal was sent by each launch, and the file of the last one's stderr."""

    table: str
    bar: str
    question: str
    errors: str


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    folder = tmp_path_factory.mktemp("terminal")
    text = run_in_terminal(folder, SCRIPT, {PROMPT: "no"})
    table, _, rest = text.partition("after work\r\n")
    bar, _, question = rest.partition("after steps\r\n")
    return Shown(table, bar, question, (folder / "err.log").read_text())


def test_table_is_painted_below_the_lines_and_ends_as_text(shown: Shown) -> None:
    assert "work · 2 ranks on cpu · running" in shown.table
    assert "[ranks 0-1] at 40" in shown.table or "[rank 0] at 40" in shown.table
    ending = shown.table[shown.table.rfind("\x1b[") :]
    assert "work · 2 ranks on cpu · done" in ending
    assert "train 60/60" in ending
    assert ending.endswith("\r\n")


def test_bar_of_one_rank_is_painted_in_place(shown: Shown) -> None:
    assert "\r" in shown.bar.replace("\r\n", "\n")
    assert "step 1" in shown.bar
    assert "step 4" in shown.bar


def test_question_and_stderr_are_left_alone_by_the_table(shown: Shown) -> None:
    before, _, behind = shown.question.partition(PROMPT)
    assert "ask · 2 ranks on cpu · running" in before
    assert behind.startswith("no\r\n"), behind[:100]  # nothing is painted where the person types
    assert "[rank 0] got 'no'" in behind
    assert "its end" in before
    assert "to the file" not in shown.question
    assert "to the file" in shown.errors
