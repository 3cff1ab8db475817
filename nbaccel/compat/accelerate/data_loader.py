"""Loaders that are divided over the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch.utils.data import DataLoader, RandomSampler

from nbaccel.compat.accelerate.names import look_up
from nbaccel.core.data import ShardedLoader
from nbaccel.core.world import join
from nbaccel.errors import ConfigError

__all__ = [
    "DataLoaderDispatcher",
    "DataLoaderShard",
    "SeedableRandomSampler",
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
        split_batches=split_batches,
        dispatch=bool(dispatch_batches),
        shard="contiguous",
    )


def skip_first_batches(dataloader: ShardedLoader, num_batches: int = 0) -> ShardedLoader:
    """The prepared loader, whose next pass begins `num_batches` further on; those after it are whole.

    Raises:
        ConfigError: it was not prepared.
    """
    if not isinstance(dataloader, ShardedLoader):
        raise ConfigError("skip_first_batches takes a prepared loader; prepare it first")
    dataloader.skip_batches(num_batches)
    return dataloader


def __getattr__(name: str) -> Any:
    return look_up(__name__, name)
