"""What is still under way when a rank's function, or a script, ends: saves in the background, logged values."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from nbaccel import launch
from nbaccel.core import Accelerator
from nbaccel.core.checkpoint import Checkpoints
from nbaccel.core.checkpoint.faults import FaultyFileSystem
from nbaccel.core.world import single
from nbaccel.errors import WorkerError


def wait_until(condition: Callable[[], object], timeout: float, what: str) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"not in {timeout} s: {what}"
        time.sleep(0.02)


def _save_and_return(folder, full):
    """Returns while tens of megabytes are still to be written."""
    acc = Accelerator(project_dir=folder)
    if full:
        acc._saving._checkpoints._filesystem = FaultyFileSystem(capacity=4_000_000, hides_full=True)
    acc.prepare(nn.Linear(2000, 2000))
    path = acc.save_state(asynchronous=True)
    return path, acc._saving._checkpoints.pending


def test_save_in_the_background_when_the_function_returns_is_completed(tmp_path: Path, clean: None) -> None:
    values = launch(
        _save_and_return, str(tmp_path), False, num_processes=2, device="cpu", output="none"
    ).result(timeout=60)
    assert any(pending for _, pending in values)
    found = Checkpoints(world=single()).newest_complete(tmp_path)
    assert str(found.path) == values[0][0]
    assert not found.skipped


def test_save_in_the_background_when_it_fails_after_the_function_fails_the_call(
    tmp_path: Path, clean: None
) -> None:
    run = launch(_save_and_return, str(tmp_path), True, num_processes=2, device="cpu", output="none")
    with pytest.raises(WorkerError, match=r"CheckpointError[\s\S]*No space left on device"):
        run.result(timeout=60)


SCRIPT = """
import os, sys; sys.path.insert(0, {here!r})
from test_endings import _save_and_return
full = os.fork() == 0
with open({folder!r} + ("/full" if full else "/well"), "w") as file:
    os.dup2(file.fileno(), 2)
_save_and_return({folder!r} + "/" + str(full), full)
"""


def test_save_in_the_background_when_a_script_ends(tmp_path: Path) -> None:
    """Two scripts, of which one has imported everything for both."""
    code = SCRIPT.format(here=str(Path(__file__).parent), folder=str(tmp_path))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code]
    # the end of its output is that of both
    subprocess.run(command, env=environment, stdout=subprocess.PIPE, timeout=150, check=True)
    assert (tmp_path / "well").read_text() == ""
    assert Checkpoints(world=single()).newest_complete(tmp_path / "False").path is not None
    said = (tmp_path / "full").read_text()
    assert "the last save in the background failed" in said
    assert "No space left on device" in said
    assert "end_training" in said
    assert Checkpoints(world=single()).newest_complete(tmp_path / "True").path is None


def _log_last() -> None:
    acc = Accelerator()
    for step in range(50):
        acc.log({"loss": float(step)}, step=step)


def test_logged_values_when_the_function_ends_are_shown_to_the_last(tmp_path: Path, clean: None) -> None:
    run = launch(_log_last, num_processes=1, device="cpu", output="none", folder=tmp_path)
    run.result(60)
    wait_until(lambda: [*tmp_path.rglob("result.json")], 10, "the run's folder to be complete")
    lines = next(tmp_path.rglob("events.jsonl")).read_text().splitlines()
    shown = [event for event in map(json.loads, lines) if event["type"] == "Metric"]
    assert shown[-1]["values"]["loss"] == 49
    assert len(shown) < 50, "not each of them"
