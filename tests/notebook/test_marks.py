"""When a value's mark is another one."""

from __future__ import annotations

import threading
import typing
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.parametrizations import weight_norm

from nbaccel.notebook.marks import see


class Fitted:
    """Makes an array of its state when it is pickled, and keeps another."""

    def __init__(self, made: dict[str, int], held: Any = None) -> None:
        self.made, self.held = made, np.zeros(1 << 14) if held is None else held

    def __getstate__(self) -> dict[str, Any]:
        return {"made": np.full(1 << 14, len(str(self.made)) + sum(self.made.values())), "held": self.held}


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
        (torch.nn.Linear(2, 2), lambda one: one.weight.requires_grad_(False)),
        (weight_norm(torch.nn.Linear(2, 2)), lambda one: torch.nn.init.zeros_(one.bias)),
        (torch.Generator(), lambda one: one.manual_seed(1)),
        (torch.optim.SGD([torch.ones(1)], lr=0.1), lambda one: one.param_groups[0].update(lr=0.2)),
        (np.zeros(10), lambda one: one.fill(1)),
        (list(range(1 << 20)), lambda one: one.insert(0, "first")),
        (list(range(1 << 20)), lambda one: one.append("last")),
        (SimpleNamespace(splits={"train": ["a word"] * (1 << 20)}), lambda one: one.splits["train"].pop()),
        (
            SimpleNamespace(lr=0.1, lock=threading.Lock(), data=[0] * (1 << 20)),
            lambda one: delattr(one, "lock"),
        ),
        (SimpleNamespace(lock=threading.Lock(), lr=0.1), lambda one: setattr(one, "lr", 0.2)),
        (Fitted({"nodes": 1}), lambda one: one.made.update(nodes=2)),
        (Fitted({}, held=torch.ones(2)), lambda one: one.held.add_(1)),
    ],
)
def test_mark_is_another_one_when_the_value_has_changed(value: Any, change: Callable[[Any], object]) -> None:
    before = see(value).mark
    assert see(value).mark == before
    change(value)
    assert see(value).mark != before


DEFINITIONS = """
import functools, typing
config = {"lr": 0.1}
def step(c=config): return c["lr"]
def with_closure(c):
    def inner(): return c["lr"]
    return inner
inner, part = with_closure(config), functools.partial(step, config)
class Config:
    lr: float = 0.1
    shared = config
    @functools.lru_cache
    def forward(self): return 1
    @property
    def rate(self, c=config): return self.lr
class Holder(Config): pass
class Quiet: lr = 0.1
class Plain:
    held = Quiet
"""


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("step", "config['lr'] = 0.5"),
        ("inner", "config['lr'] = 0.5"),
        ("part", "config['lr'] = 0.5"),
        ("Config", "config['lr'] = 0.5"),
        ("Config", "Config.lr = 0.5"),
        ("Config", "Config.forward = lambda self: 2"),
        ("Config", "Config.extra = lambda self: 2"),
        ("Holder", "Config.lr = 0.5"),
        ("Plain", "Quiet.lr = 0.5"),
        ("step", "step.calls = 1"),
        ("step", "step.__code__ = (lambda c: 2).__code__"),
    ],
)
def test_mark_of_a_definition_is_another_one_when_what_it_holds_has_changed(name: str, change: str) -> None:
    notebook: dict[str, Any] = {"__name__": "__main__"}
    exec(DEFINITIONS, notebook)
    before = see(notebook[name]).mark
    assert see(notebook[name]).mark == before
    exec(change, notebook)
    after = see(notebook[name]).mark
    assert after != before
    assert after[0] == before[0], "it is the same object"


def test_mark_of_a_class_stays_when_python_has_been_asked_about_it() -> None:
    notebook: dict[str, Any] = {"__name__": "__main__"}
    exec(DEFINITIONS + "held = Holder()\nheld.forward()", notebook)
    before = see(notebook["Holder"]).mark
    assert notebook["held"].__reduce_ex__(2)
    assert typing.get_type_hints(notebook["Holder"]) == {"lr": float}
    assert notebook["Holder"].__annotations__ == {}
    assert see(notebook["Holder"]).mark == before


def test_mark_stays_when_parts_are_made_each_time_it_is_looked_at() -> None:
    data = torch.utils.data.TensorDataset(torch.arange(8.0))
    loader = torch.utils.data.DataLoader(data, shuffle=True, generator=torch.Generator().manual_seed(0))
    before = see(loader).mark
    assert see(loader).mark == before
    list(loader)
    assert see(loader).mark != before, "it has drawn"


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
    assert see(weight_norm(torch.nn.Linear(1, 1))).learns
    assert not see([torch.ones(1)]).learns
