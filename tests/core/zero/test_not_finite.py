"""Gradients that are not finite: the norm shows them, and a step that DeepSpeed leaves out is told as such."""

from __future__ import annotations

import math

import pytest
import torch
from ranks import run_ranks
from torch import nn

from nbaccel import DeepSpeed
from tests.conftest import needs

pytestmark = [pytest.mark.timeout(300), needs("deepspeed")]


def told(strategies: list[object], bad: list[float]) -> list[list[tuple[float | None, bool, int, float]]]:
    """The norm, whether the step was skipped, the count of steps and the rate, of three steps under each strategy.

    The second one is spoilt on rank 0.
    """
    from nbaccel.core import Accelerator

    found = []
    for strategy, spoilt in zip(strategies, bad, strict=True):
        acc = Accelerator(cpu=True, strategy=strategy)
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        model, optimizer, schedule = acc.prepare(model, optimizer, schedule)
        steps = []
        for number in range(3):
            spoils = number == 1 and acc.process_index == 0
            acc.backward(model(torch.ones(2, 5)).mean() * (spoilt if spoils else 1.0))
            norm = acc.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            rate = optimizer.param_groups[0]["lr"]
            steps.append((float(norm), acc.optimizer_step_was_skipped, acc.steps, rate))
        weights = acc.get_state_dict(model)
        assert all(value.isfinite().all() for value in weights.values())
        found.append(steps)
    return found


def test_step_when_gradients_are_not_finite_is_told_as_skipped() -> None:
    asked = [DeepSpeed(stage=2), DeepSpeed(stage=3), DeepSpeed(stage=3, offload_optimizer="cpu")]
    for found in run_ranks(told, asked, [math.nan, math.inf, math.nan]):
        for first, spoilt, last in found:
            assert not math.isfinite(spoilt[0])
            assert spoilt[1:] == (True, 1, 0.5)
            assert first[1:] == (False, 1, 0.5)
            assert last == (pytest.approx(first[0]), False, 2, 0.25)
