"""Batches in the order of the plan, read in this process or by the workers of a torch DataLoader."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, final

import torch
from torch.utils.data import DataLoader

from nbaccel.core.data.fetch import SeededDataset, fetcher, takes_tensors
from nbaccel.core.data.iterable import Item, Start, StreamReader, StreamShard
from nbaccel.core.data.order import epoch_order
from nbaccel.core.data.plan import Layout, Share, all_shares, groups_of, order_groups, own_shares
from nbaccel.core.data.same_streams import SameStreams
from nbaccel.core.data.sampling import draw
from nbaccel.core.data.seeding import derive_seed
from nbaccel.core.data.source import Source
from nbaccel.core.data.state import Position

__all__ = ["MapReader", "Reader", "StreamBatches"]

Read = tuple[Any, Share]


class Reader(Protocol):
    """Batches of the ranks asked for, from a position on: one global batch after the other."""

    def read(self, start: Position) -> Iterator[Read]: ...


def _worker_loader(
    options: DataLoader[Any], dataset: Any, seed: int, pin: bool, **how: Any
) -> DataLoader[Any]:
    """A DataLoader with the user's choices about workers, and nothing of the training loop's randomness."""
    generator = torch.Generator()
    generator.manual_seed(seed)
    with warnings.catch_warnings():
        # The user's own DataLoader has said it already.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        return DataLoader(
            dataset,
            num_workers=options.num_workers,
            pin_memory=pin,
            timeout=options.timeout,
            worker_init_fn=options.worker_init_fn,
            multiprocessing_context=options.multiprocessing_context,
            prefetch_factor=options.prefetch_factor,
            persistent_workers=options.persistent_workers,
            generator=generator,
            **how,
        )


@final
class _Feed:
    """The index lists a DataLoader hands to its workers; `pending` are the shares not yet received back."""

    def __init__(self) -> None:
        self.shares: Iterator[Share] = iter(())
        self.pending: deque[Share] = deque()
        self.epoch: int | None = None
        """Set where the data set is asked with (epoch, index)."""
        self.single = False
        """Whether a unit is one index and not a list of them."""

    def __iter__(self) -> Iterator[Any]:
        self.pending.clear()
        for share in self.shares:
            self.pending.append(share)
            indices = (
                share.indices if self.epoch is None else [(self.epoch, index) for index in share.indices]
            )
            yield indices[0] if self.single else indices


@final
class MapReader:
    """Reads a map-style data set."""

    def __init__(
        self,
        source: Source,
        layout: Layout,
        ranks: Sequence[int],
        options: DataLoader[Any],
        *,
        seeded: bool,
        pin: bool,
    ) -> None:
        self._source = source
        self._layout = layout
        self._ranks = ranks
        self._options = options
        self._seeded = seeded
        self._pin = pin
        self._tensors = takes_tensors(source) and options.num_workers == 0
        self._feed = _Feed()
        self._loader: DataLoader[Any] | None = None
        self._made_for: tuple[int, int | None] | None = None

    def read(self, start: Position) -> Iterator[Read]:
        """Batches from `start` on; reads none of the samples before it."""
        shares = self._shares(start)
        if self._options.num_workers:
            return self._by_workers(shares, start)
        return self._here(shares, start)

    def _here(self, shares: Iterator[Share], start: Position) -> Iterator[Read]:
        fetch = fetcher(self._source, seeded=self._seeded, seed=start.seed, epoch=start.epoch)
        for share in shares:
            yield fetch(share.indices), share

    def _by_workers(self, shares: Iterator[Share], start: Position) -> Iterator[Read]:
        feed, source = self._feed, self._source
        loader = self._loader
        # Persistent workers keep the data set as it was when they began.
        asked = start.seed, start.total
        if loader is None or not loader.persistent_workers or self._made_for != asked:
            dataset = SeededDataset(source.dataset, start.seed) if self._seeded else source.dataset
            feed.single = source.batch_size is None and source.kind != "batch_sampler"
            kind = {"batch_size": None, "sampler": feed} if feed.single else {"batch_sampler": feed}
            loader = _worker_loader(self._options, dataset, 0, self._pin, collate_fn=source.collate, **kind)
            self._loader, self._made_for = loader, asked
        feed.shares, feed.epoch = shares, start.epoch if self._seeded else None
        # Workers' base seed: of this epoch and rank, and not drawn from the training loop's generator.
        loader.generator.manual_seed(derive_seed(start.seed, start.epoch, self._ranks[0], 0x776F726B))
        for batch in loader:
            yield batch, feed.pending.popleft()

    def _shares(self, start: Position) -> Iterator[Share]:
        source, layout = self._source, self._layout
        if source.kind == "order":
            order = epoch_order(
                start.total or 0,
                shuffle=source.shuffle,
                seed=start.seed,
                epoch=start.epoch,
                nodes=start.nodes,
            )
            if len(self._ranks) == 1 and not callable(layout.shard):
                return own_shares(order, layout, self._ranks[0], start.cursor, tensors=self._tensors)
            groups = order_groups(order, layout, start.cursor)
            return all_shares(groups, layout, self._ranks, tensors=self._tensors)
        units = draw(source.sampler, seed=start.seed, epoch=start.epoch, skip=start.cursor)
        groups = groups_of(units, layout, cursor=start.cursor, batched=source.kind == "batch_sampler")
        return all_shares(groups, layout, self._ranks, tensors=self._tensors)


@final
class StreamBatches:
    """Reads an iterable data set."""

    def __init__(
        self,
        source: Source,
        layout: Layout,
        ranks: Sequence[int],
        options: DataLoader[Any],
        *,
        seeded: bool,
        pin: bool,
    ) -> None:
        self._source = source
        self._layout = layout
        self._ranks = ranks
        self._options = options
        self._seeded = seeded
        self._pin = pin
        self._loader: DataLoader[Any] | None = None
        self._next_epoch: int | None = None
        self._same = SameStreams(type(source.dataset).__name__, options.num_workers)

    def read(self, start: Position) -> Iterator[Read]:
        """Batches from `start` on: by the data set's own state, or reading and dropping what was consumed."""
        stream = start.stream or {"next": 0, "consumed": {}, "states": {}, "ended": {}}
        starts = {
            worker: Start(consumed=consumed, state=stream["states"][worker], ended=stream["ended"][worker])
            for worker, consumed in stream["consumed"].items()
        }
        reader = StreamReader(self._source, self._layout, self._ranks, seed=start.seed, each=self._seeded)
        if not self._options.num_workers:
            items: Iterator[Item] = reader.items(start.epoch, starts.get(0, Start()))
            return self._unpacked(items)
        return self._unpacked(_with_end(self._by_workers(reader, start, starts, stream["next"])))

    def _by_workers(
        self, reader: StreamReader, start: Position, starts: dict[int, Start], first: int
    ) -> Iterator[Item]:
        # Persistent workers count epochs by themselves; any other jump needs workers that are told.
        follows = self._loader is not None and self._loader.persistent_workers
        if not (follows and start.epoch == self._next_epoch and not starts):
            shard = StreamShard(reader, self._source.dataset, start.epoch, starts, first)
            self._loader = _worker_loader(
                self._options, shard, 0, self._pin, batch_size=None, collate_fn=_unchanged
            )
        assert self._loader is not None
        self._next_epoch = start.epoch + 1
        # Workers' base seed, the same on all ranks: a data set may seed generators of its own with it.
        self._loader.generator.manual_seed(derive_seed(start.seed, start.epoch, 0x776F726B))
        self._same.begin()
        for item in self._loader:
            if item.batches:
                share = item.shares[0]
                if share.units is not None:
                    self._same.add(share.origin.worker, share.units)
                yield item

    def _unpacked(self, items: Iterator[Item]) -> Iterator[Read]:
        for item in items:
            yield from zip(item.batches, item.shares, strict=True)


def _unchanged(item: Any) -> Any:
    return item


def _with_end(items: Iterator[Item]) -> Iterator[Item]:
    """Only the last item of all is the last: each worker knows the end of its own stream alone."""
    held = next(items, None)
    while held is not None:
        following = next(items, None)
        last = following is None
        yield Item(held.batches, [share._replace(last=last) for share in held.shares])
        held = following
