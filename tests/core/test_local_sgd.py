"""LocalSGD on two ranks: the numbers of a calculation by hand; saves and stops at the same step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks

from nbaccel.errors import ConfigError

RATE = 0.1


def inputs(rank: int, step: int) -> float:
    return 1.0 + rank + 0.5 * step


def by_hand(every: int, steps: int) -> list[list[float]]:
    """Two ranks' weight after each step; loss = weight * x, so that the gradient is x."""
    weights, path = [2.0, 2.0], []
    for step in range(steps):
        weights = [w - RATE * inputs(rank, step) for rank, w in enumerate(weights)]
        if (step + 1) % every == 0:
            weights = [sum(weights) / 2] * 2
        path.append(weights)
    return [*path, [sum(weights) / 2] * 2]


def train(every: int, accumulation: int, steps: int = 5) -> list[float]:
    """The weight after each optimizer step, and after the block."""
    from nbaccel import Accelerator, LocalSGD

    acc = Accelerator(cpu=True, gradient_accumulation_steps=accumulation, verify=True)
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 2.0)
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE))
    path = []
    with LocalSGD(acc, model, every) as local:
        for step in range(steps):
            for _ in range(accumulation):
                with acc.accumulate(model):
                    loss = model(torch.full((1, 1), inputs(acc.process_index, step))).sum()
                    acc.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                    local.step()
            path.append(acc.unwrap_model(model).weight.item())
    return [*path, acc.unwrap_model(model).weight.item()]


def both() -> list[list[float]]:
    return [train(2, 1), train(2, 3), train(1, 1), train(99, 1)]


def test_weights_when_averaged_every_other_step_are_those_by_hand() -> None:
    ranks = run_ranks(both)
    for case, every in enumerate((2, 2, 1, 99)):
        expected = by_hand(every, 5)
        for rank in range(2):
            assert ranks[rank][case] == pytest.approx([pair[rank] for pair in expected], abs=1e-5)
    # with one step from average to average, plain SGD is that of averaged gradients
    synchronous = 2.0 - RATE * sum(inputs(0, s) + inputs(1, s) for s in range(5)) / 2
    assert ranks[0][2][-1] == pytest.approx(synchronous, abs=1e-5)
    # and ranks were apart where no average was due
    assert ranks[0][0][0] != ranks[1][0][0]


def interrupted(folder: str, load: str | None) -> dict[str, Any]:
    """AdamW on data of the rank's own; saved in the middle of an interval, and stopped by its time."""
    from nbaccel import Accelerator, LocalSGD

    acc = Accelerator(cpu=True, project_dir=folder, stop_after="1s" if load == "stop" else None)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    model, optimizer = acc.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    if load and load != "stop":
        acc.load_state(load)
    generator = torch.Generator().manual_seed(acc.process_index)
    batches = [torch.randn(4, 3, generator=generator) for _ in range(12)]
    with LocalSGD(acc, model, 4) as local:
        while not acc.should_stop and (acc.steps < 12 or load == "stop"):
            acc.backward(model(batches[acc.steps % 12]).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            local.step()
            if acc.steps == 6 and load is None:
                acc.save_state(f"{folder}/six")
    return {
        "steps": acc.steps,
        "weights": acc.unwrap_model(model).weight.flatten().tolist(),
        "moments": [
            v.flatten().tolist() for s in optimizer.state.values() for k, v in s.items() if k != "step"
        ],
    }


def whole_and_resumed(folder: str) -> list[dict[str, Any]]:
    return [interrupted(folder, None), interrupted(folder, f"{folder}/six"), interrupted(folder, "stop")]


def test_checkpoint_when_saved_between_averages_goes_on_as_if_never_interrupted(tmp_path: Any) -> None:
    ranks = run_ranks(whole_and_resumed, str(tmp_path))
    for whole, resumed, stopped in ranks:
        assert (whole["steps"], resumed["steps"]) == (12, 12)
        assert resumed["weights"] == whole["weights"] == ranks[0][0]["weights"]
        assert resumed["moments"] == whole["moments"]
        assert stopped["steps"] == ranks[0][2]["steps"] > 12
    # each rank's own moments: nothing was averaged but for the save
    assert ranks[0][0]["moments"] != ranks[1][0]["moments"]


def refusals() -> list[str]:
    from nbaccel import Accelerator, LocalSGD

    said = []
    for options, every in (({"strategy": "fsdp"}, 2), ({"mixed_precision": "fp16"}, 2), ({}, 0)):
        acc = Accelerator(cpu=True, **options)
        with pytest.raises(ConfigError) as caught:
            LocalSGD(acc, torch.nn.Linear(1, 1), every)
        said.append(str(caught.value))
    return said


def test_local_sgd_when_ranks_cannot_train_apart_is_refused() -> None:
    for said in run_ranks(refusals):
        assert "strategy 'fsdp'" in said[0]
        assert "'ddp'" in said[0]
        assert "'bf16'" in said[1]
        assert "at least 1" in said[2]


def test_local_sgd_when_alone_or_off_changes_nothing() -> None:
    from nbaccel import Accelerator, LocalSGD

    acc = Accelerator(cpu=True)
    model = acc.prepare(torch.nn.Linear(1, 1))
    with LocalSGD(acc, model, 2) as alone, LocalSGD(acc, model, 2, enabled=False) as off:
        alone.step()
        off.step()
    assert not acc.strategy.apart
