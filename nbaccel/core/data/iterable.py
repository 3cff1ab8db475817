"""Iterable data sets: every rank reads the whole stream and keeps its share of each global batch.

The stream and its state are then the same on all ranks, so a run can go on with another number of them.
A data set that divides itself among the ranks (`shard="none"`) has a state per rank and needs the same
ranks again. With loader workers each worker reads the stream the data set gives *it*
(`torch.utils.data.get_worker_info`), and its position and state travel with every batch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch.utils.data import IterableDataset, get_worker_info

from nbaccel.core.data.plan import Layout, Share, all_shares, groups_of
from nbaccel.core.data.seeding import RandomScope, derive_seed, seed_global
from nbaccel.core.data.source import Source

__all__ = ["Item", "Origin", "Start", "StreamReader", "StreamShard", "is_stateful"]


def is_stateful(value: Any) -> bool:
    """Whether it can say where it is and go there (the two-method protocol of torchdata's Stateful)."""
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where a reader of the stream begins."""

    consumed: int = 0
    """Samples of its stream that were used already."""
    state: Any = None
    """What the data set said when it was there; None: it cannot say, so they are read and dropped."""
    ended: bool = False
    """Whether nothing is left: a data set that was at its end may say that it is at its beginning."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a reader of the stream stood after a global batch."""

    worker: int
    """The loader's worker that read it; 0 in the training process itself."""
    consumed: int
    """Samples of that reader's stream up to here."""
    state: Any
    """What the data set said then; None if it cannot say."""
    ended: bool
    """Whether that was the end of the reader's stream."""


@dataclass(frozen=True, slots=True)
class Item:
    """One global batch as a reader hands it over."""

    batches: list[Any]
    """Collated, one per rank asked for; empty for the placeholders that let another worker go first."""
    shares: list[Share]
    """The same order; their `indices` are empty, since the samples are in the batches."""


@final
class _Stream:
    """The samples of one pass; remembers the data set's state at the borders between global batches."""

    def __init__(self, dataset: Any, start: Start, batch: int, seeds: tuple[int, ...] | None) -> None:
        self._dataset = dataset
        self._own_state = is_stateful(dataset)
        if self._own_state and start.state is not None:
            dataset.load_state_dict(copy.deepcopy(start.state))
        self._source = iter(dataset)
        if not self._own_state and is_stateful(self._source) and start.state is not None:
            self._source.load_state_dict(copy.deepcopy(start.state))
        self._scope = RandomScope(derive_seed(*seeds)) if seeds else None
        self._seeds = seeds or ()
        self._states: dict[int, Any] = {}
        self.count = start.consumed
        if start.state is None:
            for self.count in range(start.consumed):
                self._read()
            self.count = start.consumed
        self._border, self._batch = start.consumed + batch, batch

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.count == self._border:
            self._states[self.count] = self._snapshot()
            self._border += self._batch
        sample = self._read()
        self.count += 1
        return sample

    def _read(self) -> Any:
        if self._scope is None:
            return next(self._source)
        with self._scope:
            seed_global(derive_seed(*self._seeds, self.count))
            return next(self._source)

    def _snapshot(self) -> Any:
        for holder in (self._dataset, self._source):
            if is_stateful(holder):
                return copy.deepcopy(holder.state_dict())
        return None

    def state_at(self, cursor: int) -> Any:
        """The data set's state after `cursor` samples, a border; forgets the ones before."""
        for passed in [count for count in self._states if count < cursor]:
            del self._states[passed]
        return self._states.pop(cursor, None)


@final
class StreamReader:
    """Global batches of one stream, divided, collated, with the state after each."""

    def __init__(self, source: Source, layout: Layout, ranks: Sequence[int], *, seed: int | None) -> None:
        self._source = source
        self._layout = layout
        self._ranks = ranks
        self._seed = seed

    def items(self, epoch: int, start: Start, worker: int = 0) -> Iterator[Item]:
        """The rest of the pass from `start`. With a seed every sample is read under its own."""
        if start.ended:
            return
        layout = self._layout
        seeds = None if self._seed is None else (self._seed, epoch, worker)
        stream = _Stream(self._source.dataset, start, layout.global_batch, seeds)
        collate = self._source.collate
        unbatched = self._source.batch_size is None
        batches: list[Any] = []
        shares: list[Share] = []
        groups = groups_of(stream, layout, cursor=start.consumed)
        for share in all_shares(groups, layout, self._ranks):
            batches.append(collate(share.indices[0] if unbatched else share.indices))
            if not shares:
                origin = Origin(worker, share.cursor, stream.state_at(share.cursor), share.last)
            known = None if layout.shard == "none" else share.global_samples
            shares.append(share._replace(indices=(), units=None, global_samples=known, origin=origin))
            if len(batches) == len(self._ranks):
                yield Item(batches, shares)
                batches, shares = [], []


@final
class StreamShard(IterableDataset[Item]):
    """A `StreamReader` as a data set, for the workers of a DataLoader.

    `starts` has one entry per worker. Workers before `first` begin with an empty item, so that the
    DataLoader's turns, which always begin at worker 0, go on where they stood.
    """

    def __init__(
        self, reader: StreamReader, dataset: Any, epoch: int, starts: Mapping[int, Start], first: int
    ) -> None:
        self._reader = reader
        self.dataset = dataset
        self._epoch = epoch
        self._starts = starts
        self._first = first

    def __iter__(self) -> Iterator[Item]:
        info = get_worker_info()
        worker = info.id if info is not None else 0
        epoch, start, first = self._epoch, self._starts.get(worker, Start()), self._first
        # A persistent worker iterates again without hearing from us: its next pass is the next epoch.
        self._epoch, self._starts, self._first = epoch + 1, {}, 0
        if callable(getattr(self.dataset, "set_epoch", None)):
            self.dataset.set_epoch(epoch)
        if worker < first:
            yield Item([], [])
        yield from self._reader.items(epoch, start, worker)
