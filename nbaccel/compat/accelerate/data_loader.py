"""Loaders that are divided over the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, final

import torch
from torch.utils.data import DataLoader, RandomSampler

from nbaccel.compat.accelerate.names import look_up
from nbaccel.core.data import ShardedLoader
from nbaccel.core.data.plan import num_batches as batches_left
from nbaccel.core.data.state import Position
from nbaccel.core.world import join
from nbaccel.errors import ConfigError

__all__ = [
    "DataLoaderDispatcher",
    "DataLoaderShard",
    "LoadedLoader",
    "SeedableRandomSampler",
    "SkippedLoader",
    "prepare_data_loader",
    "skip_first_batches",
]

DataLoaderShard = DataLoaderDispatcher = ShardedLoader


@final
class SeedableRandomSampler(RandomSampler):
    """A random order from (seed, epoch), the epoch counted by itself or set."""

    def __init__(self, *args: Any, data_seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.initial_seed = torch.initial_seed() if data_seed is None else data_seed
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        if self.generator is None:
            self.generator = torch.Generator()
        self.generator.manual_seed(self.initial_seed + self.epoch)
        yield from super().__iter__()
        self.set_epoch(self.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Makes the next pass that of `epoch`."""
        self.epoch = epoch


def prepare_data_loader(
    dataloader: DataLoader[Any],
    device: torch.device | None = None,
    num_processes: int | None = None,
    process_index: int | None = None,
    split_batches: bool = False,
    put_on_device: bool = False,
    rng_types: Sequence[Any] | None = None,
    dispatch_batches: bool | None = None,
    even_batches: bool = True,
    slice_fn_for_dispatch: Any = None,
    use_seedable_sampler: bool = False,
    data_seed: int | None = None,
    non_blocking: bool = False,
    use_stateful_dataloader: bool = False,
) -> ShardedLoader:
    """The loader divided over the ranks, without an Accelerator; orders come from (seed, epoch) always.

    Raises:
        ConfigError: a way of cutting batches that does not exist here.
    """
    if slice_fn_for_dispatch is not None:
        raise ConfigError("slice_fn_for_dispatch does not exist here; give shard= to Accelerator")
    world = join()
    size = world.size if num_processes is None else num_processes
    rank = world.rank if process_index is None else process_index
    if (rank, size) != (world.rank, world.size):
        world = replace(world, rank=rank, size=size, local_rank=rank, local_size=size, backend=None)
    return ShardedLoader(
        dataloader,
        world=world,
        device=(device or world.device) if put_on_device else "cpu",
        seed=data_seed,
        even_batches=even_batches,
        tell_repeats=False,  # the default there, which the script has not asked for
        split_batches=split_batches,
        dispatch=bool(dispatch_batches),
        shard="contiguous",
    )


def skip_first_batches(
    dataloader: DataLoader[Any] | ShardedLoader | SkippedLoader, num_batches: int = 0
) -> SkippedLoader:
    """The loader without the first `num_batches` of each epoch; passes over itself are whole.

    Prepare a loader first: it reads none of what it skips, a plain DataLoader reads and drops it.

    Raises:
        ConfigError: it is no loader, or this is no number of batches.
    """
    if isinstance(dataloader, SkippedLoader):
        return SkippedLoader(dataloader.loader, dataloader.skip_batches + num_batches)
    if not isinstance(dataloader, (DataLoader, ShardedLoader)):
        raise ConfigError(f"skip_first_batches takes a DataLoader, not a {type(dataloader).__name__}")
    return SkippedLoader(dataloader, num_batches)


@final
class SkippedLoader:
    """A loader, each pass over which begins `skip_batches` after its epoch's first batch, wherever `load_state` has put
    the loader; of a prepared one they are not read. Its other names are the loader's, and so are its epochs."""

    def __init__(self, loader: DataLoader[Any] | ShardedLoader, skip_batches: int) -> None:
        if isinstance(skip_batches, bool) or not isinstance(skip_batches, int) or skip_batches < 0:
            raise ConfigError(
                f"skip_first_batches takes a number of batches of at least 0, not {skip_batches!r}"
            )
        self.loader = loader
        self.skip_batches = skip_batches

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.loader, DataLoader):
            yield from islice(self.loader, self.skip_batches, None)
            return
        self.loader.skip_batches(0)  # of the pass to come, whether the last one was left early or not
        _begin_epoch(self.loader, self.loader.state_dict())
        self.loader.skip_batches(self.skip_batches)
        yield from self.loader

    def __len__(self) -> int:
        return max(0, len(self.loader) - self.skip_batches)

    def __getattr__(self, name: str) -> Any:
        if name == "loader" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.loader, name)


@final
class LoadedLoader:
    """A prepared loader as `load_state` fills it: a script counts epochs itself, so a pass always has batches.

    Args:
        stateful: the next pass goes on within the epoch; else the script skips what it has seen of it.
    """

    def __init__(self, loader: ShardedLoader, *, stateful: bool) -> None:
        self._loader, self._stateful = loader, stateful

    def state_dict(self) -> dict[str, Any]:
        """The loader's."""
        return self._loader.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Puts the loader there."""
        if self._stateful and not _is_over(self._loader, Position.from_dict(state_dict)):
            self._loader.load_state_dict(state_dict)
        else:
            _begin_epoch(self._loader, state_dict)


def _begin_epoch(loader: ShardedLoader, state: Mapping[str, Any]) -> None:
    """Let the next pass be the whole epoch of `state`; of one that is over, the next."""
    position = Position.from_dict(state)
    loader.load_state_dict(replace(position, samples=0, cursor=0, stream=None).to_dict())
    if _is_over(loader, position):
        loader.set_epoch(position.epoch + 1)


def _is_over(loader: ShardedLoader, position: Position) -> bool:
    """Whether no batch of the epoch is left."""
    if position.stream is not None:
        ended = position.stream["ended"]
        return len(ended) == max(1, position.stream["workers"]) and all(ended.values())
    if position.total is None or not position.cursor:
        return False
    return batches_left(loader._layout, position.total, position.cursor) == 0


def __getattr__(name: str) -> Any:
    return look_up(__name__, name)
