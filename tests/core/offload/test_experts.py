"""A mixture of experts, of which a token needs a few."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from nbaccel import init_empty_weights
from nbaccel.core.offload.machine import Machine, Speed
from nbaccel.core.offload.operations import count_operations
from nbaccel.core.offload.parts import Part, parts_of
from nbaccel.core.offload.placing import plan_placement

transformers: Any = pytest.importorskip("transformers")
MACHINE = Machine(devices={"cpu": Speed(flops=1e12, memory=2e10, transfer=1e10)}, disk=1e9)


@pytest.fixture(scope="module")
def mixtral() -> Any:
    """Of the real one's proportions, without memory."""
    sizes = {"hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(**sizes, num_hidden_layers=2, vocab_size=100, num_local_experts=8)
    with init_empty_weights():
        return transformers.MixtralForCausalLM(config)


def _experts(parts: list[Part]) -> list[Part]:
    return [part for part in parts if part.name.endswith("experts")]


def test_layers_are_whole_where_the_model_says_so(mixtral: Any) -> None:
    names = [part.name for part in parts_of(mixtral)]
    assert names[:3] == ["model.embed_tokens", "model.layers.0", "model.layers.1"]
    experts, layer = 8 * 3 * 256 * 896 * 4, parts_of(mixtral)[1].cost
    assert layer.num_bytes > experts
    assert layer.read_per_token == experts / 4, "two of eight"
    assert layer.read_always == layer.num_bytes - experts


@pytest.mark.parametrize("tokens", [1, 12])
def test_operations_are_those_of_the_experts_that_a_token_is_given_to(mixtral: Any, tokens: int) -> None:
    estimated, counted = parts_of(mixtral, no_split=[]), parts_of(mixtral, no_split=[])
    batch = {"input_ids": torch.zeros(1, tokens, dtype=torch.long)}
    assert count_operations(counted, mixtral, batch) == tokens
    wanted = [part.cost.flops for part in _experts(counted)]
    assert [part.cost.flops for part in _experts(estimated)] == wanted
    assert wanted == [2 * 2 * 3 * 256 * 896] * 2


def test_memory_goes_to_what_every_token_needs(mixtral: Any) -> None:
    parts = parts_of(mixtral, no_split=[])
    experts = _experts(parts)
    limit = sum(part.cost.num_bytes for part in parts) - sum(part.cost.num_bytes for part in experts) + 10_000
    plan = plan_placement(parts, {"cpu": limit}, MACHINE)
    assert {part.name for part, place in zip(parts, plan.places, strict=True) if place == "disk"} == {
        part.name for part in experts
    }


def test_experts_that_are_modules_are_weighed_alike() -> None:
    model = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(4))})
    layers = nn.Sequential(nn.Linear(8, 8, bias=False), model)
    layers.config = SimpleNamespace(num_experts=4, num_experts_per_tok=1)  # type: ignore[assignment]
    first, *others = (part.cost for part in parts_of(layers))
    assert (first.flops, first.read_always, first.read_per_token) == (128, 256, 0)
    assert {(cost.flops, cost.read_always, cost.read_per_token) for cost in others} == {(32, 0, 64)}
