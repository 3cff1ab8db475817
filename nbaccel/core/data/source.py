"""What a `torch.utils.data.DataLoader` was asked to do, read from the one the user made."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any, Literal

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from nbaccel.errors import ConfigError

__all__ = ["Source", "read_dataloader"]

Kind = Literal["order", "sampler", "batch_sampler", "stream"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The parts of a loader that decide which samples it gives, and how they become batches."""

    kind: Kind
    """"order": plain or shuffled order, pure arithmetic; "sampler" and "batch_sampler": the user's own;
    "stream": an iterable data set."""
    dataset: Any
    collate: Callable[[Any], Any]
    batch_size: int | None
    """Samples per batch; None where the data set or the batch sampler makes the batches."""
    drop_last: bool
    sampler: Any = None
    """The user's own sampler or batch sampler."""
    total: int | None = None
    """Units in an epoch when it was read: samples, or batches of a batch sampler; None when unknown."""
    measure: Callable[[], int] | None = None
    """For "order", how many they are at any later time: a data set may grow or shrink between passes."""
    shuffle: bool = False
    seed: int | None = None
    """The seed of the generator or sampler that was to shuffle."""
    with_replacement: bool = False


def read_dataloader(loader: Any, size: int) -> Source:
    """Read a user's DataLoader.

    Raises:
        ConfigError: not a DataLoader, or one whose way of iterating cannot be followed.
    """
    if not isinstance(loader, DataLoader):
        raise ConfigError(
            f"a {type(loader).__name__} cannot be sharded: give a torch.utils.data.DataLoader "
            "(make the data an IterableDataset and wrap it in one)"
        )
    iterates = type(loader).__iter__
    if iterates is not DataLoader.__iter__ and not type(loader).__module__.startswith("torchdata."):
        raise ConfigError(
            f"{type(loader).__name__} iterates in its own way (__iter__), which cannot be sharded or "
            "resumed. Give a plain DataLoader, and put the special part in its dataset, sampler or "
            "collate_fn."
        )
    collate = loader.collate_fn
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset):
        total = len(dataset) if isinstance(dataset, Sized) else None
        return Source(
            kind="stream",
            dataset=dataset,
            collate=collate,
            batch_size=loader.batch_size,
            drop_last=loader.drop_last,
            total=total,
        )
    sampler, batch_size, drop_last = loader.sampler, loader.batch_size, loader.drop_last
    batches: Any = loader.batch_sampler
    if batches is not None and type(batches) is not BatchSampler:
        return Source(
            kind="batch_sampler",
            dataset=dataset,
            collate=collate,
            batch_size=None,
            drop_last=False,
            sampler=batches,
            total=_length(batches),
            with_replacement=_replaces(getattr(batches, "sampler", None)),
        )
    if batches is not None:
        sampler, batch_size, drop_last = batches.sampler, batches.batch_size, batches.drop_last
    return _read_sampler(sampler, dataset, collate, batch_size, drop_last, size)


def _read_sampler(
    sampler: Any,
    dataset: Any,
    collate: Callable[[Any], Any],
    batch_size: int | None,
    drop_last: bool,
    size: int,
) -> Source:
    def ordered(measure: Callable[[], int], shuffle: bool, seed: int | None = None) -> Source:
        return Source(
            kind="order",
            dataset=dataset,
            collate=collate,
            batch_size=batch_size,
            drop_last=drop_last,
            total=measure(),
            measure=measure,
            shuffle=shuffle,
            seed=seed,
        )

    if type(sampler) is SequentialSampler:
        return ordered(lambda: len(sampler.data_source), False)
    if type(sampler) is DistributedSampler:
        if sampler.num_replicas != size:
            raise ConfigError(
                f"the loader's DistributedSampler divides over {sampler.num_replicas} ranks, but there are "
                f"{size}. Leave the sampler out: a prepared loader divides by itself."
            )
        warnings.warn(
            "the loader's DistributedSampler is replaced: a prepared loader divides the samples by itself, "
            "without repeating any. Its shuffle and seed are kept.",
            stacklevel=2,
        )
        return ordered(lambda: len(dataset), sampler.shuffle, sampler.seed)
    whole = type(sampler) is RandomSampler and sampler.num_samples == len(sampler.data_source)
    if whole and not sampler.replacement:
        generator = sampler.generator
        seed = generator.initial_seed() if generator is not None else None
        return ordered(lambda: sampler.num_samples, True, seed)
    return Source(
        kind="sampler",
        dataset=dataset,
        collate=collate,
        batch_size=batch_size,
        drop_last=drop_last,
        sampler=sampler,
        total=_length(sampler),
        with_replacement=_replaces(sampler),
    )


def _length(sampler: Any) -> int | None:
    try:
        return len(sampler)
    except (TypeError, NotImplementedError):
        return None


def _replaces(sampler: Any) -> bool:
    return bool(getattr(sampler, "replacement", False))
