"""The scripts accelerate tests itself with, from its installed wheel, on nbaccel."""

from __future__ import annotations

import os
import re
import runpy
from pathlib import Path

import accelerate.test_utils.scripts
import pytest

from nbaccel import notebook_launcher
from nbaccel.errors import WorkerError
from tests.compat.differences import DIFFERENCES, SCHEDULER

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("clean")]

SCRIPTS = Path(next(iter(accelerate.test_utils.scripts.__path__)))
IMPORT = re.compile(r"^(\s*from )accelerate(\.test_utils(?:\.testing)?)?\b", re.MULTILINE)


def rewritten(name: str, folder: Path) -> str:
    """A copy of the script in `folder` whose imports are ours, with the listed differences; its path."""
    text = (SCRIPTS / f"{name}.py").read_text()
    text, count = IMPORT.subn(
        lambda found: found[1] + ("tests.compat.script_utils" if found[2] else "nbaccel.compat.accelerate"),
        text,
    )
    assert count, name
    for one in DIFFERENCES:
        if one.script == name.rpartition("/")[2]:
            assert one.old in text, f"{name} has no longer {one.old!r}"
            text = text.replace(one.old, one.new)
    path = folder / f"{name.rpartition('/')[2]}.py"
    path.write_text(text)
    return str(path)


def run(paths: list[str]) -> str:
    """In a rank: each script as `python script.py` would run it."""
    for path in paths:
        os.chdir(os.path.dirname(path))
        runpy.run_path(path, run_name="__main__")
    return "ran"


def on_ranks(num_processes: int, paths: list[str], config: dict[str, str] | None = None) -> None:
    done = notebook_launcher(
        run, (paths,), num_processes, device="cpu", config=config, output="none", folder=False
    )
    assert list(done) == ["ran"] * num_processes


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_accelerates_scripts_pass_when_only_their_imports_are_ours(
    num_processes: int, tmp_path: Path
) -> None:
    names = ["test_ops", "test_script", "external_deps/test_metrics"]
    if num_processes == 2:  # which it insists on
        names.append("test_distributed_data_loop")
    on_ranks(num_processes, [rewritten(name, tmp_path) for name in names])


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_accelerates_accumulation_script_passes_when_schedulers_step_per_rank(
    num_processes: int, tmp_path: Path
) -> None:
    on_ranks(num_processes, [rewritten("test_sync", tmp_path)], {"scheduler_steps": "per_rank"})


def test_accelerates_accumulation_script_fails_when_schedulers_step_once(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="Learning rates found in each optimizer did not align"):
        on_ranks(2, [rewritten("test_sync", tmp_path)])
    assert "scheduler_steps='per_rank'" in SCHEDULER
