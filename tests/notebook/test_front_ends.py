"""The same launch from every place people start one: a script, IPython in a terminal, notebooks run headless."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

LAUNCH = """
import os
from nbaccel import notebook_launcher

class Point:
    def __init__(self, x):
        self.x = x

def work(scale):
    rank = int(os.environ["RANK"])
    print(f"hello from {rank}", flush=True)
    return Point(scale * rank)

points = notebook_launcher(work, (10,), num_processes=2)
assert all(type(point) is Point for point in points)
print("values", [point.x for point in points])
"""
FAILING = """
def fail():
    raise ValueError("of all things")

notebook_launcher(fail, num_processes=2)
"""


def environment(home: Path) -> dict[str, str]:
    """A user's environment with a fresh home folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return {
        **kept,
        "HOME": str(home),
        "IPYTHONDIR": str(home / ".ipython"),
        "XDG_STATE_HOME": str(home / "state"),
    }


def run(command: list[str], home: Path, *, ok: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=150, cwd=home, env=environment(home), check=False
    )
    assert (done.returncode == 0) is ok, done.stdout + done.stderr
    return done


def notebook(path: Path, *cells: str) -> Path:
    """A notebook with these cells."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata={"kernelspec": kernel}
    )
    nbformat.write(book, path)
    return path


def texts(path: Path) -> list[str]:
    """The stream text and the tracebacks of each cell."""
    found = []
    for cell in nbformat.read(path, as_version=4).cells:
        parts = [
            output.get("text", "\n".join(output.get("traceback", []))) for output in cell.get("outputs", [])
        ]
        found.append("".join(parts))
    return found


def test_script_labels_every_line_and_prints_the_remote_traceback(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(LAUNCH + FAILING)
    done = run([sys.executable, str(script)], tmp_path, ok=False)
    lines = done.stdout.splitlines()
    assert sorted(lines[:2]) == ["[rank 0] hello from 0", "[rank 1] hello from 1"]
    assert lines[2] == "values [0, 10]"
    assert f'File "{script}", line' in done.stderr
    assert "ranks 0-1 of 2 failed: ValueError: of all things" in done.stderr


def test_ipython_in_a_terminal_labels_lines(tmp_path: Path) -> None:
    done = run([sys.executable, "-m", "IPython", "--colors=NoColor", "-c", LAUNCH], tmp_path)
    assert "[rank 0] hello from 0" in done.stdout
    assert "[rank 1] hello from 1" in done.stdout
    assert "values [0, 10]" in done.stdout


def test_bar_is_painted_in_place_when_output_is_a_terminal(tmp_path: Path) -> None:
    script = tmp_path / "bar.py"
    script.write_text(
        "import sys, time\nfrom nbaccel import notebook_launcher\n"
        "def work():\n"
        "    for step in range(5):\n"
        "        sys.stderr.write(f'\\rstep {step}')\n        time.sleep(0.4)\n"
        "    sys.stderr.write('\\n')\n"
        "notebook_launcher(work, num_processes=1)\n"
    )
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=environment(tmp_path),
    )
    os.close(terminal)
    shown, end = b"", time.monotonic() + 120
    while time.monotonic() < end:
        if select.select([main], [], [], 1)[0]:
            try:
                shown += os.read(main, 4096)
            except OSError:  # the terminal's last user has gone
                break
    os.close(main)
    assert process.wait(timeout=30) == 0, shown
    assert b"\r" in shown.replace(b"\r\n", b"\n")
    assert b"step 1" in shown
    assert b"step 4" in shown


@pytest.mark.kernel
def test_notebook_runs_under_nbclient_with_folded_output(tmp_path: Path) -> None:
    path = notebook(tmp_path / "book.ipynb", LAUNCH, "print('next')")
    run([sys.executable, "-m", "jupyter", "execute", "--inplace", str(path)], tmp_path)
    first, second = texts(path)
    assert sorted(first.splitlines()) == ["[1] hello from 1", "hello from 0", "values [0, 10]"]
    assert second == "next\n"


@pytest.mark.kernel
def test_failing_rank_fails_the_cell_under_papermill(tmp_path: Path) -> None:
    path, out = notebook(tmp_path / "book.ipynb", LAUNCH, FAILING, "print('never')"), tmp_path / "out.ipynb"
    command = [sys.executable, "-m", "papermill", str(path), str(out), "-k", "python3", "--no-progress-bar"]
    done = run(command, tmp_path, ok=False)
    assert "WorkerError" in done.stderr
    found = texts(out)
    assert any("ranks 0-1 of 2 failed: ValueError: of all things" in text for text in found)
    assert any(
        "Cell In[2], line 2, in fail" in text.replace("\x1b[32m", "").replace("\x1b[0m", "") for text in found
    )
    assert not any(text == "never\n" for text in found)
