"""A resumed run is the uninterrupted one, bit for bit."""

from __future__ import annotations

import os
import random

import numpy as np
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, Dataset

from nbaccel.core import Accelerator

WORKERS = (0, 2)
TOTAL, BATCH, EPOCHS = 23, 3, 2  # on two ranks: 4 batches an epoch, the last one shorter


class Augmented(Dataset):
    """Samples with noise from every generator a data set may draw from."""

    def __len__(self):
        return TOTAL

    def __getitem__(self, index):
        noise = torch.rand(()).item() + random.random() + float(np.random.rand())
        return torch.full((4,), float(index)) / TOTAL + noise


def _run(folder, seed, workers, stop_at):
    """Trains, with a break after `stop_at` steps; the weights' bits and what each generator gives next."""
    rank = int(os.environ["RANK"])
    for seeded in (torch.manual_seed, random.seed, np.random.seed):
        seeded(100 * seed + rank)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 1))
    acc = Accelerator(
        cpu=True, seed=None, project_dir=folder, resume="auto", per_sample_seed=bool(workers) or None
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(Augmented(), BATCH, shuffle=True, num_workers=workers, generator=generator)
    model, optimizer, loader, scheduler = acc.prepare(model, optimizer, loader, scheduler)
    for _ in range(EPOCHS):
        for x in loader:
            loss = (model(x) ** 2).mean() + torch.rand(())
            acc.step(loss, optimizer, scheduler, clip=1.0)
            if acc.steps == stop_at:
                acc.save_state()
                return None
    state = acc.get_state_dict(model)
    drawn = torch.rand(3).tolist(), random.random(), np.random.rand()
    return {name: value.clone() for name, value in state.items()}, drawn, acc.steps, scheduler.get_last_lr()


def _uninterrupted_and_broken(folder):
    for workers in WORKERS:
        # In the second epoch.
        assert _run(folder / f"broken {workers}", 1, workers, stop_at=6) is None
    return [_run(folder / f"whole {workers}", 1, workers, stop_at=None) for workers in WORKERS]


def _resumed(folder):
    return [_run(folder / f"broken {workers}", 2, workers, stop_at=None) for workers in WORKERS]


def test_run_when_resumed_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    whole = run_ranks(_uninterrupted_and_broken, tmp_path, deadline=240)
    resumed = run_ranks(_resumed, tmp_path, deadline=240)
    for rank in range(2):
        for expected, found in zip(whole[rank], resumed[rank], strict=True):
            assert found[1:] == expected[1:]
            assert found[2] == EPOCHS * 4
            assert all(torch.equal(found[0][name], value) for name, value in expected[0].items())
    assert whole[0][0][1] != whole[1][0][1], "each rank has a state of its own"
