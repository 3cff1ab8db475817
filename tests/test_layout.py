"""Which sizes of groups fit how many ranks, as a launch and the ranks themselves find out."""

from __future__ import annotations

from typing import Any

import pytest

from nbaccel.config import RunConfig
from nbaccel.errors import ConfigError
from nbaccel.layout import require_layout


@pytest.mark.parametrize(
    ("asked", "num_ranks", "words"),
    [
        ({"strategy": "fsdp", "fsdp": {"reshard_after_forward": 7}}, 2, "reshard_after_forward is 7, which does not"),
        (
            {"strategy": "fsdp", "fsdp": {"sharding": "hybrid_shard", "shard_size": 2, "reshard_after_forward": 4}},
            4,
            "does not divide the 2 rank(s)",
        ),
        ({"strategy": "fsdp", "fsdp": {"sharding": "hybrid_shard", "shard_size": 3}}, 4, "shard_size is 3, which does"),
        ({"strategy": "fsdp", "tensor_parallel": {"size": 3}}, 4, "tensor_parallel (from f): size 3 does not divide"),
        ({"strategy": "context_parallel", "context_parallel": {"size": 3}}, 4, "context_parallel (from f): 3 ranks"),
        ({"strategy": "pipeline", "pipeline": {"size": 3}}, 4, "pipeline (from f): 4 ranks cannot be divided"),
        ({"strategy": "megatron", "megatron": {"size": 3}}, 4, "megatron (from f): 4 ranks cannot be divided"),
        ({"strategy": "single"}, 2, "there are 2 ranks; use 'ddp' or launch one"),
        ({"strategy": "fsdp", "ddp": {}}, 2, "ddp (from f) holds options of strategy 'ddp', but strategy is 'fsdp'"),
        ({"strategy": "deepspeed", "deepspeed": {"config": "gone.json"}}, 1, "deepspeed (from f): its configuration"),
        ({"strategy": "ddp", "fsdp": {}}, 2, "fsdp (from f) holds options of strategy 'fsdp', but strategy is 'ddp'"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(asked: dict[str, Any], num_ranks: int, words: str):
    with pytest.raises(ConfigError) as refused:
        require_layout(RunConfig.from_mapping(asked, place="f"), num_ranks, num_ranks)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("asked", "num_ranks"),
    [
        ({"strategy": "fsdp", "fsdp": {"reshard_after_forward": 2}}, 4),
        ({"strategy": "fsdp", "fsdp": {"reshard_after_forward": 7}}, 1),  # nothing is spread
        ({"strategy": "fsdp", "fsdp": {"reshard_after_forward": True}}, 3),
        ({"strategy": "fsdp", "fsdp": {"reshard_after_forward": 2}, "tensor_parallel": {"size": 2}}, 4),
        ({"fsdp": {"reshard_after_forward": 7}}, 2),  # the script may ask for another strategy
        ({"strategy": "deepspeed", "deepspeed": {"stage": 3}}, 3),
    ],
)
def test_sizes_that_fit_are_taken(asked: dict[str, Any], num_ranks: int):
    require_layout(RunConfig.from_mapping(asked, place="f"), num_ranks, num_ranks)


def test_copies_of_hybrid_shard_are_those_of_a_host():
    asked = RunConfig.from_mapping(
        {"strategy": "fsdp", "fsdp": {"sharding": "hybrid_shard", "reshard_after_forward": 4}}
    )
    require_layout(asked, 8, 4)
    with pytest.raises(ConfigError, match="does not divide the 2 rank"):
        require_layout(asked, 8, 2)
