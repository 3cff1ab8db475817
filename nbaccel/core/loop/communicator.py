"""The user's collectives: checked, timed, over the ranks of one loop."""

from __future__ import annotations

import contextlib
import warnings
from contextlib import AbstractContextManager
from typing import Any, final

import torch
from torch import Tensor, nn

from nbaccel.core.comm import collectives
from nbaccel.core.data import ShardedLoader
from nbaccel.core.loop.loop import Loop
from nbaccel.core.loop.real_samples import real_part
from nbaccel.core.nested import leaves, map_leaves

__all__ = ["Communicator"]


@final
class Communicator:
    """`collectives` with the loop's world, stopwatch and batch in hand. See there for each operation."""

    def __init__(self, loop: Loop, mode: collectives.CheckMode) -> None:
        self._loop, self._world = loop, loop.world
        self._check = collectives.MismatchCheck(mode)
        self._raised = self._told = False

    def _timed(self) -> AbstractContextManager[None]:
        watch = self._loop.stopwatch
        return contextlib.nullcontext() if watch is None else watch.measure("communication")

    def gather(self, tensor: Any) -> Any:
        with self._timed():
            return collectives.gather(tensor, world=self._world, check=self._check)

    def gather_object(self, value: Any) -> list[Any]:
        with self._timed():
            return collectives.gather_object(value, world=self._world)

    def gather_for_metrics(self, value: Any, use_gather_object: bool, loader: ShardedLoader | None) -> Any:
        if loader is None:
            loader = self._loop.loader
        real, size = (1, 1) if loader is None else _in_hand(loader)
        # of the ranks that share one batch the first brings it
        absent = self._world.rank % (self._world.size // self._loop.strategy.data_axis.size) > 0
        absent = absent or (real == 0 and size > 0)
        objects = use_gather_object or not _all_tensors(value)
        if 0 < real < size:
            value, others = real_part(value, real, size, lists=objects)
            self._tell_of_others(others, real, size)
        elif loader is None or not size:
            self._tell_of_a_pass(value, *(self._loop.last_pass if loader is None else loader.pass_entries))
        with self._timed():
            if objects:
                mine = value if isinstance(value, (list, tuple)) else [value]
                parts = collectives.gather_object([] if absent else mine, world=self._world)
                return [one for part in parts for one in part]
            if absent:
                value = map_leaves(lambda t: t.reshape(1)[:0] if t.ndim == 0 else t[:0], value)
            return collectives.gather_uneven(value, world=self._world, check=self._check)

    def _tell_of_others(self, others: list[int], real: int, size: int) -> None:
        if others and not self._told:
            self._told = True
            warnings.warn(
                f"gather_for_metrics on rank {self._world.rank}: a value has {others[0]} entries where the batch has "
                f"{size} samples, of which {size - real} only fill it up. It is gathered as it is, with what belongs "
                "to those. Give one entry per sample.",
                stacklevel=4,
            )

    def _tell_of_a_pass(self, value: Any, entries: int, repeated: int) -> None:
        """After a loop nothing says which entries fill up; a value with as many as the pass had may hold them."""
        if repeated and not self._told and entries in _lengths(value):
            self._told = True
            warnings.warn(
                f"gather_for_metrics on rank {self._world.rank}: no loader has a batch in hand, and a value has "
                f"{entries} entries, as many as this rank's batches in the pass that is over, of which {repeated} "
                "only fill them up. It is gathered as it is. Call gather_for_metrics in the loop, for each batch, or "
                "keep the first loader.batch_samples entries of each.",
                stacklevel=4,
            )

    def reduce(self, tensor: Any, reduction: collectives.Reduction, scale: float) -> Any:
        with self._timed():
            return collectives.reduce(
                tensor, world=self._world, reduction=reduction, scale=scale, check=self._check
            )

    def broadcast(self, tensor: Any, source: int) -> Any:
        with self._timed():
            return collectives.broadcast(tensor, world=self._world, source=source, check=self._check)

    def broadcast_object_list(self, objects: list[Any], source: int) -> list[Any]:
        with self._timed():
            return collectives.broadcast_object_list(objects, world=self._world, source=source)

    def broadcast_module(self, module: nn.Module, source: int) -> None:
        with self._timed():
            collectives.broadcast_module(module, world=self._world, source=source)

    def pad_across_processes(self, tensor: Any, dim: int, pad_index: float, pad_first: bool) -> Any:
        with self._timed():
            return collectives.pad_across_processes(
                tensor, world=self._world, dim=dim, pad_index=pad_index, pad_first=pad_first
            )

    def all_to_all(self, tensor: Any) -> Any:
        with self._timed():
            return collectives.all_to_all(tensor, world=self._world, check=self._check)

    def scatter(self, tensor: Any, source: int) -> Any:
        with self._timed():
            return collectives.scatter(tensor, world=self._world, source=source)

    def barrier(self) -> None:
        with self._timed():
            collectives.barrier(self._world)

    def set_trigger(self) -> None:
        """Raises a flag on this rank."""
        self._raised = True

    def check_trigger(self) -> bool:
        """Whether any rank's flag is up; takes it down."""
        seen = bool(self.reduce(torch.tensor(int(self._raised)), "max", 1.0).item())
        if seen:
            self._raised = False
        return seen


def _in_hand(loader: ShardedLoader) -> tuple[int, int]:
    """Real samples of its batch in hand, and all of them; none of either where there is no batch."""
    return loader.batch_samples, loader.batch_samples + loader.batch_repeated


def _lengths(value: Any) -> list[int]:
    """Rows of the tensors and arrays in it, and its own length if it is a list."""
    rows = [len(value)] if isinstance(value, (list, tuple)) else []
    return rows + [int(leaf.shape[0]) for _, leaf in leaves(value) if getattr(leaf, "shape", ())]


def _all_tensors(value: Any) -> bool:
    found: list[bool] = []
    map_leaves(lambda leaf: found.append(isinstance(leaf, Tensor)), value)
    return bool(found) and all(found)
