"""What learns changes within a pass: layers are unfrozen, a critic is switched off and on, an adapter is put in."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nbaccel import FSDP
from nbaccel.core import Accelerator

SAMPLES = 24


def _data():
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(SAMPLES, 3, generator=generator))


def _net(*sizes):
    torch.manual_seed(4)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))


def _unfrozen(options, accumulation, early):
    """The first layer learns from the third micro-step on: said before its forward, or after the one before."""
    acc = Accelerator(cpu=True, gradient_accumulation_steps=accumulation, **options)
    model = _net(3, 2, 1)
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = acc.prepare(
        model, optimizer, DataLoader(_data(), batch_size=4 // acc.num_processes)
    )
    for number, (x,) in enumerate(loader):
        if early and number == 2:
            acc.unwrap_model(model).requires_grad_(True)
        with acc.accumulate(model):
            acc.step(model(x).square().mean(), optimizer)
        if not early and number == 1:
            acc.unwrap_model(model).requires_grad_(True)
        if acc.strategy.replicates:
            with torch.no_grad():
                assert torch.equal(copy.deepcopy(model)(x), model(x))
    return _weights(acc, model)


def _adversaries():
    """The one trains while the other is switched off, and so it is when the next pass begins."""
    acc = Accelerator(cpu=True)
    maker, critic = _net(3, 3), _net(3, 1)
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (maker, critic)]
    maker, critic, *optimizers, loader = acc.prepare(
        maker, critic, *optimizers, DataLoader(_data(), batch_size=4 // acc.num_processes)
    )
    for _ in range(2):
        for (x,) in loader:
            made = maker(x)
            critic.requires_grad_(True)
            acc.step((critic(x) - critic(made.detach())).tanh().mean(), optimizers[1])
            critic.requires_grad_(False)
            acc.step(critic(made).mean(), optimizers[0])
    return {
        f"{number} {name}": tensor
        for number, model in enumerate((maker, critic))
        for name, tensor in _weights(acc, model).items()
    }


def _adapted():
    """A layer more, which the optimizer gets in the middle of a pass."""
    acc = Accelerator(cpu=True)
    model = _net(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = acc.prepare(
        model, optimizer, DataLoader(_data(), batch_size=4 // acc.num_processes)
    )
    for number, (x,) in enumerate(loader):
        if number == 2:
            layer = _net(1, 1)
            acc.unwrap_model(model).append(layer)
            optimizer.add_param_group({"params": list(layer.parameters()), "lr": 0.2})
        acc.step(model(x).square().mean(), optimizer)
    return _weights(acc, model)


def _weights(acc, model):
    return {name: tensor.clone() for name, tensor in acc.get_state_dict(model).items()}


WAYS = {
    "before the forward": lambda: _unfrozen({}, 1, True),
    "after the step": lambda: _unfrozen({}, 1, False),
    "before a window's last forward": lambda: _unfrozen({}, 3, True),
    "sharded": lambda: _unfrozen({"strategy": FSDP()}, 1, True),
    "adversaries": _adversaries,
    "an adapter": _adapted,
}


def _alone():
    return {name: way() for name, way in WAYS.items() if name != "sharded"}


def _together():
    return {name: way() for name, way in WAYS.items()}


@pytest.fixture(scope="module")
def expected():
    (found,) = run_ranks(_alone, num_processes=1)
    return found | {"sharded": found["before the forward"]}


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(_together)


@pytest.mark.parametrize("way", WAYS)
def test_training_when_what_learns_changes_within_a_pass_equals_one_process(way, expected, ranks):
    for told in ranks:
        assert told[way].keys() == expected[way].keys()
        for name, weight in expected[way].items():
            assert (told[way][name] - weight).abs().max() <= 1e-6, name
