"""Several backwards before a step: their gradients add up, wherever ZeRO keeps them."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from torch import nn

from nbaccel import DeepSpeed
from tests.conftest import needs

pytestmark = [pytest.mark.timeout(300), needs("deepspeed")]

WAYS = ("one forward", "two forwards", "by hand", "in a window", "branches in turn")
WINDOWS = WAYS[3:]


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 5), nn.Linear(3, 5)
        self.head = nn.Linear(5, 1)

    def forward(self, x: torch.Tensor, only: str = "") -> torch.Tensor:
        branches = [getattr(self, only)] if only else [self.left, self.right]
        return self.head(torch.tanh(sum(branch(x) for branch in branches)))


def trained(
    strategies: list[object], precision: str = "no", ways: tuple[str, ...] = WAYS
) -> list[dict[str, list[float]]]:
    """The norms and weights after two steps in each of the ways, under each strategy."""
    from nbaccel.core import Accelerator

    found = []
    for strategy in strategies:
        values: dict[str, list[float]] = {}
        for way in ways:
            length = 2 if way in WINDOWS else 1
            acc = Accelerator(
                cpu=True, strategy=strategy, gradient_accumulation_steps=length, mixed_precision=precision
            )
            torch.manual_seed(7)
            model = Branches()
            model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
            generator = torch.Generator().manual_seed(1)
            norms = []
            for micro in range(2 * (2 if way in ("by hand", *WINDOWS) else 1)):
                batch = torch.randn(4, 3, generator=generator)[acc.process_index :: acc.num_processes]
                with acc.accumulate(model):
                    backwards(acc, model, batch, way, micro)
                    if way == "by hand" and micro % 2 == 0:
                        continue
                    norm = acc.clip_grad_norm_(model.parameters(), 1.0)
                    if norm is not None:
                        norms.append(float(norm))
                    optimizer.step()
                    optimizer.zero_grad()
            values[f"{way}: norms"] = norms
            for name, value in acc.get_state_dict(model).items():
                values[f"{way}: {name}"] = value.float().flatten().tolist()
        found.append(values)
    return found


def backwards(acc, model, batch: torch.Tensor, way: str, micro: int) -> None:
    if way == "by hand":
        acc.backward(model(batch).square().mean())
    elif way == "one forward":
        output = model(batch)
        acc.backward(output.square().mean(), retain_graph=True)
        acc.backward(output.exp().mean())
    elif way == "branches in turn":
        acc.backward(model(batch, ("", "left", "right", "left")[micro]).square().mean())
        acc.backward(2 * torch.ones((), requires_grad=True))  # reaches no parameter
    elif way == "two forwards":
        losses = [model(batch).square().mean(), model(2 * batch).exp().mean()]
        for loss in losses:
            acc.backward(loss)
    else:
        acc.backward(model(batch).square().mean())
        acc.backward(model(2 * batch, "left").exp().mean())


def penalised() -> None:
    """A loss in which a parameter stands beside the model."""
    from nbaccel.core import Accelerator

    acc = Accelerator(cpu=True, strategy=DeepSpeed(stage=3))
    model = nn.Linear(3, 1)
    wrapped, _ = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    acc.backward(wrapped(torch.ones(4, 3)).mean() + model.weight.square().sum())


def under_zero() -> tuple[list[dict[str, list[float]]], list[dict[str, list[float]]], str, str]:
    """In float32; in bf16; and what stage 3 says of the two ways that it does not go."""
    from nbaccel.errors import ConfigError

    asked = [DeepSpeed(stage=1), DeepSpeed(stage=2), DeepSpeed(stage=2, offload_optimizer="cpu")]
    found = trained(asked) + trained([DeepSpeed(stage=1, overlap_comm=True)], ways=WAYS[4:])
    found += trained([DeepSpeed(stage=3), DeepSpeed(stage=3, offload_optimizer="cpu")], ways=WAYS[1:])
    with pytest.raises(ConfigError) as refused:
        trained([DeepSpeed(stage=3)], ways=WAYS[:1])
    with pytest.raises(ConfigError) as outside:
        penalised()
    return found, trained(asked, "bf16", WINDOWS), str(refused.value), str(outside.value)


def test_gradients_when_there_are_several_backwards_before_a_step_add_up() -> None:
    ((alone,),) = run_ranks(trained, ["single"], num_processes=1)
    for rank, (in_float32, in_bf16, said, outside) in enumerate(run_ranks(under_zero)):
        for found, tolerance in [*((one, 1e-5) for one in in_float32), *((one, 0.02) for one in in_bf16)]:
            assert found == {name: pytest.approx(alone[name], abs=tolerance) for name in found}
        assert f"retain_graph=True kept failed on rank {rank}" in said
        assert "backward(first + second)" in said
        assert "outside the model's forward" in outside
        assert f"rank {rank}" in outside
