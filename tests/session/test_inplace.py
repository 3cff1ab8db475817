"""What is asked of a launch in a process that already is a rank holds there."""

from __future__ import annotations

import pytest

from nbaccel import notebook_launcher
from nbaccel.config import RUN_CONFIG_VARIABLE, RunConfig
from nbaccel.core.world import read_environment
from nbaccel.errors import ConfigError


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This process is rank 0 of 2 of somebody's launch."""
    place = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(RUN_CONFIG_VARIABLE, raising=False)
    return monkeypatch


def asked() -> tuple[str | None, int | None]:
    config = read_environment().config
    return config.mixed_precision, config.seed


def test_options_reach_the_accelerator_when_the_function_runs_in_place(rank):
    assert notebook_launcher(asked, num_processes=2, mixed_precision="bf16", seed=3) == [("bf16", 3)]
    assert asked() == (None, None)


def test_options_join_those_of_the_launch_that_made_the_rank(rank):
    rank.setenv(RUN_CONFIG_VARIABLE, RunConfig.from_mapping({"seed": 3}, place="nbaccel.yaml:1").to_json())
    assert notebook_launcher(asked, mixed_precision="bf16") == [("bf16", 3)]
    with pytest.raises(ConfigError, match=r"seed is asked twice: 3 by nbaccel\.yaml:1 and 4 by the launch"):
        notebook_launcher(asked, seed=4)
    assert asked() == (None, 3)
