from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from ranks import run_ranks

from nbaccel.core.rng import RngState, preserved, set_seed, synchronize_rng_states
from nbaccel.core.world import join
from nbaccel.errors import ConfigError


def _draw():
    return random.random(), float(np.random.rand()), float(np.random.randn()), torch.rand(1).item()


def test_seed_when_set_twice_gives_the_same():
    set_seed(4)
    first = _draw()
    set_seed(4)
    assert _draw() == first
    set_seed(4, rank=1, device_specific=True)
    assert _draw() != first
    with pytest.raises(ConfigError, match="at least 0"):
        set_seed(-1)


def test_state_when_put_back_draws_the_same():
    state = RngState(torch.device("cpu"))
    np.random.randn()  # leaves a cached second value, part of the state
    saved = state.state_dict()
    first = _draw()
    state.load_state_dict(saved)
    assert _draw() == first


def test_preserved_when_drawing_inside():
    set_seed(1)
    expected = _draw()
    set_seed(1)
    with preserved(torch.device("cpu")):
        _draw()
    assert _draw() == expected


def _synchronize():
    world = join()
    set_seed(10 + world.rank)
    generator = torch.Generator().manual_seed(world.rank)
    synchronize_rng_states(["torch", "generator"], world=world, generator=generator)
    return torch.rand(1).item(), torch.rand(1, generator=generator).item(), random.random()


def test_generators_when_synchronised_are_rank_0s():
    rank0, rank1 = run_ranks(_synchronize)
    assert rank0[:2] == rank1[:2]
    assert rank0[2] != rank1[2], "only those named"
