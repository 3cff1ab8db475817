"""Running a model to learn something of it, and leaving no trace in it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import Tensor, nn

__all__ = ["unchanged"]

_CONTAINERS = (dict, list, set, deque)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Puts back what modules keep in their attributes, in containers there, and in the attributes of other objects
    there, whose own objects are not looked into. Tensors are put back, not their numbers.

    For a model that is run on tensors without numbers: a forward that keeps one (cosines, made once) would compute
    with it ever after.
    """
    before = _contents_of(model)
    try:
        yield
    finally:
        for held, kept in before:
            now = _contents(held)
            if len(now) != len(kept) or any(a is not b for a, b in zip(now, kept, strict=True)):
                _fill(held, kept)


def _contents_of(model: nn.Module) -> list[tuple[Any, list[Any]]]:
    """The containers that belong to the model, its modules' attributes among them, and what is in each."""
    found: dict[int, tuple[Any, list[Any]]] = {}
    objects: list[dict[str, Any]] = []
    _collect([vars(module) for module in model.modules()], found, objects)
    _collect(objects, found, [])
    return list(found.values())


def _collect(
    values: list[Any], found: dict[int, tuple[Any, list[Any]]], objects: list[dict[str, Any]]
) -> None:
    """Adds the containers in `values` to `found`, and the attributes of other objects in them to `objects`."""
    values = list(values)
    while values:
        value = values.pop()
        if isinstance(value, nn.Module):  # one that is registered nowhere too: it runs as well
            value = vars(value)
        if isinstance(value, _CONTAINERS):
            if id(value) not in found:
                found[id(value)] = value, _contents(value)
                values += found[id(value)][1]
        elif isinstance(value, tuple):
            values += value
        elif not isinstance(value, (Tensor, ModuleType)):
            attributes = getattr(value, "__dict__", None)
            if isinstance(attributes, dict):  # a class has none that can be written
                objects.append(attributes)


def _contents(held: Any) -> list[Any]:
    return [part for item in held.items() for part in item] if isinstance(held, dict) else list(held)


def _fill(held: Any, contents: list[Any]) -> None:
    held.clear()
    if isinstance(held, dict):
        held.update(zip(contents[::2], contents[1::2], strict=True))
    elif isinstance(held, set):
        held.update(contents)
    else:
        held.extend(contents)
