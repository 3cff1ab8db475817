"""Trust checks find what is wrong, name it, and are silent otherwise."""

from __future__ import annotations

import warnings

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nbaccel.core import Accelerator
from nbaccel.core.trust import fingerprint
from nbaccel.errors import TrustError


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return self.drop(self.body(x)).sum(1)


def _train(case):
    acc = Accelerator(cpu=True, verify=True)
    rank = acc.process_index
    torch.manual_seed(rank)  # DDP makes parameters equal at prepare: no finding
    model = Model()
    rate = 0.1 * (1 + rank) if case == "rate" else 0.1
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    data = TensorDataset(torch.arange(72.0).reshape(24, 3) / 72)
    model, optimizer, loader = acc.prepare(model, optimizer, DataLoader(data, batch_size=2, shuffle=True))
    if case == "late layer":
        acc.unwrap_model(model).body.bias.data = torch.randn(3)
    if case == "mode" and rank == 1:
        model.eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(3):
                for (x,) in loader:
                    acc.step(model(x).mean(), optimizer)
    except TrustError as error:
        return str(error)
    return acc.steps


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (
            "rate",
            [
                "after optimizer step 1",
                "'body.weight'",
                "rank 0 differs from rank 1",
                "optimizer with options",
            ],
        ),
        ("late layer", ["'body.bias'", "without the same seed", "rank 0 differs from rank 1"]),
        ("mode", ["train mode on rank(s) 0 only", "model.eval()"]),
    ],
)
def test_ranks_when_they_differ_are_named(case, words):
    rank0, rank1 = run_ranks(_train, case)
    assert rank0 == rank1
    for word in words:
        assert word in rank0


def test_ranks_when_all_is_well_nothing_is_said():
    assert run_ranks(_train, "good") == [18, 18]
    assert _train("good") == 36


def test_parameters_when_never_used_are_named():
    acc = Accelerator(cpu=True, verify=True)
    model = Model()
    model.spare = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = acc.prepare(model, optimizer)
    for _ in range(2):
        acc.step(model(torch.ones(1, 3)).mean(), optimizer)
    loss = model(torch.ones(1, 3)).mean()
    with pytest.warns(UserWarning, match=r"2 parameters got no gradient.*spare\.weight, spare\.bias"):
        acc.step(loss, optimizer)
    acc.step(model(torch.ones(1, 3)).mean(), optimizer)  # said once: another warning would fail the test


def test_fingerprint_when_bits_change():
    t = torch.randn(100)
    same, swapped, changed = t.clone(), t.clone(), t.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    changed[7] = torch.nextafter(changed[7], torch.tensor(9.0))
    assert fingerprint(same) == fingerprint(t)
    assert fingerprint(swapped) != fingerprint(t)
    assert fingerprint(changed) != fingerprint(t)
    assert fingerprint(t.bfloat16()) != fingerprint(t)
    assert fingerprint(torch.empty(0)) == 0
