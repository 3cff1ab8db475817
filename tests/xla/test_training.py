"""Training on one XLA device is training on the CPU; a checkpoint of one is loaded on the other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nbaccel import Accelerator, notebook_launcher

pytestmark = pytest.mark.slow

LEFT_OUT = 24


def train(
    accumulation: int, precision: str | None, folder: str, *, load: bool = False
) -> tuple[nn.Module, str, float, int]:
    """Two epochs; the model, its device, the mean error and the samples it is a mean of."""
    acc = Accelerator(
        gradient_accumulation_steps=accumulation, mixed_precision=precision, project_dir=folder, verify=False
    )
    torch.manual_seed(0)
    tied = nn.Linear(4, 4)
    model: Any = nn.Sequential(tied, nn.Tanh(), tied, nn.Tanh(), nn.Linear(4, 3))
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(
        torch.randn(LEFT_OUT, 4, generator=generator), torch.randn(LEFT_OUT, 3, generator=generator)
    )
    loader: Any = DataLoader(data, batch_size=12 // accumulation)
    scheduler: Any = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10)
    model, optimizer, loader, scheduler = acc.prepare(model, optimizer, loader, scheduler)
    if load:
        acc.load_state(os.path.join(folder, "saved"))
    for _ in range(2):
        for features, wanted in loader:
            with acc.accumulate(model):
                loss = (model(features) - wanted).pow(2).mean()
                acc.backward(loss)
                acc.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    errors = []
    with torch.no_grad():
        for features, wanted in loader:
            errors.append(acc.gather_for_metrics((model(features) - wanted).pow(2).mean(1)).cpu())
    found = torch.cat(errors)
    if not load:
        acc.save_state(os.path.join(folder, "saved"))
    assert acc.unwrap_model(model)[0].weight is acc.unwrap_model(model)[2].weight
    return acc.unwrap_model(model), str(features.device), found.mean().item(), len(found)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_one_replica_trains_as_the_cpu_does_and_loads_what_the_other_saved(tmp_path: Path) -> None:
    found = {}
    for device in ("cpu", "tpu"):
        folder = tmp_path / device
        model, place, error, count = notebook_launcher(train, (2, None, str(folder)), 1, device=device)[0]
        assert (place.startswith("xla"), count) == (device == "tpu", LEFT_OUT)
        found[device] = flat(model), error
    torch.testing.assert_close(found["tpu"][0], found["cpu"][0], rtol=0, atol=1e-6)
    assert found["tpu"][1] == pytest.approx(found["cpu"][1], abs=1e-6)
    again = {}
    for device, other in (("cpu", "tpu"), ("tpu", "cpu")):
        options = {"load": True}
        call = (2, None, str(tmp_path / other))
        again[device] = flat(notebook_launcher(train, call, 1, device=device, kwargs=options)[0][0])
    torch.testing.assert_close(again["tpu"], again["cpu"], rtol=0, atol=1e-6)
    assert not torch.allclose(again["cpu"], found["cpu"][0], atol=1e-3)


def test_bf16_computes_as_on_the_cpu(tmp_path: Path) -> None:
    models = [
        notebook_launcher(train, (1, "bf16", str(tmp_path / device)), 1, device=device)[0][0]
        for device in ("cpu", "tpu")
    ]
    assert {parameter.dtype for parameter in models[1].parameters()} == {torch.float32}
    torch.testing.assert_close(flat(models[1]), flat(models[0]), rtol=0, atol=2e-2)
