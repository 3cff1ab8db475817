"""Ranks exchanging nested structures of tensors, checked so that a mismatch is an error and not a hang.

Every operation begins with one `frame` of fixed size from each rank: which operation, the hash of what
it brings, how many bytes. Small CPU payloads ride in that frame, so for them the check is free and the
frame is the whole operation; larger ones follow in a collective of their own, and there the frame may be
left out once a call site has proven itself (see `MismatchCheck`). Payloads travel as bytes, so
every dtype a tensor can have can be moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from nbaccel.core.frames import MismatchCheck, exchange, exchange_objects
from nbaccel.core.nested import leaves, map_leaves
from nbaccel.core.world import World
from nbaccel.errors import CollectiveMismatch

__all__ = [
    "MismatchCheck",
    "Reduction",
    "all_to_all",
    "barrier",
    "broadcast",
    "broadcast_module",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "gather_uneven",
    "pad_across_processes",
    "reduce",
    "scatter",
]

Reduction = Literal["mean", "sum", "max", "min", "none"]
T = TypeVar("T")


def gather(value: T, *, world: World, check: MismatchCheck | None = None) -> T:
    """Every rank's tensors concatenated along dimension 0 in rank order, on every rank.

    A tensor of shape [n, ...] becomes [size * n, ...]; a 0-d tensor becomes [size]. No gradient flows.

    Raises:
        CollectiveMismatch: the ranks' structures, shapes or dtypes differ.
        TypeError: a leaf is not a tensor.
    """
    raise NotImplementedError


def gather_uneven(value: T, *, world: World, check: MismatchCheck | None = None) -> T:
    """Like `gather`, for tensors whose dimension 0 differs between ranks; exactly what was given, no padding."""
    raise NotImplementedError


def gather_object(value: Any, *, world: World, check: MismatchCheck | None = None) -> list[Any]:
    """One picklable object from each rank, as a list in rank order, on every rank."""
    raise NotImplementedError


def reduce(
    value: T, *, world: World, reduction: Reduction = "sum", scale: float = 1.0, check: MismatchCheck | None = None
) -> T:
    """The sum, mean, maximum or minimum over the ranks, in a new structure on every rank.

    float16 and bfloat16 are accumulated in float32 and given back in their own dtype; the mean of
    integers is float32.
    """
    raise NotImplementedError


def broadcast(value: T, *, world: World, source: int = 0, check: MismatchCheck | None = None) -> T:
    """`source`'s tensors on every rank; the others give tensors of the same shapes (contents unused)."""
    raise NotImplementedError


def broadcast_object_list(objects: list[Any], *, world: World, source: int = 0) -> list[Any]:
    """Replaces the elements of `objects` on every rank by those of `source`, and returns the list."""
    raise NotImplementedError


def broadcast_module(module: torch.nn.Module, *, world: World, source: int = 0) -> None:
    """Copies `source`'s parameters and buffers into every rank's module, in place."""
    raise NotImplementedError


def pad_across_processes(
    value: T, *, world: World, dim: int = 0, pad_index: int = 0, pad_first: bool = False
) -> T:
    """Each tensor padded along `dim` to the longest of all ranks, so that it can be gathered."""
    raise NotImplementedError


def all_to_all(value: T, *, world: World, check: MismatchCheck | None = None) -> T:
    """Each tensor [size * n, ...] cut into `size` chunks; chunk i goes to rank i. Gives [size * n, ...]."""
    raise NotImplementedError


def scatter(value: T | None, *, world: World, source: int = 0) -> T:
    """Cuts `source`'s tensors along dimension 0, as evenly as possible; rank r gets piece r.

    `source`'s value decides structure, shapes and dtypes; the other ranks may give None.
    """
    raise NotImplementedError


def barrier(world: World) -> None:
    """Waits until every rank is here."""
    raise NotImplementedError
