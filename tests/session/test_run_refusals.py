"""What cannot be done is refused in words before any process starts."""

from __future__ import annotations

import os
import threading
from typing import Any

import psutil
import pytest

from nbaccel import FSDP, RunConfig, launch, notebook_launcher
from nbaccel.errors import ConfigError, PayloadError

pytestmark = pytest.mark.usefixtures("clean")


def one(x: int) -> int:
    return x


LOCK = threading.Lock()


def use_lock() -> None:
    with LOCK:
        pass


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
    ({"device": "tpu"}, "needs a runtime"),
    ({"device": "gpu9"}, "device"),
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
]


@pytest.mark.parametrize(("options", "match"), CASES, ids=[str(case[0])[:40] for case in CASES])
def test_call_is_refused_before_any_process_starts(options: dict[str, Any], match: str) -> None:
    before = {child.pid for child in psutil.Process().children()}
    call = {"function": one, "args": (1,), "num_processes": 2, "device": "cpu", **options}
    with pytest.raises(ConfigError, match=f"(?s){match}"):
        notebook_launcher(**call)
    assert {child.pid for child in psutil.Process().children()} == before


def test_variable_is_named_when_it_cannot_be_sent() -> None:
    def inner() -> None:
        with lock:
            pass

    lock = threading.Lock()
    with pytest.raises(PayloadError, match=r"'lock'.*used in inner\(\).*with lock:"):
        launch(inner, num_processes=1)


def test_inline_runs_here_and_refuses_more_ranks() -> None:
    assert notebook_launcher(os.getpid, inline=True) == [os.getpid()]
    with pytest.raises(ConfigError, match="inline"):
        notebook_launcher(os.getpid, num_processes=2, inline=True)
