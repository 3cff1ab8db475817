"""Loops that accumulate by themselves and divide by what all ranks hold, as causal language models' do by tokens."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nbaccel.compat.accelerate as compat
from nbaccel.errors import ConfigError
from tests.core.ranks import run_ranks

SAMPLES, WINDOW, RANKS = 27, 3, 2
"""At 2 samples a batch the last global batch has 3 of 4: two on one rank and one on the other."""


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of 6 with one to six tokens that count; the labels of the others are -100."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 6, 4, generator=draws)
    y = torch.randint(0, 2, (SAMPLES, 6), generator=draws)
    tokens = torch.randint(1, 7, (SAMPLES, 1), generator=draws)
    return x, y.masked_fill(torch.arange(6) >= tokens, -100)


def make_training() -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
    torch.manual_seed(1)
    model = nn.Linear(4, 2)
    loader = DataLoader(TensorDataset(*samples()), batch_size=2)
    return model, torch.optim.SGD(model.parameters(), lr=0.5), loader


def loss_sum(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")


def count(y: torch.Tensor) -> torch.Tensor:
    return y.ne(-100).sum()


def weights(model: nn.Module) -> list[float]:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def by_hand(**options: Any) -> list[float]:
    """accelerate's example for autoregressive models, without its gradient_accumulation_steps."""
    acc = compat.Accelerator(
        cpu=True, dataloader_config=compat.DataLoaderConfiguration(even_batches=False), **options
    )
    model, optimizer, loader = acc.prepare(*make_training())
    batches = iter(loader)
    for at in range(0, len(loader), WINDOW):
        window = [next(batches) for _ in range(min(WINDOW, len(loader) - at))]
        tokens = acc.gather(torch.stack([count(y) for _, y in window]).sum()).sum()
        for left, (x, y) in zip(reversed(range(len(window))), window, strict=True):
            with model.no_sync() if left else nullcontext():
                acc.backward(loss_sum(model, x, y) * acc.num_processes / tokens)
        optimizer.step()
        optimizer.zero_grad()
    return weights(acc.unwrap_model(model))


def by_weight() -> list[float]:
    """The same, divided by nbaccel."""
    acc = compat.Accelerator(
        cpu=True,
        gradient_accumulation_steps=WINDOW,
        dataloader_config=compat.DataLoaderConfiguration(even_batches=False),
    )
    model, optimizer, loader = acc.prepare(*make_training())
    for x, y in loader:
        with acc.accumulate(model):
            acc.backward(loss_sum(model, x, y), weight=count(y))
            optimizer.step()
            optimizer.zero_grad()
    return weights(acc.unwrap_model(model))


def both() -> list[list[float]]:
    return [by_hand(loss_weighting="equal"), by_weight()]


def test_gradient_when_the_last_batch_is_uneven_is_that_of_the_mean_over_tokens() -> None:
    model, optimizer, _ = make_training()
    size = 2 * RANKS * WINDOW
    for x, y in zip(*(one.split(size) for one in samples()), strict=True):
        (loss_sum(model, x, y) / count(y)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for ours in run_ranks(both, num_processes=RANKS):
        assert ours == [pytest.approx(weights(model), abs=1e-6)] * 2


def test_loop_of_its_own_under_an_asked_accumulation_is_told_what_to_leave_out() -> None:
    acc = compat.Accelerator(cpu=True, gradient_accumulation_steps=WINDOW)
    model, optimizer, loader = acc.prepare(*make_training())
    for x, y in list(loader)[:WINDOW]:
        acc.backward(loss_sum(model, x, y) * WINDOW / count(y))
    with pytest.raises(ConfigError, match="with no_sync and a division of its own, leaves gradient_accum"):
        optimizer.step()
