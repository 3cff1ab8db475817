"""What stands between backward and step: evaluations, clipping, batches left out; the numbers of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.nn.functional import mse_loss

from nbaccel import FSDP, DeepSpeed, TensorParallel
from nbaccel.core import Accelerator
from tests.conftest import needs

pytestmark = pytest.mark.timeout(300)

Told = dict[str, torch.Tensor]
SHARDED = {
    "full shard": FSDP(wrap="Sequential"),
    "grad op": FSDP(sharding="shard_grad_op", wrap="Sequential"),
}
ZERO = {f"zero-{stage}": DeepSpeed(stage=stage) for stage in (1, 2, 3)}
DIVIDED = {"divided": TensorParallel(plan={"body.*.0": "column", "body.*.2": "row"})}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(8, 16)
        self.body = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)) for _ in range(2)
        )
        self.leave = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for layer in self.body:
            x = x + layer(x)
        out: torch.Tensor = self.leave(x)
        return out


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 8, generator=generator), torch.randn(8, 4, generator=generator)


def steps(strategy: Any, between: Callable[[Any, Any, Any], Any], steps: int = 3) -> tuple[Told, list[float]]:
    """The weights after some steps, and what `between(acc, model, optimizer)` gave; False leaves the step out."""
    acc = Accelerator(cpu=True, strategy=strategy)
    torch.manual_seed(0)
    net: Any = Net()
    before = list(net.parameters())
    model, optimizer = acc.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    axis = acc.strategy.data_axis
    inputs, targets = (one.chunk(axis.size)[axis.rank] for one in data())
    found = []
    for _ in range(steps):
        acc.backward(mse_loss(model(inputs), targets))
        found.append(float(between(acc, model, before)))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            found.append(float(acc.reduce(mse_loss(model(inputs), targets), "mean")))
    return acc.get_state_dict(model), found


def evaluates(acc: Any, model: Any, before: list[nn.Parameter]) -> float:
    with torch.no_grad():
        model(data()[0])
    return 0.0


def evaluates_and_clips(acc: Any, model: Any, before: list[nn.Parameter]) -> Any:
    evaluates(acc, model, before)
    return acc.clip_grad_norm_(list(model.parameters()), 0.5)


def looks_with_gradients_and_clips(acc: Any, model: Any, before: list[nn.Parameter]) -> Any:
    model(data()[0])
    return acc.clip_grad_norm_(model.parameters(), 0.5)


def clips_what_was_listed_before(acc: Any, model: Any, before: list[nn.Parameter]) -> Any:
    return acc.clip_grad_norm_(before, 0.5)


def clips_values(acc: Any, model: Any, before: list[nn.Parameter]) -> float:
    acc.clip_grad_value_(before, 0.05)
    return 0.0


WAYS = (
    evaluates,
    evaluates_and_clips,
    looks_with_gradients_and_clips,
    clips_what_was_listed_before,
    clips_values,
)


def every_way(strategies: dict[str, Any]) -> dict[str, dict[str, tuple[Told, list[float]]]]:
    return {
        name: {way.__name__: steps(strategy, way) for way in WAYS} for name, strategy in strategies.items()
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[Told, list[float]]]:
    return run_ranks(every_way, {"single": "single"}, num_processes=1)[0]["single"]


def check(strategies: dict[str, Any], alone: dict[str, tuple[Told, list[float]]]) -> None:
    for told in run_ranks(every_way, strategies):
        for name, ways in told.items():
            for way, (weights, found) in ways.items():
                assert found == pytest.approx(alone[way][1], abs=2e-5), (name, way)
                for key, weight in alone[way][0].items():
                    assert (weights[key] - weight).abs().max() <= 2e-5, (name, way, key)


def test_steps_when_sharded_or_divided_are_those_of_one_process_whatever_was_between(alone: Any) -> None:
    check({**SHARDED, **DIVIDED}, alone)


@needs("deepspeed")
def test_steps_under_zero_are_those_of_one_process_whatever_was_between(alone: Any) -> None:
    check(ZERO, alone)


def norms_without_steps(strategies: list[Any]) -> list[list[float]]:
    """Norms where every batch is left out."""
    found = []
    for strategy in strategies:
        acc = Accelerator(cpu=True, strategy=strategy)
        torch.manual_seed(0)
        net: Any = Net()
        model, optimizer = acc.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
        found.append([])
        for _ in range(3):
            acc.backward(mse_loss(model(data()[0]), data()[1]))
            found[-1].append(float(acc.clip_grad_norm_(model.parameters(), 0.5)))
            optimizer.zero_grad()
    return found


@needs("deepspeed")
def test_gradients_under_zero_when_dropped_without_a_step_are_gone() -> None:
    ((alone,),) = run_ranks(norms_without_steps, ["single"], num_processes=1)
    for told in run_ranks(norms_without_steps, list(ZERO.values())):
        for found in told:
            assert found == pytest.approx(alone, abs=2e-5)


class Turns(nn.Module):
    """Its parts are used in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(8, 4) for _ in range(2))
        self.turn = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.parts[self.turn](x)
        return out


def in_turns(strategies: list[Any]) -> list[Told]:
    found = []
    for strategy in strategies:
        acc = Accelerator(cpu=True, strategy=strategy)
        torch.manual_seed(0)
        net = Turns()
        model, optimizer = acc.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
        for step in range(4):
            net.turn = step % 2
            acc.backward(mse_loss(model(data()[0]), data()[1]))
            optimizer.step()
            optimizer.zero_grad()
        found.append(acc.get_state_dict(model))
    return found


@needs("deepspeed")
def test_parameters_under_zero_when_not_used_in_a_step_are_not_stepped_by_old_gradients() -> None:
    ((alone,),) = run_ranks(in_turns, ["single"], num_processes=1)
    offloaded = [DeepSpeed(stage=stage, offload_optimizer="cpu") for stage in (2, 3)]
    for told in run_ranks(in_turns, [*ZERO.values(), *offloaded]):
        for found in told:
            for name, weight in alone.items():
                assert (found[name] - weight).abs().max() <= 2e-5, name
