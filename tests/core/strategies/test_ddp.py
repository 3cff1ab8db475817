"""DDP where torch's own goes wrong without a word, or with one that says little: the numbers are one process's."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from nbaccel import DDPOptions
from nbaccel.core import Accelerator

pytestmark = pytest.mark.timeout(300)

WAYS = ("once more", "once more in a window", "kept for nothing", "towers", "a part once more", "adversary")


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(x), self.right(x)


def kept(way: str) -> list[Tensor]:
    """The weights after three windows whose backwards keep their graphs."""
    length = 2 if way in ("once more in a window", "kept for nothing") else 1
    options = DDPOptions(find_unused_parameters=way == "a part once more")
    acc = Accelerator(cpu=True, ddp=options, gradient_accumulation_steps=length)
    torch.manual_seed(7)
    model, critic = Towers(), nn.Linear(4, 1)
    optimizer = torch.optim.SGD([*model.parameters(), *critic.parameters()], lr=0.1, momentum=0.9)
    model, critic, optimizer = acc.prepare(model, critic, optimizer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3 * length):
        batch = torch.randn(4, 3, generator=generator)[acc.process_index :: acc.num_processes]
        with acc.accumulate(model, critic):
            left, right = model(batch)
            both = (left * right).square().mean() + critic(left).exp().mean()
            acc.backward(left.square().mean() if way == "towers" else both, retain_graph=True)
            if way == "towers":
                acc.backward(right.exp().mean() + critic(right).mean())
            elif way == "a part once more":
                acc.backward(right.exp().mean())
            elif way == "adversary":  # through one model again, and through the other anew
                acc.backward(critic(left + right).square().mean())
            elif way != "kept for nothing":
                acc.backward((left + right + critic(left)).exp().mean())
            optimizer.step()
            optimizer.zero_grad()
    return [*acc.get_state_dict(model).values(), *acc.get_state_dict(critic).values()]


def of_all() -> dict[str, list[Tensor]]:
    return {way: kept(way) for way in WAYS}


@pytest.mark.filterwarnings("ignore:find_unused_parameters=True was specified")
def test_backwards_when_several_go_through_one_forward_are_all_averaged() -> None:
    (alone,) = run_ranks(of_all, num_processes=1)
    for found in run_ranks(of_all):
        for way in WAYS:
            torch.testing.assert_close({way: found[way]}, {way: alone[way]}, atol=1e-5, rtol=1e-5)


def shared() -> list[Tensor]:
    """An actor and a critic on one encoder, stepped in one backward and in two."""
    acc = Accelerator(cpu=True)
    torch.manual_seed(7)
    encoder = nn.Linear(3, 5)
    actor, critic = nn.Sequential(encoder, nn.Linear(5, 2)), nn.Sequential(encoder, nn.Linear(5, 1))
    optimizer = torch.optim.SGD([*actor.parameters(), *critic[1].parameters()], lr=0.1)
    actor, critic, optimizer = acc.prepare(actor, critic, optimizer)
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        batch = torch.randn(4, 3, generator=generator)[acc.process_index :: acc.num_processes]
        if step % 2:
            acc.backward(actor(batch).square().mean() + critic(batch).exp().mean())
        else:
            acc.backward(actor(batch).square().mean())
            acc.backward(critic(batch).exp().mean())
        optimizer.step()
        optimizer.zero_grad()
    return [*acc.get_state_dict(actor).values(), *acc.get_state_dict(critic).values()]


def test_models_when_they_share_a_module_train_as_in_one_process() -> None:
    (alone,) = run_ranks(shared, num_processes=1)
    for found in run_ranks(shared):
        torch.testing.assert_close(found, alone, atol=1e-6, rtol=1e-5)
