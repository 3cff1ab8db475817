"""Iterable data sets: every rank reads the whole stream and keeps its share of each global batch.

The stream and its state are then the same on all ranks, so a run can go on with another number of them.
A data set that divides itself among the ranks (`shard="none"`) has a state per rank and needs the same
ranks again. With loader workers each worker reads the stream the data set gives *it*
(`torch.utils.data.get_worker_info`), and its position and state travel with every batch.

A stream that every rank reads must be the same on every rank, so what it draws from the global generators
comes from a private set, which depends on the seed and the epoch and not on the rank:

    iter(dataset), and its first sample   (seed, epoch): also the same in all workers, so that a data set that
                                          shuffles a list and gives each worker a part of it gives all of it
    the samples after it                  (seed, epoch, worker), or their own with `per_sample_seed`
    collate_fn                            the training loop's; in a worker (seed, epoch, rank, worker)
"""

from __future__ import annotations

import copy
import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch.utils.data import IterableDataset, get_worker_info

from nbaccel.core.data.plan import Layout, Share, divided, groups_of
from nbaccel.core.data.seeding import RandomScope, derive_seed, seed_global
from nbaccel.core.data.source import Source
from nbaccel.core.nested import leaves

__all__ = ["Item", "Origin", "Start", "StreamReader", "StreamShard", "digest", "is_stateful"]

_ORDER, _COLLATE = 0x6F726465, 0x636F6C6C
# Global batches of a pass of which what was read can be compared, and that show what the stream draws from.
_COMPARED = 4


def digest(sample: Any) -> int:
    """A checksum of the tensors, arrays, numbers and strings in a sample: equal for equal ones."""
    found = 0
    for path, leaf in leaves(sample):
        found = zlib.crc32(_content(leaf), zlib.crc32(path.encode(errors="backslashreplace"), found))
    return found


def _content(leaf: Any) -> bytes:
    if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and not leaf.is_quantized:
        plain = leaf.detach().cpu().resolve_conj().resolve_neg().contiguous()
        return plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(leaf, (int, float, complex, str, bytes)):
        return repr(leaf).encode(errors="backslashreplace")
    if hasattr(leaf, "tobytes") and not getattr(getattr(leaf, "dtype", None), "hasobject", False):
        return bytes(leaf.tobytes())
    return type(leaf).__name__.encode()  # what else there is may hold addresses


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


class Origin(NamedTuple):
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
    """The samples of one pass; remembers the data set's state at the borders between global batches.

    Args:
        scope: what it draws comes from; None: draws are left alone.
        seeds: what the scope's seed after so many samples is derived from.
        each: whether every sample has a seed of its own.
    """

    def __init__(
        self,
        dataset: Any,
        start: Start,
        batch: int,
        *,
        scope: RandomScope | None,
        seeds: tuple[int, ...],
        each: bool,
    ) -> None:
        self._dataset = dataset
        self._scope, self._seeds, self._each = scope, seeds, each
        own_state = is_stateful(dataset)
        if own_state and start.state is not None:
            dataset.load_state_dict(copy.deepcopy(start.state))
        self._source = iter(dataset)
        if not own_state and is_stateful(self._source) and start.state is not None:
            self._source.load_state_dict(copy.deepcopy(start.state))
        self._stateful = own_state or is_stateful(self._source)
        self._states: dict[int, Any] = {}
        self.count = self._first = start.consumed if start.state is not None else 0
        self._border, self._batch = self.count + batch, batch
        self._samples = self._read()
        if self.count < start.consumed:
            for _ in itertools.islice(self._samples, start.consumed):
                pass
            self._border = start.consumed

    def __iter__(self) -> Iterator[Any]:
        return self._samples

    def _read(self) -> Iterator[Any]:
        self._before_next()
        for sample in self._source:
            self.count += 1
            if self.count == self._first + 1:
                self._seed(self.count)
            yield sample
            if self.count == self._border or self._each:
                self._before_next()

    def _before_next(self) -> None:
        # A stream without a state is seeded at no border: a resumed run reads it from its beginning, perhaps with other
        # borders, and must draw the same.
        if self.count == self._border:
            self._border += self._batch
            if self._stateful:
                self._states[self.count] = self._snapshot()
                self._first = self.count
                self._seed(self.count)
        if self._each and self.count:
            self._seed(self.count)

    def _seed(self, count: int) -> None:
        if self._scope is not None:
            self._scope.seed(derive_seed(*self._seeds, count))

    def _snapshot(self) -> Any:
        for holder in (self._dataset, self._source):
            if is_stateful(holder):
                return copy.deepcopy(holder.state_dict())
        return None

    def state_at(self, cursor: int) -> Any:
        """The data set's state after `cursor` samples, a border; forgets the ones before."""
        if not self._states:
            return None
        for passed in [count for count in self._states if count < cursor]:
            del self._states[passed]
        return self._states.pop(cursor, None)


@final
class StreamReader:
    """Global batches of one stream, divided, collated, with the state after each.

    Args:
        each: every sample is read under a seed of its own.
    """

    def __init__(
        self, source: Source, layout: Layout, ranks: Sequence[int], *, seed: int, each: bool
    ) -> None:
        self._source = source
        self._layout = layout
        self._ranks = ranks
        self._seed = seed
        self._each = each
        self.alike = layout.shard != "none" or each
        """Whether the stream's draws are the reader's, and not the process's."""

    def seed_worker(self, epoch: int, worker: int) -> None:
        """Seed what a loader's worker draws outside of the stream, in collate_fn: not as the other ranks' do."""
        if self.alike:
            seed_global(derive_seed(self._seed, epoch, self._ranks[0], worker, _COLLATE))

    def items(self, epoch: int, start: Start, worker: int = 0) -> Iterator[Item]:
        """The rest of the pass from `start`."""
        if start.ended:
            return
        layout, collate = self._layout, self._source.collate
        unbatched = self._source.batch_size is None
        scope = RandomScope(derive_seed(self._seed, epoch, _ORDER), watched=True) if self.alike else None
        inside: AbstractContextManager[None] = scope or nullcontext()
        with inside:
            stream = _Stream(
                self._source.dataset,
                start,
                layout.global_batch,
                scope=scope,
                seeds=(self._seed, epoch, worker),
                each=self._each,
            )
        groups = groups_of(iter(stream), layout, cursor=start.consumed)
        for number in itertools.count():
            if number == _COMPARED and scope is not None and not scope.narrow():
                inside = nullcontext()
            with inside:
                group = next(groups, None)
                if group is None:
                    return
                shares = list(divided(group, layout, self._ranks))
            batches = [collate(one.indices[0] if unbatched else one.indices) for one in shares]
            origin = Origin(worker, group.cursor, stream.state_at(group.cursor), group.last)
            read = None
            if number < _COMPARED:
                read = (digest(group.units[0]), digest(group.units[-1]))
            known = None if layout.shard == "none" else shares[0].global_samples
            yield Item(
                batches,
                [
                    Share((), one.samples, one.repeated, known, one.cursor, one.last, origin, read)
                    for one in shares
                ],
            )


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
        self._reader.seed_worker(epoch, worker)
        if worker < first:
            yield Item([], [])
        yield from self._reader.items(epoch, start, worker)
