"""When a value's mark is another one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nbaccel.notebook.marks import see


@pytest.mark.parametrize("value", [1, True, 0.5, float("nan"), "text", b"bytes", None])
def test_mark_of_a_plain_value_is_its_own_whichever_object_it_is(value: Any) -> None:
    assert see(value).mark == see(value).mark
    assert see(value).mark != see([value]).mark


def test_marks_differ_when_types_do() -> None:
    assert len({see(value).mark for value in (1, 1.0, True, "1", b"1")}) == 5


@pytest.mark.parametrize(
    ("value", "change"),
    [
        ([1, 2], lambda one: one.append(3)),
        ({"lr": 0.1}, lambda one: one.update(lr=0.2)),
        (SimpleNamespace(inner=SimpleNamespace(lr=0.1)), lambda one: setattr(one.inner, "lr", 100)),
        (torch.ones(2), lambda one: one.add_(1)),
        (torch.nn.Linear(2, 2), lambda one: torch.nn.init.zeros_(one.weight)),
        (torch.optim.SGD([torch.ones(1)], lr=0.1), lambda one: one.param_groups[0].update(lr=0.2)),
        (np.zeros(10), lambda one: one.fill(1)),
        (list(range(1 << 20)), lambda one: one.insert(0, "first")),
        (
            SimpleNamespace(lr=0.1, lock=threading.Lock(), data=[0] * (1 << 20)),
            lambda one: vars(one).pop("lock"),
        ),
    ],
)
def test_mark_is_another_one_when_the_value_has_changed(value: Any, change: Callable[[Any], object]) -> None:
    before = see(value).mark
    assert see(value).mark == before
    change(value)
    assert see(value).mark != before


def test_mark_is_another_one_when_an_equal_object_has_taken_the_place() -> None:
    one, other = SimpleNamespace(items=[]), SimpleNamespace(items=[])
    assert see(one).mark != see(other).mark
    marks = {see(torch.zeros(2)).mark for _ in range(10)}
    assert len(marks) == 10, "each lies where the one before has lain"


def test_code_and_gradients_are_seen_within() -> None:
    class Config:
        def __init__(self) -> None:
            self.function = print

    seen = see({"config": Config(), "model": [torch.nn.Linear(1, 1)]})
    assert {Config, print, torch.nn.Linear} <= set(seen.code)
    assert seen.learns
    assert not see([torch.ones(1)]).learns
