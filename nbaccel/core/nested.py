"""Tensors inside lists, tuples, named tuples, mappings and dataclasses: take them out, put others back.

Of torch's packed sequences `batch_sizes` is no part: torch reads it on the CPU, wherever the rest is.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

__all__ = ["children", "leaves", "map_leaves", "map_tensors"]

_PACKED = ("data", "sorted_indices", "unsorted_indices")


def children(value: Any) -> Iterator[tuple[str, Any]] | None:
    """The parts of a container with how to name each ("[0]", "['x']", ".x"); None for a leaf."""
    if isinstance(value, (torch.Tensor, str, bytes)):
        return None
    if isinstance(value, Mapping):
        return ((f"[{key!r}]", item) for key, item in value.items())
    if isinstance(value, PackedSequence):
        return ((f".{name}", getattr(value, name)) for name in _PACKED)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return ((f".{name}", item) for name, item in zip(value._fields, value, strict=True))
    if isinstance(value, (list, tuple)):
        return ((f"[{index}]", item) for index, item in enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ((f".{f.name}", getattr(value, f.name)) for f in dataclasses.fields(value))
    return None


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in `value` that is not a container, with its path, in a fixed order."""
    parts = children(value)
    if parts is None:
        yield path, value
        return
    for name, item in parts:
        yield from leaves(item, path + name)


def map_leaves(fn: Callable[[Any], Any], value: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """A copy of `value` with every leaf replaced by `fn(leaf)`; containers keep their types.

    Containers of which `is_leaf` says so are leaves too.
    """
    if isinstance(value, (torch.Tensor, str, bytes)) or (is_leaf is not None and is_leaf(value)):
        return fn(value)
    if type(value) is dict:
        return {key: map_leaves(fn, item, is_leaf) for key, item in value.items()}
    if isinstance(value, Mapping):
        if not hasattr(value, "__setitem__"):
            made: Any = type(value)  # a read-only one, as MappingProxyType, is made from a dict
            return made({key: map_leaves(fn, item, is_leaf) for key, item in value.items()})
        made = copy.copy(value)
        for key in list(value):
            made[key] = map_leaves(fn, value[key], is_leaf)
        return made
    if isinstance(value, PackedSequence):
        return value._replace(**{name: map_leaves(fn, getattr(value, name), is_leaf) for name in _PACKED})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_leaves(fn, item, is_leaf) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)([map_leaves(fn, item, is_leaf) for item in value])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        for f in dataclasses.fields(value):
            # Works for frozen and slotted dataclasses, and for fields that __init__ does not take.
            object.__setattr__(made, f.name, map_leaves(fn, getattr(value, f.name), is_leaf))
        return made
    return fn(value)


def map_tensors(fn: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """A copy of `value` with every tensor replaced by `fn(tensor)`; everything else stays."""
    return map_leaves(lambda leaf: fn(leaf) if isinstance(leaf, torch.Tensor) else leaf, value)
