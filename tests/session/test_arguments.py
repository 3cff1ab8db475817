"""Arguments of other launchers, read off the real packages so that a new one of theirs is noticed."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from nbaccel.config import RunConfig
from nbaccel.errors import ConfigError
from nbaccel.session.arguments import foreign_arguments

# accelerate's and Fabric's names that are arguments of our own launcher too.
OURS = {"function", "args", "num_processes", "mixed_precision", "strategy", "devices", "max_restarts", "self"}


def test_call_copied_from_an_accelerate_notebook_is_taken_in_silence() -> None:
    options: dict[str, Any] = {
        "use_port": "29500",
        "master_addr": "127.0.0.1",
        "node_rank": 0,
        "num_nodes": 1,
        "rdzv_backend": "static",
        "rdzv_endpoint": "",
        "rdzv_conf": None,
        "rdzv_id": "none",
        "monitor_interval": 0.1,
        "log_line_prefix_template": None,
    }
    assert foreign_arguments(options) == ({}, [])


def test_arguments_without_effect_are_named_in_one_warning() -> None:
    options = {"use_port": "29501", "monitor_interval": 1, "rdzv_backend": "c10d", "num_nodes": 1}
    accepted, warnings = foreign_arguments(options)
    assert accepted == {}
    assert len(warnings) == 1
    assert [name in warnings[0] for name in options] == [True, True, True, False]


@pytest.mark.peers
def test_every_argument_of_accelerate_is_known_with_its_default() -> None:
    import accelerate

    parameters = inspect.signature(accelerate.notebook_launcher).parameters
    theirs = {name: p.default for name, p in parameters.items() if name not in OURS}
    assert len(theirs) == 10
    assert foreign_arguments(theirs) == ({}, [])


@pytest.mark.peers
def test_every_argument_of_fabric_is_known_with_its_default() -> None:
    from lightning_fabric import Fabric

    parameters = inspect.signature(Fabric.__init__).parameters
    theirs = {name: p.default for name, p in parameters.items() if name not in OURS}
    assert set(theirs) == {"accelerator", "num_nodes", "precision", "plugins", "callbacks", "loggers"}
    assert foreign_arguments(theirs) == ({}, [])


@pytest.mark.parametrize(
    ("options", "accepted"),
    [
        ({"accelerator": "gpu", "precision": "16-mixed"}, {"device": "cuda", "mixed_precision": "fp16"}),
        ({"accelerator": "cpu", "precision": "bf16-mixed"}, {"device": "cpu", "mixed_precision": "bf16"}),
        ({"precision": 32}, {"mixed_precision": "no"}),
        ({"nprocs": 4, "join": True}, {"num_processes": 4}),
        ({"nprocs": None}, {}),
        ({"nproc_per_node": "gpu", "nnodes": "1:1"}, {}),
        ({"nprocs": 2, "nproc_per_node": 2}, {"num_processes": 2}),
    ],
)
def test_arguments_with_a_word_of_ours_are_translated(
    options: dict[str, Any], accepted: dict[str, Any]
) -> None:
    assert foreign_arguments(options) == (accepted, [])
    RunConfig.from_mapping(accepted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_nodes": 2}, "num_nodes=2: a notebook's launch over several hosts is not built yet"),
        ({"nnodes": "2"}, "several hosts is not built yet"),
        ({"node_rank": 1}, "node_rank=1: a notebook's launch over several hosts is not built yet"),
        ({"use_port": "http"}, "use_port must be a port number from 0 to 65535, not 'http'"),
        ({"use_port": 70000}, "use_port must be a port number"),
        ({"use_port": True}, "use_port must be a port number"),
        ({"monitor_interval": 0}, "monitor_interval must be a number of seconds above 0"),
        ({"monitor_interval": "fast"}, "monitor_interval must be a number of seconds above 0"),
        ({"rdzv_conf": "timeout=3"}, "rdzv_conf must be a mapping"),
        ({"precision": "64-true"}, "precision='64-true' is not built"),
        ({"accelerator": object()}, "accelerator is"),
        ({"plugins": ["x"]}, "plugins cannot be honoured here: pass strategy="),
        ({"join": False}, "use launch"),
        ({"nprocs": 2, "nproc_per_node": 3}, "num_processes"),
    ],
)
def test_arguments_that_cannot_be_honoured_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        foreign_arguments(options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("usr_port", "use_port"),
        ("num_proceses", "num_processes"),
        ("grce", "grace"),
        ("max_restart", "max_restarts"),
    ],
)
def test_unknown_argument_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown argument '{name}'. Did you mean '{nearest}'"):
        foreign_arguments({name: 1}, own=("grace", "args"))


def test_argument_of_the_function_itself_is_shown_its_place() -> None:
    def train(lr: float, epochs: int = 1) -> None: ...

    with pytest.raises(
        ConfigError, match="'epochs' is an argument of train, not of the launch: give it in kwargs="
    ):
        foreign_arguments({"epochs": 3}, function=train)
    with pytest.raises(ConfigError, match="unknown argument 'epoch'"):
        foreign_arguments({"epoch": 3}, function=train)


def test_unknown_argument_far_from_all_says_where_the_users_own_go() -> None:
    with pytest.raises(ConfigError) as caught:
        foreign_arguments({"zzz": 1})
    assert "Did you mean" not in str(caught.value)
    assert "kwargs={…}" in str(caught.value)
