"""What TorchTPU's ranks are told together, asked of a package that stands in for the real one: that opens a chip, and
there is none here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nbaccel.engines.tpu import with_launch_environment
from nbaccel.errors import LaunchError
from nbaccel.rank.spec import RunSpec

# As the real package says it: it refuses numbers of ranks that no topology has.
ENVIRONMENT = """
import os

def set_tpu_launch_env(nproc_per_node):
    print("libtpu says something")
    if nproc_per_node not in (1, 4, 8):
        raise ValueError(f"no topology for {nproc_per_node} processes")
    assert os.environ["ASKED_WITH"] == "the launch"
    os.environ["TORCH_TPU_TOPOLOGY"] = f"2,{nproc_per_node // 2},1"
    os.environ["TORCH_TPU_SLICEBUILDER_ADDRESSES"] = ",".join(f"localhost:{8471 + i}" for i in range(nproc_per_node))
"""
PACKAGE = """
import sys, types
from torch_tpu import environment
sys.modules["torch.tpu"] = types.ModuleType("torch.tpu")
sys.modules["torch.tpu"].distributed = sys.modules["torch.tpu.distributed"] = environment
"""


@pytest.fixture
def packages(tmp_path: Path) -> str:
    """A folder with a package torch_tpu, and a torch that takes no time."""
    for name, files in {
        "torch_tpu": {"__init__": PACKAGE, "environment": ENVIRONMENT},
        "torch": {"__init__": ""},
    }.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / f"{file}.py").write_text(text)
    return str(tmp_path)


def spec(path: str, count: int, **options: Any) -> RunSpec:
    return RunSpec(
        run_id="run",
        num_processes=count,
        device="tpu",
        threads=1,
        environ={"PATH": "/usr/bin"},
        variables={"ASKED_WITH": "the launch"},
        cwd="/",
        sys_path=(path,),
        argv=(),
        config="{}",
        **options,
    )


def test_ranks_get_what_the_package_sets_for_all_of_them(packages: str) -> None:
    told = with_launch_environment(spec(packages, 4, runtime="torch_tpu")).variables
    assert told["ASKED_WITH"] == "the launch"
    assert told["TORCH_TPU_TOPOLOGY"] == "2,2,1"
    assert told["TORCH_TPU_SLICEBUILDER_ADDRESSES"].count("localhost") == 4
    assert set(told) == {"ASKED_WITH", "TORCH_TPU_TOPOLOGY", "TORCH_TPU_SLICEBUILDER_ADDRESSES"}


def test_its_refusal_is_the_launchs(packages: str) -> None:
    with pytest.raises(
        LaunchError, match="cannot make 3 ranks of this host's chips: ValueError: no topology for 3"
    ):
        with_launch_environment(spec(packages, 3, runtime="torch_tpu"))


def test_package_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="No module named 'torch_tpu'"):
        with_launch_environment(spec(str(tmp_path), 1, runtime="torch_tpu"))


def test_other_runtimes_are_told_nothing_more(packages: str) -> None:
    asked = spec(packages, 4, runtime="torch_xla")
    assert with_launch_environment(asked) is asked
