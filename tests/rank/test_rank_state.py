"""A rank begins as a fresh process of its own would, in the notebook's surroundings."""

from __future__ import annotations

import contextlib
import io
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbaccel import launch, notebook_launcher
from nbaccel.engines import forkserver

pytestmark = pytest.mark.usefixtures("clean")


@dataclass(frozen=True)
class Replaced:
    """What came of two launches whose server is not the one that was there."""

    there: dict[str, Any]
    """What a rank of the first one saw."""
    said: str
    """On stderr at the first one."""
    said_again: str
    """At the second one."""


@pytest.fixture(scope="module")
def replaced(warm: None, tmp_path_factory: pytest.TempPathFactory) -> Replaced:
    """Launches with variables that libraries read when they load, in a process that has imported two packages that
    servers cannot: nb_thready leaves a thread, nb_fails is refused.

    They have servers of their own: the warm ones are as they were afterwards.
    """
    site = tmp_path_factory.mktemp("site-packages")
    (site / "nb_thready.py").write_text(
        "import threading\nover = threading.Event()\nthreading.Thread(target=over.wait, daemon=True).start()\n"
    )
    (site / "nb_fails.py").write_text(
        "import sys\nif not hasattr(sys, 'nb_licence'):\n    raise OSError('no licence')\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forkserver, "_servers", {})
        patch.setattr(forkserver, "_retired", [])
        patch.setattr(forkserver, "_site_folders", lambda: (str(site) + os.sep,))
        patch.setattr(sys, "nb_licence", True, raising=False)
        patch.syspath_prepend(str(site))
        import nb_fails  # type: ignore[import-not-found]
        import nb_thready  # type: ignore[import-not-found]

        assert nb_fails
        said, said_again = io.StringIO(), io.StringIO()
        try:
            forkserver.server_for(os.environ, "fork", lean=True)  # the one that is replaced
            patch.setenv("TORCH_NB_TEST", "1")
            with contextlib.redirect_stderr(said):
                there = notebook_launcher(surroundings, num_processes=2, env={"OMP_NUM_THREADS": "3"})[0]
            with contextlib.redirect_stderr(said_again):
                notebook_launcher(int, num_processes=1, env={"OMP_NUM_THREADS": "3"})
        finally:
            forkserver.shut_down()
            nb_thready.over.set()
            sys.modules.pop("nb_thready")
            sys.modules.pop("nb_fails")
    return Replaced(there, said.getvalue(), said_again.getvalue())


def draw() -> tuple[float, float, int]:
    return random.random(), float(np.random.rand()), torch.initial_seed()


def test_random_state_is_a_fresh_processs_when_ranks_are_forked() -> None:
    first, second = (notebook_launcher(draw, num_processes=2) for _ in range(2))
    values = [*first, *second]
    assert len({value[0] for value in values}) == 4
    assert len({value[1] for value in values}) == 4
    assert len({value[2] for value in values}) == 4  # torch draws the seed of each process


def surroundings() -> dict[str, Any]:
    return {
        "cwd": os.getcwd(),
        "mine": os.environ.get("NB_TEST"),
        "late": os.environ.get("NB_LATE"),
        "torch": os.environ.get("TORCH_NB_TEST"),
        "path": sys.path[0],
        "threads": torch.get_num_threads(),
        "omp": os.environ["OMP_NUM_THREADS"],
        "main": sys.modules["__main__"].__name__,
    }


def test_folder_variables_and_path_hold_as_they_are_at_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NB_LATE", "yes")
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    there = notebook_launcher(surroundings, num_processes=2, env={"NB_TEST": "given"})[1]
    assert there["cwd"] == str(tmp_path)
    assert there["mine"] == "given"
    assert there["late"] == "yes"
    assert there["path"] == str(tmp_path / "code")
    assert there["threads"] == int(there["omp"]) >= 1
    assert "NB_TEST" not in os.environ


def test_threads_are_the_users_when_the_launch_says_so(replaced: Replaced) -> None:
    assert (replaced.there["threads"], replaced.there["omp"]) == (3, "3")


def test_changed_variable_brings_a_fresh_server_and_says_so(replaced: Replaced) -> None:
    assert replaced.there["torch"] == "1"
    assert "OMP_NUM_THREADS, TORCH_NB_TEST changed" in replaced.said
    assert "changed" not in replaced.said_again


def test_packages_that_cannot_be_imported_ahead_are_named(replaced: Replaced) -> None:
    assert "nb_thready" in replaced.said
    assert "left out" in replaced.said
    assert "nb_thready" not in replaced.said_again
    assert (
        "nb_fails could not be imported ahead of the ranks, which import it themselves (OSError: no licence)"
        in replaced.said_again
    )


def test_edited_module_is_fresh_at_the_next_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "nb_edited_module.py"
    module.write_text("def answer():\n    return 1\n")
    import nb_edited_module  # type: ignore[import-not-found]

    assert notebook_launcher(nb_edited_module.answer, num_processes=2) == [1, 1]
    module.write_text("def answer():\n    return 'two'\n")
    assert notebook_launcher(nb_edited_module.answer, num_processes=2) == ["two", "two"]
    sys.modules.pop("nb_edited_module")


def own_bytes(tensor: torch.Tensor) -> tuple[float, int]:
    """What the rank shares with no other process: unlike Pss, the same however many processes wait beside it."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = float(tensor.sum())
    dist.barrier()  # a page that only one rank has read yet, or still has, counts as its own
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    dist.barrier()
    return total, sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))


def test_large_argument_is_shared_by_the_ranks() -> None:
    size = 64 << 20
    without = notebook_launcher(own_bytes, (torch.ones(1 << 20),), num_processes=2)
    values = notebook_launcher(own_bytes, (torch.ones(size // 4),), num_processes=2)
    assert [total for total, _ in values] == [float(size // 4)] * 2
    extra = [large - small for (_, large), (_, small) in zip(values, without, strict=True)]
    assert max(extra) < size // 4  # one copy between them, not one for each


def train_tied() -> torch.nn.Module:
    import torch.distributed as dist

    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(8, 8)
            self.second = torch.nn.Linear(8, 8)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(Tied())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    return model


def test_trained_module_comes_back_plain_with_its_ties() -> None:
    model, other = notebook_launcher(train_tied, num_processes=2, returns="rank0")
    assert other is None
    assert type(model).__name__ == "Tied"
    assert model.first.weight is model.second.weight
    assert model(torch.ones(1, 8)).shape == (1, 8)


def large_result() -> torch.Tensor:
    return torch.ones(64 << 20)


def test_large_result_costs_one_copy() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    notebook_launcher(int, num_processes=1)
    before = resident()
    value = notebook_launcher(large_result, num_processes=1)[0]
    assert value.shape == (64 << 20,)
    assert value[::1000].eq(1).all()
    assert resident() - before < 1.5 * value.nbytes
    del value


def test_run_folder_tells_the_whole_story(tmp_path: Path) -> None:
    run = launch(draw, num_processes=2, folder=tmp_path, name="my run")
    run.result()
    assert run.folder is not None
    assert run.folder.parent == tmp_path
    assert {path.name for path in run.folder.iterdir()} >= {
        "run.json",
        "config.json",
        "events.jsonl",
        "result.json",
    }
    assert '"state": "done"' in (run.folder / "result.json").read_text()
    assert "def draw" in (run.folder / "run.json").read_text()


def test_no_run_folder_when_none_is_wanted() -> None:
    run = launch(draw, num_processes=1, folder=False)
    run.result()
    assert run.folder is None
