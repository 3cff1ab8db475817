"""Parameters that the loop changes in place: as in one process in stages 1 and 2; told of in stage 3."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

from nbaccel import DeepSpeed
from nbaccel.errors import ConfigError
from tests.conftest import needs

pytestmark = [pytest.mark.timeout(300), needs("deepspeed")]


def clipped(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.clamp_(-0.2, 0.2)


def begun_anew(model: Any) -> None:
    with torch.no_grad():
        model[2].weight.fill_(0.1)
    nn.init.zeros_(model[2].bias)


def averaged(model: Any) -> None:
    """What averages do that give the parameters other memory."""
    for parameter in model.parameters():
        parameter.data = 0.5 * parameter.data.float()


def given_memory(model: Any) -> None:
    """A whole tensor in place of one that stage 3 holds in parts."""
    weight = model[0].weight
    weight.data = torch.zeros(weight.ds_shape)


def gathered(model: Any) -> Any:
    """Where parameters are in shards: brought together."""
    if not hasattr(model[0].weight, "ds_tensor"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0)


def trained(
    strategy: object, change: Any, *, gathers: bool = False, precision: str = "no", returns: bool = False
) -> dict[str, list[float]]:
    """The weights after three steps, each followed by the change, the last one too; as a launch `returns` them."""
    from nbaccel.core import Accelerator
    from nbaccel.rank.returned import make_whole

    acc = Accelerator(cpu=True, strategy=strategy, mixed_precision=precision)
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    model, optimizer = acc.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        batch = torch.randn(4, 5, generator=generator)[acc.process_index :: acc.num_processes]
        acc.backward(model(batch).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        inner = acc.unwrap_model(model)
        with gathered(inner) if gathers else contextlib.nullcontext():
            change(inner)
    if returns:
        make_whole(inner, keep=True)
    state = inner.state_dict() if returns else acc.get_state_dict(model)
    return {name: value.float().flatten().tolist() for name, value in state.items()}


CHANGES = (clipped, begun_anew, averaged)


def each(strategy: object, gathers: bool = False) -> list[dict[str, list[float]]]:
    return [trained(strategy, change, gathers=gathers) for change in CHANGES]


def under_zero() -> tuple[list[Any], dict[str, list[float]], list[str]]:
    asked = [DeepSpeed(stage=1), DeepSpeed(stage=2, offload_optimizer="cpu")]
    found = [each(strategy) for strategy in asked]
    sharded = DeepSpeed(stage=3, param_persistence_threshold=7)
    found.append([trained(sharded, change, gathers=True) for change in CHANGES[:2]])
    found += [[trained(one, clipped, gathers=True, returns=True)] for one in (asked[0], sharded)]
    said = []
    for change in (*CHANGES[:2], given_memory):
        with pytest.raises(ConfigError) as refused:
            trained(sharded, change)
        said.append(str(refused.value))
    return found, trained(DeepSpeed(stage=2), clipped, precision="bf16"), said


def test_parameters_when_changed_in_place_stay_changed_or_are_refused_by_name() -> None:
    (alone,) = run_ranks(each, "single", num_processes=1)
    for rank, (found, in_bf16, said) in enumerate(run_ranks(under_zero)):
        for values in found:
            for one, expected in zip(values, alone, strict=False):
                assert one == {name: pytest.approx(each, abs=1e-5) for name, each in expected.items()}
        assert in_bf16 == {name: pytest.approx(each, abs=0.02) for name, each in alone[0].items()}
        for text, name in zip(said, ("0.bias", "2.weight", "0.weight"), strict=True):
            assert text.startswith(f"{name} was changed in place on rank {rank}")
            assert "GatheredParameters" in text
