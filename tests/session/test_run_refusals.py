"""What cannot be done is refused in words before any process starts."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

import nbaccel
from nbaccel import FSDP, RunConfig, launch, notebook_launcher
from nbaccel.errors import ConfigError, PayloadError
from nbaccel.rank.spec import RunSpec, rank_environ
from nbaccel.session.request import read_variables

pytestmark = pytest.mark.usefixtures("clean")


def one(x: int) -> int:
    return x


LOCK = threading.Lock()


def use_lock() -> None:
    with LOCK:
        pass


class Unspeakable:
    def __repr__(self) -> str:
        return str(1 // 0)


async def sleeps(x: int) -> int:
    return x


CASES: list[tuple[dict[str, Any], str]] = [
    ({"num_processes": 0}, "num_processes.* at least 1"),
    ({"num_processes": -1}, "num_processes.* at least 1"),
    ({"num_processes": 10_000}, "num_processes=10000.* room"),
    ({"num_processes": "two"}, "num_processes.* must be an int, not 'two'"),
    ({"num_processes": True}, "num_processes.* must be an int"),
    ({"mixed_precision": "bf17"}, "bf17.*Did you mean 'bf16'"),
    ({"mixed_precision": "fp8", "fp8": {"recipe": "colwise"}}, "'colwise'.*'tensorwise', 'rowwise'"),
    ({"strategy": "fsdpp"}, "Did you mean 'fsdp'"),
    ({"strategy": "megatron_lm"}, r"here it is 'megatron', or Megatron\(size"),
    ({"strategy": FSDP(wrap=len)}, "cannot be asked of a launch"),
    ({"device": "tpu"}, "no TPU chip was found"),
    ({"device": "gpu9"}, "device"),
    ({"device": "gpu"}, "device .* is 'gpu': here it is 'cuda'"),
    ({"device": "CPU"}, "Did you mean 'cpu'"),
    ({"mixed_precision": "float32"}, "is 'float32': here it is 'no'"),
    ({"opened_by": "x"}, "unknown argument 'opened_by'"),
    ({"strategy": "single"}, "there are 2 ranks; use 'ddp' or launch one"),
    (
        {"strategy": "pipeline", "pipeline": {"size": 3}},
        "pipeline.*2 ranks cannot be divided into groups of 3",
    ),
    (
        {"config": {"strategy": "ddp", "fsdp": {"sharding": "no_shard"}}},
        r"fsdp \(from config\).*leave fsdp out",
    ),
    ({"env": {"WORLD_SIZE": "4"}}, "env has WORLD_SIZE.*num_processes="),
    ({"function": 3}, "must be a function"),
    ({"args": ()}, r"one\(x: 'int'\) -> 'int' cannot be called.*missing"),
    ({"args": (1, 2)}, "too many positional"),
    ({"args": 3}, r"args must be a tuple, not int: write args=\(3,\)"),
    ({"args": "abc"}, "args must be a tuple"),
    ({"kwargs": {"y": 1}}, "'y'"),
    ({"num_process": 2}, "Did you mean 'num_processes'"),
    ({"start_method": "forkserver"}, "start_method"),
    ({"returns": "rank1"}, "returns is 'rank1'"),
    ({"output": "loud"}, "output"),
    ({"max_time": "soon"}, "max_time"),
    ({"max_time": 0}, "max_time"),
    ({"start_timeout": -1}, "start_timeout"),
    ({"collective_timeout": 0}, "collective_timeout|duration"),
    ({"grace": -1}, "grace"),
    ({"config": {"mixed_precision": "fp16"}, "mixed_precision": "bf16"}, "asked twice.*'bf16'.*'fp16'"),
    ({"config": RunConfig(num_processes=3)}, "num_processes is asked twice"),
    ({"config": {"num_procs": 2}}, "unknown option 'num_procs'"),
    ({"config": 3}, "config"),
    ({"devices": [0]}, "devices"),
    ({"num_nodes": 2}, "several hosts"),
    ({"args": (LOCK,)}, "lock"),
    ({"args": (Unspeakable(), 2)}, "Unspeakable instance.*too many positional"),
    ({"function": sleeps}, r"sleeps is async.*lambda: asyncio.run\(sleeps\(…\)\)"),
    ({"name": 5}, "name must be a string, not 5"),
    ({"env": "A=1"}, "env must be a mapping"),
    ({"env": {"A=B": "1"}}, "env has 'A=B'='1', which no environment can hold"),
]


@pytest.mark.parametrize(("options", "match"), CASES, ids=[case[1][:40] for case in CASES])
def test_call_is_refused_before_any_process_starts(options: dict[str, Any], match: str) -> None:
    before = {child.pid for child in psutil.Process().children()}
    call = {"function": one, "args": (1,), "num_processes": 2, "device": "cpu", **options}
    with pytest.raises(ConfigError, match=f"(?s){match}"):
        notebook_launcher(**call)
    assert {child.pid for child in psutil.Process().children()} == before


def test_every_variable_that_tells_a_rank_its_place_is_refused() -> None:
    spec = RunSpec(
        run_id="0",
        num_processes=2,
        device="cpu",
        threads=1,
        environ={},
        cwd="/",
        sys_path=(),
        argv=(),
        config="{}",
    )
    given = {name for name in rank_environ(spec, 0, 1) if not name.endswith("_IFNAME")}
    for name in given:
        with pytest.raises(ConfigError, match=f"env has {name}, which tells a rank its place"):
            read_variables({name: "1"})
    assert read_variables({"GLOO_SOCKET_IFNAME": "lo", "A": ""}) == {"GLOO_SOCKET_IFNAME": "lo", "A": ""}


def test_launch_takes_the_arguments_themselves() -> None:
    with pytest.raises(ConfigError, match=r"launch\(train, 1, 2\) instead of launch\(train, args=\(1, 2\)\)"):
        launch(one, args=(1,), num_processes=2)
    with pytest.raises(ConfigError, match=r"unknown argument 'function'\. "):
        launch(one, 1, function=one)


def test_variable_is_named_when_it_cannot_be_sent() -> None:
    def inner() -> None:
        with lock:
            pass

    lock = threading.Lock()
    with pytest.raises(PayloadError, match=r"'lock'.*used in inner\(\).*with lock:"):
        launch(inner, num_processes=1)


@pytest.fixture(scope="module", autouse=True)
def store_once() -> None:
    """The first store of a process makes a pipe that libuv keeps."""
    notebook_launcher(os.getpid, inline=True)


def joins() -> tuple[str, int, bool]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    return os.environ["RANK"], dist.get_world_size(), bool(dist.is_initialized())


def test_inline_runs_here_as_the_one_rank_of_a_torchrun_launch() -> None:
    import torch.distributed as dist

    assert notebook_launcher(os.getpid, inline=True) == [os.getpid()]
    assert notebook_launcher(joins, inline=True, device="cpu", returns="rank0") == [("0", 1, True)]
    assert not dist.is_initialized()
    assert "RANK" not in os.environ
    assert "MASTER_PORT" not in os.environ
    assert notebook_launcher(joins, inline=True, returns="none") == [None]


def test_inline_refuses_more_ranks_and_what_it_cannot_do() -> None:
    with pytest.raises(
        ConfigError, match="inline=True runs one rank in this process: leave out num_processes=2"
    ):
        notebook_launcher(os.getpid, num_processes=2, inline=True)
    with pytest.raises(ConfigError, match="leave out max_time"):
        notebook_launcher(os.getpid, inline=True, max_time=3)
    with pytest.raises(ConfigError, match="too many positional"):
        notebook_launcher(one, (1, 2), inline=True)


def test_launch_is_refused_when_the_working_folder_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    before = nbaccel.runs()
    with pytest.raises(ConfigError, match="working folder is gone"):
        notebook_launcher(one, (1,), num_processes=1)
    assert len(nbaccel.runs()) == len(before)
