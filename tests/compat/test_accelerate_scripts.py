"""The scripts accelerate tests itself with, from its installed wheel, on nbaccel."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from nbaccel import notebook_launcher
from nbaccel.errors import WorkerError
from tests.compat.differences import DIFFERENCES, NOT_RUN, SCHEDULER
from tests.compat.hub import MODEL, make_hub, variables

pytestmark = [pytest.mark.peers, pytest.mark.slow, pytest.mark.timeout(400)]

_WHEEL = importlib.util.find_spec("accelerate")  # not imported: servers would import it too
assert _WHEEL is not None
assert _WHEEL.origin is not None
HOME = Path(_WHEEL.origin).parent / "test_utils" / "scripts"
IMPORT = re.compile(r"^(\s*from )accelerate(\.test_utils(?:\.testing)?)?\b", re.MULTILINE)


@dataclass(frozen=True)
class Script:
    """A script of the wheel, as `python script.py arguments` would run it."""

    name: str
    arguments: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (1, 2, 4)
    """Numbers of ranks it runs on."""


_SMALL = ("--model_name_or_path", MODEL, "--output_dir", "out-{n}")
SCRIPTS = [
    Script("test_ops"),
    Script("test_script"),
    Script("test_sync"),
    Script("test_cli", sizes=(1, 2)),
    Script("test_distributed_data_loop", sizes=(2,)),  # which it insists on
    Script("test_ddp_comm_hook"),
    Script("external_deps/test_metrics"),
    Script("external_deps/test_performance", (*_SMALL, "--num_epochs", "2")),
    Script("external_deps/test_checkpointing", (*_SMALL, "--partial_train_epoch", "1")),
    Script("external_deps/test_checkpointing", (*_SMALL, "--resume_from_checkpoint", "out-{n}/epoch_0")),
]  # fmt: skip


def rewritten(name: str, folder: Path) -> str:
    """A copy of the script in `folder` whose imports are ours, with the listed differences; its path."""
    text = (HOME / f"{name}.py").read_text()
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


def run(commands: list[list[str]], hub: str = "") -> list[str]:
    """In a rank: each script in its folder; the names of those that came to their end."""
    if hub:
        make_hub(Path(hub))
    ran = []
    for path, *arguments in commands:
        os.chdir(os.path.dirname(path))
        sys.argv = [path, *arguments]
        runpy.run_path(path, run_name="__main__")
        ran.append(os.path.basename(path))
    return ran


def on_ranks(num_processes: int, folder: Path, hub: str = "") -> None:
    """Run all scripts that are for so many ranks in one launch. Schedulers step as accelerate's do."""
    commands = [
        [rewritten(one.name, folder), *(word.format(n=num_processes) for word in one.arguments)]
        for one in SCRIPTS
        if num_processes in one.sizes
    ]
    (folder / f"out-{num_processes}").mkdir()
    done = notebook_launcher(
        run,
        (commands, hub),
        num_processes,
        device="cpu",
        config={"scheduler_steps": "per_rank"},
        env=variables(folder),
        output="none",
        folder=False,
    )
    assert list(done) == [[os.path.basename(path) for path, *_ in commands]] * num_processes


@pytest.fixture(scope="module")
def hub(warm: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder the scripts run in, with what they load; they have passed there on one rank, which made it."""
    folder = tmp_path_factory.mktemp("hub")
    on_ranks(1, folder, str(folder))
    return folder


@pytest.mark.parametrize("num_processes", [1, 2, pytest.param(4, marks=pytest.mark.long)])
def test_accelerates_scripts_pass_when_only_their_imports_are_ours(num_processes: int, hub: Path) -> None:
    if num_processes > 1:
        on_ranks(num_processes, hub)
    out = hub / f"out-{num_processes}"
    assert json.loads((out / "state_0.json").read_text())["epoch"] == 0
    assert set(json.loads((out / "all_results.json").read_text())) == {"epoch-0", "epoch-1"}
    assert (out / "model.safetensors").is_file()


def test_accelerates_accumulation_script_fails_when_schedulers_step_once(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="Learning rates found in each optimizer did not align"):
        notebook_launcher(
            run, ([[rewritten("test_sync", tmp_path)]],), 2, device="cpu", output="none", folder=False
        )
    assert "scheduler_steps='per_rank'" in SCHEDULER


def test_script_of_the_wheel_when_it_is_not_run_has_a_reason() -> None:
    there = {
        str(path.relative_to(HOME).with_suffix(""))
        for path in HOME.rglob("*.py")
        if path.name != "__init__.py"
    }
    assert there == {one.name for one in SCRIPTS} | set(NOT_RUN)
