"""The same launch from every place people start one: a script, IPython in a terminal, a notebook run headless."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from nbaccel.session.panel.ansi import plain

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


def write_notebook(path: Path, *cells: str) -> None:
    """A notebook with these cells."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata={"kernelspec": kernel}
    )
    nbformat.write(book, path)


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


@pytest.mark.kernel
def test_notebook_run_by_papermill_has_folded_output_and_a_failing_rank_ends_it(tmp_path: Path) -> None:
    """By papermill, and so by nbclient."""
    path, out = tmp_path / "book.ipynb", tmp_path / "out.ipynb"
    write_notebook(path, LAUNCH, "print('next')", FAILING, "print('never')")
    command = [sys.executable, "-m", "papermill", str(path), str(out), "-k", "python3", "--no-progress-bar"]
    done = run(command, tmp_path, ok=False)
    assert "WorkerError" in done.stderr
    launched, following, failed = filter(None, texts(out))
    assert sorted(launched.splitlines()) == ["[1] hello from 1", "hello from 0", "values [0, 10]"]
    assert following == "next\n"
    found = plain(failed)
    assert "ranks 0-1 of 2 failed: ValueError: of all things" in found
    assert "Cell In[3], line 2, in fail" in found
