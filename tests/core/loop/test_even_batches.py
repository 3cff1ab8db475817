"""Last batches that are filled up: what they weigh, and who decides."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nbaccel.core import Accelerator
from nbaccel.errors import CollectiveMismatch
from tests.core.ranks import run_ranks


def _filled():
    found = {}
    acc = Accelerator(gradient_accumulation_steps=2, even_batches=True, shard="contiguous", verify=False)
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    data = TensorDataset(torch.arange(1.0, 21.0)[:, None])
    model, loader = acc.prepare(model, DataLoader(data, batch_size=8))
    for (x,) in loader:  # 16 samples, and 4 that are filled up to 16
        with acc.accumulate(model):
            acc.backward(model(x).mean())
    found["gradient"] = acc.unwrap_model(model).weight.grad.item()

    again = acc.prepare(DataLoader(data, batch_size=8, num_workers=0))
    with acc.join_uneven_inputs([model], even_batches=False):
        found["inside"] = [len(x) for (x,) in again], again.even_batches
    found["after"] = [len(x) for (x,) in again], again.even_batches
    found["attributes"] = again.batch_size, again.num_workers, type(again.batch_sampler).__name__
    try:
        acc.pad_across_processes(torch.zeros([1] * (acc.process_index + 1)))
    except CollectiveMismatch as error:
        found["pad"] = str(error)
    split = Accelerator(scheduler_steps="per_rank", split_batches=True, verify=False)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    optimizer, scheduler = split.prepare(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5))
    optimizer.step()
    scheduler.step()
    found["rate"] = scheduler.get_last_lr()
    return found


def test_even_batches_when_accumulating_joining_and_splitting():
    first, second = run_ranks(_filled)
    # the mean of the two micro-steps' means: of 1 to 16, and of 17, 18 and 19, 20, each four times
    assert first["gradient"] == second["gradient"]
    assert abs(first["gradient"] - (8.5 + 18.5) / 2) < 1e-5
    assert first["inside"] == ([8, 2], False)
    assert first["after"] == ([8, 8], True)
    assert first["attributes"] == (8, 0, "BatchSampler")
    assert "[1] dimensions" in first["pad"]
    assert "[2] dimensions" in first["pad"]
    assert first["rate"] == [0.5], "one step, for one batch of all ranks"
