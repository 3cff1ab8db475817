"""What is said when XLA compiles a loop's step again."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import nn

from nbaccel.core.xla.recompiles import Recompiles


class Loop:
    """A model and a compiler that is told when it compiles."""

    def __init__(self) -> None:
        self.compiled = 0
        self.model = nn.Linear(4, 2)
        self.watched = Recompiles(lambda: self.compiled)
        self.watched.watch(self.model)

    def step(self, samples: int, *, compiles: bool) -> list[str]:
        """What is said of it."""
        self.model(torch.ones(samples, 4))
        self.compiled += compiles
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            self.watched.stepped()
        return [str(one.message) for one in told]


def test_nothing_is_said_of_the_first_steps_and_of_a_smaller_last_batch() -> None:
    loop = Loop()
    said = [loop.step(8, compiles=number < 2) for number in range(5)]
    said.append(loop.step(3, compiles=True))
    said += [loop.step(8, compiles=False), loop.step(3, compiles=False)]
    assert not any(said)


def test_shapes_are_named_when_a_third_one_is_compiled() -> None:
    loop = Loop()
    said = [loop.step(8, compiles=True), loop.step(8, compiles=True), loop.step(7, compiles=True)]
    (warning,) = loop.step(6, compiles=True)
    assert not any(said)
    assert "for 3 different shapes of the model's inputs" in warning
    assert "step 1: float32[8, 4]; step 3: float32[7, 4]; step 4: float32[6, 4]" in warning
    assert "Pad the batches to one shape" in warning


def test_it_is_said_again_only_when_the_shapes_have_doubled() -> None:
    loop = Loop()
    said = [bool(loop.step(samples, compiles=True)) for samples in range(1, 100)]
    assert [number for number, one in enumerate(said, 1) if one] == [3, 6, 12, 24, 48]


def test_steps_compiled_again_without_a_new_shape_are_named() -> None:
    loop = Loop()
    told = list(itertools.chain.from_iterable(loop.step(8, compiles=True) for _ in range(10)))
    (warning,) = told
    assert "compiled the training step again at steps 3, 4, 5" in warning


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_between_steps_counts_for_nothing(training: bool) -> None:
    loop = Loop()
    for number in range(6):
        loop.model.train(training)
        with torch.no_grad():
            loop.model(torch.ones(number + 1, 4))
        loop.model.train()
        assert loop.step(8, compiles=True) == [] or number >= 4
    assert len(loop.watched._seen) == 1
