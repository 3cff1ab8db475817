"""What a rank's reporter measures of it."""

from __future__ import annotations

import os
from types import CodeType, FunctionType

import torch

from nbaccel.rank.vitals import Gauge
from nbaccel.wire.snapshot import Collective


def pending(seconds: float) -> list[Collective]:
    return [
        Collective(
            group="0", seq=1, op="all_reduce", sizes=((1,),), dtypes=("f",), pending=True, seconds=seconds
        )
    ]


def compiling() -> CodeType:
    """Code as torch.compile is in while it compiles."""
    filename = os.path.join("site-packages", "torch", "_dynamo", "convert_frame.py")
    names: dict[str, object] = {}
    exec(compile("def _compile(): pass", filename, "exec"), names)
    function = names["_compile"]
    assert isinstance(function, FunctionType)
    return function.__code__


def test_memory_grows_by_what_the_rank_allocates() -> None:
    before = Gauge(0).read((), 0.0, list)
    held = torch.ones(30_000_000)  # 120 MB
    after = Gauge(0).read((), 0.0, list)
    assert before is not None
    assert after is not None
    assert before.memory is not None
    assert after.memory is not None
    assert 100e6 < after.memory - before.memory < 200e6
    assert held.numel() == 30_000_000
    assert before.device_memory is None
    assert before.utilization is None


def test_nothing_is_told_again_until_it_changes() -> None:
    gauge = Gauge(0)
    assert gauge.read((), 0.0, list) is not None
    assert gauge.read((), 0.0, list) is None
    told = gauge.read((), 2.0, lambda: pending(2.0))
    assert told is not None
    assert (told.doing, told.detail) == ("waiting", "all_reduce")
    assert gauge.read((), 2.5, lambda: pending(2.5)) is None
    back = gauge.read((), 0.0, lambda: pending(3.0))
    assert back is not None
    assert back.doing == ""


def test_collectives_are_not_asked_for_while_the_rank_moves() -> None:
    def asked() -> list[Collective]:
        raise AssertionError("nobody waits")

    assert Gauge(0).read((), 0.9, asked) is not None


def test_collective_called_just_now_is_no_wait() -> None:
    told = Gauge(0).read((), 5.0, lambda: pending(0.2))
    assert told is not None
    assert told.doing == ""


def test_compiling_is_seen_in_the_stack() -> None:
    told = Gauge(0).read([compiling()], 0.0, list)
    assert told is not None
    assert told.doing == "compiling"
