"""The live table in a terminal of its own."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from tests.conftest import ROOT

SCRIPT = """
import time
from nbaccel import notebook_launcher

def work():
    from tqdm import tqdm
    for step in tqdm(range(60), desc="train"):
        if step % 20 == 0:
            print("at", step, flush=True)
        time.sleep(0.03)

notebook_launcher(work, num_processes=2)
print("after")
"""


ASKING = """
import os, sys, time
import readline  # without it Python's own input() writes its prompt to stderr
from nbaccel import notebook_launcher

def work():
    from tqdm import tqdm
    for step in tqdm(range(60), desc="train"):
        if step == 40:
            print("to the file", file=sys.stderr, flush=True)
            print("x" * 100_000, "its end", flush=True)
        time.sleep(0.03)
    if os.environ["RANK"] == "0":
        print("got", repr(input("overwrite [/tmp/x]? ")), flush=True)

notebook_launcher(work, num_processes=2)
"""


def run_in_terminal(
    folder: Path, code: str, *, answers: Mapping[str, str] | None = None, stderr: IO[str] | None = None
) -> str:
    """What a terminal is sent by a script.

    Args:
        answers: what is typed once these words have been shown.
        stderr: where it goes instead of the terminal.
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
        [sys.executable, str(script)], stdin=terminal, stdout=terminal, stderr=stderr or terminal, env=env
    )
    os.close(terminal)
    shown, end, open_ones = b"", time.monotonic() + 100, dict(answers or {})
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


def test_table_is_painted_below_the_lines_and_ends_as_text(tmp_path: Path) -> None:
    text = run_in_terminal(tmp_path, SCRIPT)
    assert "work · 2 ranks on cpu · running" in text
    assert "[ranks 0-1] at 40" in text or "[rank 0] at 40" in text
    ending = text[text.rfind("\x1b[") :].replace("\r", "")
    assert "work · 2 ranks on cpu · done" in ending
    assert "train 60/60" in ending
    assert ending.endswith("after\n")


def test_question_and_stderr_are_left_alone_by_the_table(tmp_path: Path) -> None:
    prompt = "[rank 0] overwrite [/tmp/x]? "
    with (tmp_path / "err.log").open("w") as stderr:
        text = run_in_terminal(tmp_path, ASKING, answers={prompt: "no"}, stderr=stderr)
    before, _, behind = text.partition(prompt)
    assert "work · 2 ranks on cpu · running" in before
    assert behind.startswith("no\r\n"), behind[:100]  # nothing is painted where the person types
    assert "[rank 0] got 'no'" in behind
    assert "its end" in before
    assert "to the file" not in text
    assert "to the file" in (tmp_path / "err.log").read_text()
