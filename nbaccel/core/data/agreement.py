"""What a loader is to do, checked before it does anything, and compared between the ranks."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.utils.data import DataLoader

from nbaccel.checks import did_you_mean
from nbaccel.core.comm.collectives import gather_object
from nbaccel.core.data.plan import Layout, Shard
from nbaccel.core.data.sampling import load_sampler_state, sampler_state
from nbaccel.core.data.source import Source
from nbaccel.core.world import World
from nbaccel.errors import ConfigError, TrustError
from nbaccel.ownership import level_of_call

__all__ = ["agree", "make_layout", "warn_of_disorder", "warn_of_tails"]

_SHARDS = ("interleaved", "contiguous", "node", "none")


def make_layout(
    source: Source, world: World, even_batches: bool, split_batches: bool, dispatch: bool, shard: Shard
) -> Layout:
    """How global batches are cut and divided for what was asked.

    Raises:
        ConfigError: it cannot be done; the message names the options.
    """
    _check_shard(source, world, dispatch, shard)
    size = 1 if shard == "none" else world.size
    if source.kind == "batch_sampler":
        batch = 1 if split_batches else size
    elif split_batches:
        if source.batch_size is None:
            raise ConfigError(
                "split_batches=True divides a batch over the ranks, but this DataLoader has batch_size=None"
            )
        if source.batch_size < size:
            raise ConfigError(
                f"split_batches=True divides batch_size={source.batch_size} over {size} ranks: some would "
                f"have nothing. Give a batch_size of at least {size}, or leave split_batches out."
            )
        if even_batches and source.batch_size % size:
            raise ConfigError(
                f"even_batches=True with split_batches=True needs a batch_size ({source.batch_size}) that "
                f"{size} ranks can share equally"
            )
        batch = source.batch_size
    else:
        batch = (source.batch_size or 1) * size
    nodes = world.size // world.local_size if shard == "node" else 1
    if batch % nodes:
        raise ConfigError(f"shard='node' needs a global batch ({batch}) that {nodes} nodes can share equally")
    return Layout(
        size=size,
        global_batch=batch,
        drop_last=source.drop_last,
        even_batches=even_batches,
        shard=shard,
        nodes=nodes,
    )


def _check_shard(source: Source, world: World, dispatch: bool, shard: Shard) -> None:
    if not callable(shard) and shard not in _SHARDS:
        raise ConfigError(
            f"shard is {shard!r}; it must be one of {', '.join(map(repr, _SHARDS))} or a function."
            f"{did_you_mean(shard, _SHARDS)}"
        )
    if shard == "none" and source.kind != "stream":
        raise ConfigError("shard='none' is for an iterable data set that divides itself among the ranks")
    if shard == "none" and dispatch:
        raise ConfigError(
            "dispatch=True lets rank 0 read for all; shard='none' lets every rank read its own: take one"
        )
    if shard == "node" and source.kind != "order":
        raise ConfigError(
            "shard='node' needs a map-style data set with plain or shuffled order, not an own sampler"
        )
    if shard == "node" and world.size % world.local_size:
        raise ConfigError(
            f"shard='node' needs equally many ranks per node, not {world.size} ranks in {world.local_size}s"
        )


def agree(
    source: Source, layout: Layout, world: World, seed: int | None, options: tuple[bool, bool, bool]
) -> int:
    """The seed all ranks use, after comparing what they were given; collective.

    A sampler with generators of its own is given rank 0's, so that all ranks draw the same.

    Raises:
        TrustError: the ranks differ; the message names what and which.
    """
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ConfigError(f"seed must be an int, not {seed!r}")
    found = source.seed if source.seed is not None else torch.initial_seed()
    mine = (found if seed is None else seed) & ((1 << 63) - 1)
    if world.size == 1 or world.backend is None:
        return mine
    dispatch, split_batches, seeded = options
    facts = {
        "data set": source.kind,
        "batch_size": source.batch_size,
        "drop_last": source.drop_last,
        "shuffle": source.shuffle,
        "shard": "a function" if callable(layout.shard) else layout.shard,
        "even_batches": layout.even_batches,
        "split_batches": split_batches,
        "dispatch": dispatch,
        "per_sample_seed": seeded,
        "seed": seed,
    }
    if not dispatch and layout.shard != "none":
        facts["length"] = source.total
    own = sampler_state(source.sampler) if source.sampler is not None else {}
    everyone = gather_object((facts, mine, own), world=world)
    _compare([theirs[0] for theirs in everyone])
    if source.sampler is not None and world.rank:
        load_sampler_state(source.sampler, everyone[0][2])
    return int(everyone[0][1])


def _compare(everyone: list[dict[str, Any]]) -> None:
    for rank, facts in enumerate(everyone):
        for name in {**everyone[0], **facts}:
            if facts.get(name) != everyone[0].get(name):
                raise TrustError(
                    f"the ranks prepared different loaders: {name} is {everyone[0].get(name)!r} on rank 0 "
                    f"and {facts.get(name)!r} on rank {rank}. Every rank must be given the whole data set "
                    "with the same options; the loader divides it."
                )


def warn_of_tails(source: Source, layout: Layout, name: str, *, repeats: bool) -> None:
    """Say what will be left out, or with `repeats` used twice, in every epoch of the loader `name`."""
    total, batch = source.total, layout.global_batch
    if total is None or source.kind == "batch_sampler":
        return
    rest = total % batch
    if layout.drop_last and total < batch:
        warnings.warn(
            f"loader {name!r}, drop_last=True, leaves no batch at all: the data set has {total} samples and a global "
            f"batch {batch}",
            stacklevel=level_of_call(),
        )
    if repeats and layout.even_batches and rest and not layout.drop_last:
        added = layout.full_share() * layout.size - rest
        warnings.warn(
            f"loader {name!r}, even_batches=True: the last batch of each epoch adds {_count(added, 'repeat')} to its "
            f"{_count(rest, 'sample')}, so that every rank's batch is full; metrics do not count them",
            stacklevel=level_of_call(),
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 else ''}"


def warn_of_disorder(loader: DataLoader[Any]) -> None:
    """Say that batches come in the order of the plan although the user would take any."""
    if loader.num_workers and not getattr(loader, "in_order", True):
        warnings.warn(
            "in_order=False is not followed: batches come in order, since a position in an epoch means "
            "nothing otherwise",
            stacklevel=level_of_call(),
        )
