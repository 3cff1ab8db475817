"""How a launched script ends before its end: SIGTERM, failures with restarts."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Command, Writer, said_by
from tests.conftest import gone, named, wait_until

TRAIN = """
    import os, sys, time
    import torch
    from torch.utils.data import DataLoader, TensorDataset
    from nbaccel import Accelerator

    torch.set_num_threads(1)
    acc = Accelerator()
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(torch.arange(400.0).reshape(-1, 4)), batch_size=1)
    model, optimizer, loader = acc.prepare(model, optimizer, loader)
    began = False
    for (x,) in loader:
        if not began:  # resuming is the first pass's doing
            print("begins at", acc.steps, "attempt", os.environ["TORCHELASTIC_RESTART_COUNT"], flush=True)
        began = True
        acc.step(model(x / 400).sum(), optimizer)
        if "--fail" in sys.argv and acc.steps == 7 and acc.process_index == 1:
            raise RuntimeError("as asked")
        if "--slow" in sys.argv:
            if acc.steps == 3:
                print("under way", flush=True)
            time.sleep(0.25)
    print("ends at", acc.steps, "early" if acc.stopped_early else "", flush=True)
"""


def started(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "nbaccel", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read_until(process: subprocess.Popen[str], words: str) -> str:
    """Output up to the line that holds these words."""
    seen = ""
    assert process.stdout is not None
    while words not in seen:
        line = process.stdout.readline()
        assert line, f"no {words!r} in:\n{seen}"
        seen += line
    return seen


def test_sigterm_stops_all_ranks_at_one_step_and_saves(nbaccel: Command, script: Writer):
    name = script(TRAIN)
    ask = ("launch", "--device", "cpu", "-n", 2, "--no-folder", "--project-dir", "out", "--resume", "auto")
    process = started(*ask, name, "--slow")
    read_until(process, "under way")
    below = [
        *named(process.pid, "nb-server"),
        *named(process.pid, "nb-rank-0"),
        *named(process.pid, "nb-rank-1"),
    ]
    assert len(below) == 3
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    ended = re.search(r"ends at (\d+) early", output)
    assert ended, output
    assert said_by(output, ended[0]) == {0, 1}
    assert 3 <= int(ended[1]) < 50
    assert gone(below)
    assert len(list(Path("out").glob("**/manifest.json"))) == 1
    again = nbaccel(*ask, name)
    assert said_by(again.out, f"begins at {ended[1]} attempt 0") == {0, 1}, again.out + again.err
    assert said_by(again.out, "ends at 50") == {0, 1}


def test_closed_terminal_stops_the_run_at_a_step_and_saves(nbaccel: Command, script: Writer):
    name = script(TRAIN)
    ask = ("launch", "--device", "cpu", "-n", 1, "--folder", "runs", "--project-dir", "out")
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [sys.executable, "-m", "nbaccel", *map(str, ask), name, "--slow"])
    seen = b""
    while b"under way" not in seen:
        seen += os.read(terminal, 65536)
    below = [*named(pid, "nb-server"), *named(pid, "nb-rank-0")]
    assert len(below) == 2
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    assert gone(below)
    assert len(list(Path("out").glob("**/manifest.json"))) == 1
    (result,) = Path("runs").glob("**/result.json")
    assert "SIGHUP" in result.read_text() or '"done"' in result.read_text(), result.read_text()


def test_sigterm_interrupts_a_script_that_cannot_stop_by_itself(nbaccel: Command, script: Writer):
    name = script("import time\nprint('in', flush=True)\ntime.sleep(60)\n")
    process = started("launch", "--device", "cpu", "-n", 2, "--no-folder", name)
    read_until(process, "in")
    below = [*named(process.pid, "nb-server"), *named(process.pid, "nb-rank-0")]
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "train.py:3" in output
    wait_until(lambda: gone(below), 30, "the end of everything below the command")


@pytest.mark.filterwarnings("ignore:Accelerator")
def test_failed_run_goes_on_from_its_checkpoint_until_it_fails_as_the_time_before(
    clean, nbaccel: Command, script: Writer
):
    name = script(TRAIN)
    ask = ("launch", "--device", "cpu", "-n", 2, "--no-folder", "--project-dir", "out", "--resume", "auto")
    ask = (*ask, "--set", "save_every=5", "--max-restarts", 3)
    done = nbaccel(*ask, name, "--fail")
    assert done.code == 1
    assert said_by(done.out, "begins at 0 attempt 0") == {0, 1}
    assert said_by(done.out, "begins at 5 attempt 1") == {0, 1}, done.out + done.err
    first, _, second = done.err.partition("nbaccel: restart 1 of 3, from the newest checkpoint")
    assert "RuntimeError: as asked" in first
    assert "RuntimeError: as asked" in second
    assert "not started again: RuntimeError at step 7 of train, as the time before" in second
    assert "restart 2" not in second
    assert said_by(nbaccel(*ask, name).out, "ends at 50") == {0, 1}


def test_run_is_not_started_again_when_it_was_interrupted_or_too_slow(
    clean, nbaccel: Command, script: Writer
):
    ask = ("launch", "--device", "cpu", "-n", 2, "--no-folder", "--max-restarts", 3)
    done = nbaccel(*ask, "--max-time", 3, script("import time; print('in', flush=True); time.sleep(30)"))
    assert done.code == 124
    assert done.out.count("in") == 1
    assert nbaccel(*ask[:-1], -1, "train.py").code == 2


def test_restarted_function_of_a_notebook_returns_the_values_of_its_last_attempt(clean, tmp_path: Path):
    from nbaccel import launch, notebook_launcher
    from nbaccel.errors import ConfigError

    def work() -> tuple[str, str]:
        import os

        count = os.environ["TORCHELASTIC_RESTART_COUNT"]
        if count == "0":
            raise ValueError("the first time")
        return count, os.environ["TORCHELASTIC_MAX_RESTARTS"]

    values = notebook_launcher(work, num_processes=2, device="cpu", max_restarts=2, folder=False)
    assert values == [("1", "2")] * 2
    with pytest.raises(ConfigError, match="max_restarts is for notebook_launcher"):
        launch(work, num_processes=2, device="cpu", max_restarts=2)
