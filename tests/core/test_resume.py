"""A resumed run is the uninterrupted one, bit for bit."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, Dataset

from nbaccel.core import Accelerator
from nbaccel.errors import CheckpointError, ConfigError

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


def _stepped(folder, **options):
    acc = Accelerator(cpu=True, project_dir=folder, **options)
    model = nn.Linear(2, 1)
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        acc.step(model(torch.ones(1, 2)).sum(), optimizer)
    return acc


def test_resume_when_nothing_acts_on_it_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"resume='/nowhere' was asked on rank 0, .* is not there"):
        Accelerator(cpu=True, resume="/nowhere")
    saved = _stepped(tmp_path, resume="auto").save_state()
    for where in ("auto", saved):
        with pytest.warns(UserWarning, match=f"resume='{where}' was asked, .* Prepare the loader") as told:
            _stepped(tmp_path, resume=where)
        assert len(told) == 1


def test_load_when_less_was_prepared_than_saved(tmp_path):
    saved = _stepped(tmp_path).save_state()
    acc = Accelerator(cpu=True)
    model = acc.prepare(nn.Linear(2, 1))
    with pytest.raises(
        CheckpointError, match=r"holds more than was prepared: .*: optimizer_0\. .*strict=False"
    ):
        acc.load_state(saved)
    acc.load_state(saved, strict=False)
    assert model.weight.tolist() != nn.Linear(2, 1).weight.tolist()
    for other, words in ((nn.Linear(3, 1), r"weight is \(1, 2\) in"), (nn.Linear(2, 1, bias=False), "bias")):
        acc = Accelerator(cpu=True)
        acc.prepare(other)
        for strict in (True, False):
            with pytest.raises(
                CheckpointError, match=f"model_0: this is another model's checkpoint: .*{words}"
            ):
                acc.load_state(saved, strict=strict)


def _by_epoch(folder, stop):
    """Trains with a scheduler and an evaluation per epoch, up to `stop` (an optimizer step, and where in its epoch);
    the rates of the epochs trained, the weight, and what the evaluations saw."""
    acc = Accelerator(cpu=True, seed=1, project_dir=folder, resume="auto")
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train, held_out = (DataLoader(torch.arange(1.0, 9.0).reshape(8, 1), 2) for _ in range(2))
    prepared = acc.prepare(model, optimizer, train, held_out, scheduler)
    model, optimizer, train, held_out, scheduler = prepared
    rates, seen = {}, {}

    def ends(where):
        if stop == (acc.steps, where):
            acc.save_state()
        return stop == (acc.steps, where)

    for epoch in range(5):
        for x in train:
            rates[epoch] = optimizer.param_groups[0]["lr"]
            acc.step((model(x) * x).mean() * 0.01, optimizer)
            if ends("inside"):
                return None
        if ends("before the scheduler"):
            return None
        scheduler.step()
        if ends("before the evaluation"):
            return None
        if acc.fast_forwarding:
            continue
        seen[epoch] = sum(len(x) for x in held_out)
        if ends("after all"):
            return None
    return rates, acc.unwrap_model(model).weight.item(), seen, scheduler.get_last_lr()


STOPS = [
    (5, "inside"),
    (6, "before the scheduler"),
    (6, "before the evaluation"),
    (6, "after all"),
    (4, "inside"),
]


def _stopped_and_resumed(folder):
    found = [_by_epoch(folder / "whole", None)]
    for number, stop in enumerate(STOPS):
        assert _by_epoch(folder / str(number), stop) is None
        found.append(_by_epoch(folder / str(number), None))
    return found


def test_run_that_schedules_and_evaluates_once_per_epoch_when_resumed(tmp_path):
    for whole, *resumed in run_ranks(_stopped_and_resumed, tmp_path, deadline=240):
        assert whole[0] == {epoch: 0.5**epoch / 2 for epoch in range(5)}
        for stop, (rates, weight, seen, last) in zip(STOPS, resumed, strict=True):
            assert rates.items() <= whole[0].items(), stop
            assert (weight, last) == (whole[1], whole[3]), stop
            assert seen.keys() >= {epoch for epoch in range(5) if epoch > stop[0] // 2}, stop
            assert set(seen.values()) <= {4}, stop
