from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from nbaccel.config import RUN_CONFIG_VARIABLE, RunConfig
from nbaccel.core.world import join, read_environment
from nbaccel.errors import ConfigError

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def test_environment_when_empty_is_one_process():
    environment = read_environment({})
    assert (environment.rank, environment.size, environment.rendezvous) == (0, 1, False)
    world = join(RunConfig(device="cpu"), environment)
    assert (world.rank, world.size, world.backend, world.is_main) == (0, 1, None, True)
    assert not dist.is_initialized()


def test_environment_when_torchrun_set_it():
    environment = read_environment({**TORCHRUN, RUN_CONFIG_VARIABLE: RunConfig(seed=3).to_json()})
    assert (environment.rank, environment.size, environment.local_size) == (1, 4, 2)
    assert environment.config.seed == 3


@pytest.mark.parametrize("left_out", ["RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"])
def test_environment_when_incomplete_is_refused(left_out):
    variables = {k: v for k, v in TORCHRUN.items() if k != left_out}
    with pytest.raises(ConfigError, match=f"lacks {left_out}"):
        read_environment(variables)


def test_environment_when_rank_without_size_is_refused():
    with pytest.raises(ConfigError, match="lacks WORLD_SIZE"):
        read_environment({k: v for k, v in TORCHRUN.items() if k != "WORLD_SIZE"})


@pytest.mark.parametrize(("name", "value"), [("RANK", "4"), ("LOCAL_RANK", "2"), ("WORLD_SIZE", "many")])
def test_environment_when_senseless_is_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        read_environment({**TORCHRUN, name: value})


def test_environment_when_a_lone_world_size_of_one_is_one_process():
    assert read_environment({"WORLD_SIZE": "1"}).size == 1


def _join():
    world = join(RunConfig(device="cpu"))
    again = join(RunConfig(device="cpu"))
    return (
        world == again,
        world.rank,
        world.local_rank,
        world.size,
        world.local_size,
        world.backend,
        world.is_main,
    )


def test_join_when_launched():
    values = run_ranks(_join, num_processes=3)
    assert values == [(True, r, r, 3, 3, "gloo", r == 0) for r in range(3)]


def _join_existing():
    dist.init_process_group("gloo")
    return join().size


def test_join_when_the_group_exists():
    assert run_ranks(_join_existing) == [2, 2]


def test_join_when_device_is_missing():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ConfigError, match=r"cuda:0.*sees 0"):
        join(RunConfig(device="cuda"), read_environment({}))
