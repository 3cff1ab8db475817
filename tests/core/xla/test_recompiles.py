"""What is said when XLA compiles a loop's step again."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable

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
        self.places: list[str] = []

    def step(self, samples: int, *, compiles: bool) -> list[str]:
        """What is said of it."""
        self.model(torch.ones(samples, 4))
        self.compiled += compiles
        return self.cut()

    def cut(self) -> list[str]:
        return self._told(self.watched.stepped)

    def evaluate(self, samples: int) -> list[str]:
        with torch.no_grad():
            self.model(torch.ones(samples, 4))
        self.compiled += 1
        return self._told(self.watched.evaluated)

    def _told(self, cut: Callable[[], None]) -> list[str]:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            cut()
        self.places += [one.filename for one in told]
        return [str(one.message) for one in told]


def test_nothing_is_said_of_the_first_steps_and_of_a_smaller_last_batch() -> None:
    loop = Loop()
    said = [loop.step(8, compiles=number < 2) for number in range(5)]
    said.append(loop.step(3, compiles=True))
    said += [loop.step(8, compiles=False), loop.step(3, compiles=False)]
    assert not any(said)


def test_shapes_are_named_once_when_a_third_one_is_compiled() -> None:
    loop = Loop()
    said = [loop.step(8, compiles=True), loop.step(8, compiles=True), loop.step(7, compiles=True)]
    (warning,) = loop.step(6, compiles=True)
    said += [loop.step(samples, compiles=True) for samples in range(9, 99)]
    assert not any(said)
    assert (
        "for each new shape of the model's inputs, or of what came with them in a batch, 3 so far" in warning
    )
    assert "step 1: float32[8, 4]; step 3: float32[7, 4]; step 4: float32[6, 4]" in warning
    assert "Pad the batches to one shape" in warning


def test_shapes_of_targets_are_named_when_a_loader_has_brought_them_with_the_inputs() -> None:
    loop = Loop()
    said = []
    for samples in (2, 2, 3, 4, 5):
        features, wanted = torch.ones(8, 4), torch.ones(8, samples)
        loop.watched.brought([features, wanted])
        loop.model(features)
        loop.compiled += 1
        said += loop.cut()
    (warning,) = said
    assert "step 1: float32[8, 4], float32[8, 2]; step 3: float32[8, 4], float32[8, 3]; step 4" in warning
    loop.model(torch.ones(8, 4))
    assert len(loop.watched._brought) == 2, "only the last batch, which is alive, is known"


def test_shapes_of_an_evaluation_are_named_by_themselves() -> None:
    loop = Loop()
    said = [loop.step(8, compiles=True) for _ in range(2)]
    said += [loop.evaluate(samples) for samples in (8, 8, 3)]
    (warning,) = loop.evaluate(5)
    said += [loop.evaluate(samples) for samples in range(9, 30)] + [loop.step(3, compiles=True)]
    assert not any(said)
    assert "compiles the evaluation step again" in warning
    assert "step 1: float32[8, 4]; step 3: float32[3, 4]; step 4: float32[5, 4]" in warning


def test_warning_is_at_the_line_of_the_person() -> None:
    loop = Loop()
    for samples in range(3):
        loop.step(samples, compiles=True)
    assert loop.places == [__file__]


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
    assert len(loop.watched._training._first) == 1
