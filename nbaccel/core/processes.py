"""Who a rank is among the others, and who does what: one rank first, one rank only, a share for each."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, cast

import torch

from nbaccel.core.comm.collectives import barrier
from nbaccel.core.world import World
from nbaccel.errors import ConfigError

__all__ = ["Processes", "share_of"]

F = TypeVar("F", bound=Callable[..., Any])


class Processes(ABC):
    """What an object that knows its `world` says of this rank, and lets only some ranks do."""

    world: World

    @property
    def device(self) -> torch.device:
        """The device this rank computes on."""
        return self.world.device

    @property
    def num_processes(self) -> int:
        """Ranks in all."""
        return self.world.size

    @property
    def process_index(self) -> int:
        """This rank."""
        return self.world.rank

    @property
    def local_process_index(self) -> int:
        """This rank on its machine."""
        return self.world.local_rank

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0."""
        return self.world.rank == 0

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is rank 0 of its machine."""
        return self.world.local_rank == 0

    @property
    def is_last_process(self) -> bool:
        """Whether this is the highest rank."""
        return self.world.rank == self.world.size - 1

    @property
    def use_distributed(self) -> bool:
        """Whether there is more than one rank."""
        return self.world.size > 1

    @abstractmethod
    def wait_for_everyone(self) -> None:
        """Waits until every rank is here."""

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints on each machine's first rank only."""
        if self.is_local_main_process:
            print(*args, **kwargs)

    def main_process_first(self) -> AbstractContextManager[None]:
        """A block that rank 0 runs before the others."""
        return _first(self.world, self.is_main_process)

    def local_main_process_first(self) -> AbstractContextManager[None]:
        """A block that each machine's first rank runs before its others."""
        return _first(self.world, self.is_local_main_process)

    def on_main_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: runs on rank 0 only."""
        return _only_if(self.is_main_process, function)

    def on_local_main_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: runs on each machine's first rank only."""
        return _only_if(self.is_local_main_process, function)

    def on_last_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: runs on the highest rank only."""
        return _only_if(self.is_last_process, function)

    def on_process(self, function: Callable[..., Any] | None = None, process_index: int | None = None) -> Any:
        """Decorator: runs on the given rank only."""
        return _on(function, process_index, self.process_index)

    def on_local_process(
        self, function: Callable[..., Any] | None = None, local_process_index: int | None = None
    ) -> Any:
        """Decorator: runs on the given local rank of each machine only."""
        return _on(function, local_process_index, self.local_process_index)

    @contextmanager
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Iterator[Any]:
        """Gives this rank's contiguous part of `inputs`; see `share_of`."""
        yield share_of(inputs, rank=self.process_index, size=self.num_processes, pad=apply_padding)


def share_of(inputs: Any, *, rank: int, size: int, pad: bool) -> Any:
    """This rank's contiguous part of a list, tuple, string, range, tensor, array or data set, or of each in a dict.

    The first ranks get one element more when it does not divide evenly. With `pad` the shorter parts
    repeat the last element of the whole, so that all parts have one length.

    Raises:
        ConfigError: the values of a dict have different lengths, or it cannot be cut.
    """
    if isinstance(inputs, dict):
        lengths = {key: _length(value) for key, value in inputs.items()}
        if len(set(lengths.values())) > 1:
            raise ConfigError(f"split_between_processes needs values of one length; these have {lengths}")
        return {key: share_of(value, rank=rank, size=size, pad=pad) for key, value in inputs.items()}
    length = _length(inputs)
    base, extra = divmod(length, size)
    start = rank * base + min(rank, extra)
    stop = start + base + (rank < extra)
    missing = (base + (extra > 0)) - (stop - start) if pad and length else 0
    if isinstance(inputs, (list, tuple, str)):
        whole: Any = inputs
        return whole[start:stop] + whole[-1:] * missing
    if isinstance(inputs, torch.Tensor):
        part = inputs[start:stop]
        return torch.cat([part, inputs[-1:].expand(missing, *inputs.shape[1:])]) if missing else part
    indices = [*range(start, stop), *[length - 1] * missing]
    if hasattr(inputs, "__array__"):
        rows = getattr(inputs, "iloc", inputs)  # of a data frame
        return rows[indices] if missing else rows[start:stop]
    if callable(getattr(inputs, "select", None)):
        return inputs.select(indices)  # a Hugging Face data set
    if isinstance(inputs, Sequence):
        return [inputs[index] for index in indices]
    raise ConfigError(
        f"split_between_processes cannot cut a {type(inputs).__name__}; give a list or a tensor"
    )


def _length(value: Any) -> int:
    try:
        return len(value)
    except TypeError:
        raise ConfigError(
            f"split_between_processes cannot cut a {type(value).__name__}; give a list or a tensor"
        ) from None


@contextmanager
def _first(world: World, goes_first: bool) -> Iterator[None]:
    """The ranks for which `goes_first` run the block before the others enter it."""
    if not goes_first:
        barrier(world)
    try:
        yield
    finally:
        if goes_first:
            barrier(world)


def _only_if(condition: bool, function: F) -> F:
    """`function` where `condition` holds; elsewhere a function that returns None."""
    if condition:
        return function

    @functools.wraps(function)
    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    return cast(F, nothing)


def _on(function: Callable[..., Any] | None, wanted: int | None, index: int) -> Any:
    """A decorator, or `function` decorated: runs where `index` is the wanted one (0 if None)."""
    if function is None:
        return lambda fn: _only_if(index == (wanted or 0), fn)
    return _only_if(index == (wanted or 0), function)
