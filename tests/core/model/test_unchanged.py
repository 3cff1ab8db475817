"""A model that was run to learn something of it is as it was."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any

import pytest
import torch
from torch import nn

from nbaccel.core.model.unchanged import unchanged


class Cache:
    def __init__(self) -> None:
        self.keys: list[Any] = []
        self.length = 0


class Keeps(nn.Module):
    """Keeps something in each place that a forward may write to."""

    step: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.last: Any = None
        self.by_length: dict[int, Any] = OrderedDict({2: "two", 1: "one"})
        self.nested: Any = {"inner": ([1],)}
        self.seen: set[int] = {0}
        self.window: deque[int] = deque([1, 2], maxlen=2)
        self.cache = Cache()
        self.unregistered = [nn.Linear(1, 1)]
        self.register_buffer("step", torch.zeros(()))
        self.layer = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.last = self.by_length[len(x)] = self.layer(x)
        self.by_length[1] = self.by_length.pop(1)
        self.nested["inner"][0].append(x)
        self.seen.add(len(x))
        self.window.append(len(x))
        self.cache.keys.append(x)
        self.cache.length += len(x)
        self.unregistered[0].note = x
        self.layer.added = x
        self.step = self.step + 1
        return self.last.sum()  # type: ignore[no-any-return]


def state(model: Keeps) -> Any:
    return (
        model.calls,
        model.last,
        list(model.by_length.items()),
        model.nested,
        model.seen,
        model.window,
        vars(model.cache),
        hasattr(model.unregistered[0], "note"),
        hasattr(model.layer, "added"),
    )


def test_attributes_and_containers_are_put_back() -> None:
    model = Keeps()
    identities = [id(model.by_length), id(model.cache), id(model.cache.keys), id(model._buffers)]
    before, step = repr(state(model)), model.step
    with unchanged(model):
        model(torch.ones(2, 2))
        assert repr(state(model)) != before
    assert repr(state(model)) == before
    assert model.step is step
    assert identities == [id(model.by_length), id(model.cache), id(model.cache.keys), id(model._buffers)]


def test_it_is_put_back_when_the_forward_fails() -> None:
    model = Keeps()
    before = repr(state(model))
    with pytest.raises(RuntimeError), unchanged(model):
        model(torch.ones(2, 3))
    assert repr(state(model)) == before
