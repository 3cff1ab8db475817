"""A batch size that fits, found by all ranks together."""

from __future__ import annotations

import os

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nbaccel import notebook_launcher
from nbaccel.core import Accelerator, find_executable_batch_size
from nbaccel.errors import CollectiveMismatch, ConfigError


def _search(where):
    tried = []

    @find_executable_batch_size(starting_batch_size=32)
    def train(batch_size, epochs):
        tried.append(batch_size)
        if where == "before it joined" and os.environ["RANK"] == "1" and batch_size > 8:
            raise MemoryError
        acc = Accelerator(cpu=True, save_every=1000)
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        data = TensorDataset(torch.ones(192, 2))
        model, optimizer, loader = acc.prepare(model, optimizer, DataLoader(data, batch_size=batch_size))
        fails = acc.process_index == 1 and batch_size > 8
        for _ in range(epochs):
            for number, (x,) in enumerate(loader):
                if fails and where == "in the loop" and number == 1:
                    raise torch.OutOfMemoryError("CUDA out of memory (a test's)")
                acc.step(model(x).mean(), optimizer)
        if fails and where == "at the end":
            raise MemoryError
        return batch_size, acc.gather(torch.tensor(acc.steps)).tolist()

    return tried, train(1)


@pytest.mark.parametrize("where", ["before it joined", "in the loop", "at the end"])
def test_batch_size_when_one_rank_runs_out_all_halve(where):
    assert run_ranks(_search, where, num_processes=3) == [([32, 16, 8], (8, [8, 8, 8]))] * 3


def test_batch_size_when_launched_all_halve():
    found = notebook_launcher(_search, ("in the loop",), num_processes=2, device="cpu", max_time=60)
    assert list(found) == [([32, 16, 8], (8, [12, 12]))] * 2


def test_batch_size_when_alone():
    @find_executable_batch_size(starting_batch_size=6)
    def train(batch_size):
        if batch_size > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return batch_size

    assert train() == 1

    @find_executable_batch_size
    def never(batch_size):
        raise MemoryError

    with pytest.raises(ConfigError, match="not even 1; began at 128"):
        never()

    sizes = [9, 7, 0]
    tried = []

    @find_executable_batch_size(starting_batch_size=10, reduce_batch_size_fn=lambda: sizes.pop(0))
    def own_sizes(batch_size):
        tried.append(batch_size)
        raise MemoryError

    with pytest.raises(ConfigError, match="not even 7; began at 10"):
        own_sizes()
    assert tried == [10, 9, 7]


def _other_error():
    @find_executable_batch_size(starting_batch_size=4 + int(os.environ["RANK"]))
    def apart(batch_size):
        pass

    with pytest.raises(CollectiveMismatch, match=r"(?s)rank 0: .* size of 4 .*rank 1: .* size of 5 "):
        apart()

    @find_executable_batch_size(starting_batch_size=4)
    def train(batch_size):
        raise ValueError(f"at {batch_size}")

    with pytest.raises(ValueError, match="at 4"):
        train()
    return True


def test_batch_size_when_it_differs_or_the_error_is_another():
    assert run_ranks(_other_error) == [True, True]
