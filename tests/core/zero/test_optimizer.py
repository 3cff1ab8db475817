"""Optimizer state under ZeRO where parameters have learned for different times, or not at all."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

from nbaccel import DeepSpeed
from nbaccel.errors import ConfigError
from tests.conftest import needs

pytestmark = [pytest.mark.timeout(300), needs("deepspeed")]
SAVED, STEPS, LATE = 3, 6, 2
ONE_FLAT = {"zero_optimization": {"sub_group_size": 10**9}}
"""Stage 3 would put so small a model into several sub-groups, each with a count of its own."""


class Parts(nn.Module):
    """One part begins to learn late."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = nn.Linear(6, 5), nn.Linear(5, 6)
        self.scale = nn.Parameter(torch.tensor([0.5]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.late(torch.tanh(self.early(x)))


@dataclass(kw_only=True)
class Seen:
    losses: list[float] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    """Of steps, of each tensor that the optimizer steps, after loading."""
    weights: dict[str, list[float]] = field(default_factory=dict)


def train(strategy: Any, groups: bool, *, save: str | None = None, load: str | None = None) -> Seen:
    """Six steps, `late` frozen in the first two; or those after a checkpoint, where it is not."""
    from nbaccel.core import Accelerator

    acc = Accelerator(cpu=True, strategy=strategy)
    torch.manual_seed(2)
    model: Any = Parts()
    optimizer: Any = torch.optim.AdamW(
        [
            {"params": [*model.early.parameters(), model.scale]},
            {"params": model.late.parameters(), "lr": 0.02},
        ]
        if groups
        else model.parameters(),
        lr=0.01,
    )
    inputs = torch.randn(STEPS, 8, 6, generator=torch.Generator().manual_seed(4))
    model, optimizer = acc.prepare(model, optimizer)
    seen = Seen()
    if load:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            acc.load_state(load)
        seen.warned = [str(one.message) for one in said if "optimizer steps" in str(one.message)]
        seen.counts = [int(state["step"]) for state in optimizer.state.values()]
    for step in range(SAVED if load else 0, STEPS):
        acc.unwrap_model(model).late.requires_grad_(step >= LATE)
        if save and step == SAVED:
            acc.save_state(save)
        batch = inputs[step][acc.process_index :: acc.num_processes]
        loss = model(batch).square().mean()
        acc.step(loss, optimizer)
        seen.losses.append(acc.reduce(loss.detach(), "mean").item())
    seen.weights = {name: value.flatten().tolist() for name, value in acc.get_state_dict(model).items()}
    return seen


def of_both_stages(folders: dict[bool, str]) -> dict[tuple[int, bool], Seen]:
    return {
        (stage, groups): train(
            DeepSpeed(stage=stage, config=ONE_FLAT if stage == 3 else None), groups, load=folder
        )
        for stage in (2, 3)
        for groups, folder in folders.items()
    }


def alone(folders: dict[bool, str]) -> dict[bool, Seen]:
    return {groups: train("single", groups, save=folder) for groups, folder in folders.items()}


def test_counts_of_steps_when_they_differ_are_kept_by_group_and_said_to_be_lost_within_one(tmp_path) -> None:
    folders = {groups: str(tmp_path / str(groups)) for groups in (True, False)}
    (expected,) = run_ranks(alone, folders, num_processes=1)
    for rank, found in enumerate(run_ranks(of_both_stages, folders)):
        for stage in (2, 3):
            exact, mixed = found[stage, True], found[stage, False]
            assert exact.losses == pytest.approx(expected[True].losses[SAVED:], abs=1e-6)
            for name, value in expected[True].weights.items():
                assert exact.weights[name] == pytest.approx(value, abs=1e-6), (stage, name)
            assert exact.counts == [SAVED, SAVED - LATE]
            assert exact.warned == []
            assert mixed.counts == [SAVED - LATE]
            assert len(mixed.warned) == (rank == 0)
            if rank == 0:
                assert (
                    "from 1 (late.weight, late.bias) to 3 (scale, early.weight, early.bias)"
                    in mixed.warned[0]
                )


def frozen(folder: str) -> dict[str, Any]:
    """Trains with parameters in the optimizer that do not learn; saves, and goes on from there under another stage.
    Also from before the first step, with moments there meanwhile."""
    from nbaccel.core import Accelerator

    found: dict[str, Any] = {}
    for number, (stage, load) in enumerate(((2, None), (3, "0"), (2, "1"))):
        acc = Accelerator(cpu=True, strategy=DeepSpeed(stage=stage))
        torch.manual_seed(2)
        model: Any = Parts()
        for one in (model.late.weight, model.early.bias):
            one.requires_grad_(False)
        before = model.late.weight.detach().clone()
        groups = [{"params": [*model.early.parameters(), model.scale]}, {"params": model.late.parameters()}]
        model, optimizer = acc.prepare(model, torch.optim.AdamW(groups, lr=0.01))
        if load:
            acc.load_state(f"{folder}/{load}")
        else:
            acc.save_state(f"{folder}/begin")
            acc.step(model(torch.ones(2, 6)).square().mean(), optimizer)
            once = acc.get_state_dict(model)
            acc.load_state(f"{folder}/begin")
        acc.step(model(torch.ones(2, 6)).square().mean(), optimizer)
        state = acc.get_state_dict(model)
        if not load:
            found["begins again"] = all(torch.equal(state[name], value) for name, value in once.items())
        acc.save_state(f"{folder}/{number}")
        found["still"] = torch.equal(state["late.weight"], before)
        found["steps"] = acc.steps
    return found


def test_parameters_when_they_do_not_learn_are_saved_and_loaded_without_moments(tmp_path) -> None:
    for found in run_ranks(frozen, str(tmp_path)):
        assert found == {"begins again": True, "still": True, "steps": 3}


def refused() -> list[str]:
    from nbaccel.core import Accelerator

    found = []
    for kind in ("number", "group"):
        model = Parts()
        if kind == "number":
            model.scale = nn.Parameter(torch.tensor(0.5))
        model.late.requires_grad_(kind != "group")
        groups = [{"params": [*model.early.parameters(), model.scale]}, {"params": model.late.parameters()}]
        with pytest.raises(ConfigError) as caught:
            Accelerator(cpu=True, strategy=DeepSpeed(stage=2)).prepare(model, torch.optim.AdamW(groups))
        found.append(str(caught.value))
    return found


def test_parameters_when_deepspeed_would_fail_over_them_are_refused_by_name() -> None:
    for number, group in run_ranks(refused):
        assert "scale is a parameter without a dimension" in number
        assert "nothing in group 1 of the optimizer learns" in group
