from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel

from nbaccel.core.checkpoint import ModelState, OptimizerState
from nbaccel.core.checkpoint.contents import Saved
from nbaccel.core.world import join
from nbaccel.errors import CheckpointError


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 2)))


def saved(state: ModelState | OptimizerState) -> Saved:
    entries = state.entries()
    return Saved(
        shapes={name: tensor.shape for name, tensor in entries.tensors.items()},
        dtypes={name: tensor.dtype for name, tensor in entries.tensors.items()},
        plain=entries.plain,
    )


def transfer(source: OptimizerState, target: OptimizerState) -> None:
    wanted = saved(source)
    targets = target.targets(wanted)
    with torch.no_grad():
        for name, tensor in targets.items():
            tensor.copy_(source.entries().tensors[name])
    target.finish(targets, wanted)


def names_beside_torch(compiled: bool) -> tuple[bool, bool]:
    world = join()
    model: Any = net()
    model = torch.compile(model, backend="eager") if compiled else model
    model = DistributedDataParallel(model) if world.size > 1 else model
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    ours = set(ModelState(model).entries().tensors)
    theirs = set(get_model_state_dict(model))
    states = set(OptimizerState(optimizer, [model]).entries().tensors)
    groups = get_optimizer_state_dict(model, optimizer)["state"]
    return ours == theirs, states == {f"state.{fqn}.{key}" for fqn, value in groups.items() for key in value}


@pytest.mark.parametrize("compiled", [False, True])
def test_names_are_those_of_torch_whatever_wraps_the_model(compiled: bool) -> None:
    assert run_ranks(names_beside_torch, compiled, num_processes=2) == [(True, True)] * 2


def test_buffers_are_rank_zeros_and_parameters_are_anyones() -> None:
    entries = ModelState(net()).entries()
    assert set(entries.of_rank_zero) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def stepped(*groups: dict[str, Any], kind: type[torch.optim.Optimizer] = torch.optim.AdamW) -> Any:
    optimizer = kind(list(groups))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def test_parameter_groups_come_back_with_their_options() -> None:
    a, b = net(), net()
    source = stepped(
        {"params": a[0].parameters(), "lr": 0.1}, {"params": a[2].parameters(), "betas": (0.5, 0.6)}
    )
    target = torch.optim.AdamW([{"params": b[0].parameters()}, {"params": b[2].parameters()}])
    transfer(OptimizerState(source, [a]), OptimizerState(target, [b]))
    assert target.param_groups[0]["lr"] == 0.1
    assert target.param_groups[1]["betas"] == (0.5, 0.6)
    ours, theirs = target.state_dict()["state"], source.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[i][key], theirs[i][key]) for i in ours for key in ours[i])


def test_parameters_in_another_order_get_their_own_state() -> None:
    a, b = net(), net()
    source = stepped({"params": list(a[0].parameters())})
    source.state[a[0].bias]["exp_avg"].fill_(7)
    target = torch.optim.AdamW(reversed(list(b[0].parameters())))
    transfer(OptimizerState(source, [a]), OptimizerState(target, [b]))
    assert target.state[b[0].bias]["exp_avg"].tolist() == [7.0] * 4


def test_unused_parameter_without_state_is_no_error() -> None:
    a, b = net(), net()
    source = torch.optim.Adam(a.parameters())
    a[0](torch.ones(1, 3)).sum().backward()
    source.step()
    target = stepped({"params": b.parameters()}, kind=torch.optim.Adam)
    transfer(OptimizerState(source, [a]), OptimizerState(target, [b]))
    assert {p is b[0].weight or p is b[0].bias for p in target.state} == {True}


def test_optimizer_over_two_models_and_a_loose_parameter() -> None:
    a, b, loose = net(), net(), nn.Parameter(torch.ones(2))
    source = stepped({"params": [*a.parameters(), *b.parameters(), loose]})
    names = set(OptimizerState(source, [a, b]).entries().tensors)
    assert {"state.0.0.weight.exp_avg", "state.1.0.weight.exp_avg"} <= names
    assert any(name.startswith("state.unnamed.0.") for name in names)


def test_another_models_optimizer_is_refused_by_names() -> None:
    a = net()
    wanted = saved(OptimizerState(stepped({"params": a.parameters()}), [a]))
    b = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(CheckpointError, match=r"only in the checkpoint: 1\.bias, 1\.weight, 2\.0\.bias"):
        OptimizerState(torch.optim.AdamW(b.parameters()), [b]).targets(wanted)
    c = net()
    split = torch.optim.AdamW([{"params": c[:2].parameters()}, {"params": c[2].parameters()}])
    with pytest.raises(CheckpointError, match="has 2 parameter group"):
        OptimizerState(split, [c]).targets(wanted)


class WithExtra(nn.Module):
    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls
        self.weight = nn.Parameter(torch.zeros(2))

    def get_extra_state(self) -> Any:
        return {"calls": self.calls}

    def set_extra_state(self, state: Any) -> None:
        self.calls = state["calls"]


def test_extra_state_of_a_module_comes_back() -> None:
    wanted = saved(ModelState(nn.Sequential(WithExtra(5))))
    other = nn.Sequential(WithExtra(0))
    state = ModelState(other)
    state.finish(state.targets(wanted), wanted)
    assert other[0].calls == 5
