"""Prepared optimizers and schedulers come back from a launch as the user's own, and so do copies of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from nbaccel import Accelerator, notebook_launcher


def trained() -> dict[str, Any]:
    acc = Accelerator(verify=False)
    torch.manual_seed(0)
    model: Any = nn.Linear(2, 1)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler: Any = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10)
    model, optimizer, scheduler = acc.prepare(model, optimizer, scheduler)
    acc.step(model(torch.ones(1, 2)).sum(), optimizer, scheduler)
    return {
        "model": acc.unwrap_model(model),
        "optimizer": optimizer,
        "scheduler": scheduler,
        "copy": copy.deepcopy(optimizer),
    }


def test_they_come_back_as_the_users_own() -> None:
    for found in notebook_launcher(trained, num_processes=2, device="cpu"):
        optimizer, weight = found["optimizer"], found["model"].weight
        assert (type(optimizer), type(found["copy"])) == (torch.optim.AdamW, torch.optim.AdamW)
        assert optimizer.param_groups[0]["params"][0] is weight
        assert optimizer.state[weight]["step"] == 1
        assert type(found["scheduler"]) is torch.optim.lr_scheduler.LinearLR
        assert found["scheduler"].optimizer is optimizer
        before = weight.detach().clone()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        found["scheduler"].step()
        assert not torch.equal(weight, before)
