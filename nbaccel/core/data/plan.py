"""Who reads what: arithmetic over a global position, with no data, process or torch.distributed in it.

    epoch order   o0 o1 o2 o3 o4 o5 o6 o7 | o8 o9 …          global batch of 8 on 4 ranks
                  r0 r1 r2 r3 r0 r1 r2 r3 | …                interleaved
                  r0 r0 r1 r1 r2 r2 r3 r3 | …                contiguous

A global batch is cut from the order at the position reached so far, whatever the world size was when the
earlier ones were cut: that is why a run goes on with another number of ranks without repeating or
skipping a sample. The last global batch holds what is left, divided as evenly as possible. Where it has
fewer samples than there are ranks, a rank without one gets a repeated sample that counts for nothing
(`samples` 0, `repeated` 1), so that all ranks take equally many steps and meet in every collective.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from nbaccel.core.data.order import Order
from nbaccel.errors import ConfigError

__all__ = [
    "Group",
    "Layout",
    "Shard",
    "Share",
    "all_shares",
    "divided",
    "groups_of",
    "num_batches",
    "order_groups",
    "own_shares",
]

Assign = Callable[[Sequence[Any], int], Sequence[int]]
Shard = Literal["interleaved", "contiguous", "node", "none"] | Assign
"""How a global batch is divided. A function gets the batch's sample indices (the samples themselves for
an iterable data set) and the number of ranks, and returns the rank of each."""

# Indices computed at once: few at first, so that a resumed epoch begins in a fraction of a millisecond,
# then more, so that the cost of a call is spread; torch would use threads from 32768 on.
_FIRST_BLOCK, _BLOCK = 256, 8192


def _blocks(start: int, end: int, unit: int) -> Iterator[tuple[int, int]]:
    """[start, end), global batches, in pieces that grow from 256 to 8192 indices at `unit` indices each."""
    size = _FIRST_BLOCK
    while start < end:
        stop = min(start + max(1, size // unit), end)
        yield start, stop
        start, size = stop, min(2 * size, _BLOCK)


class Share(NamedTuple):
    """What one rank gets of one global batch."""

    indices: Any
    """Sample indices: real ones first, then repeated ones. A list, or a tensor [n] int64."""
    samples: int
    """How many of them are real."""
    repeated: int
    """How many stand there only to fill up; they count for nothing."""
    global_samples: int | None
    """Real samples in the whole global batch; None where only the rank itself knows its data."""
    cursor: int
    """Units of the plan consumed after this batch: samples, or batches of a user's batch sampler."""
    last: bool
    """Whether the epoch ends with this batch."""
    origin: Any = None
    """Iterable data sets: the `Origin` of the batch."""
    units: Any = None
    """The whole global batch's indices as this rank knows them; None where each rank computes its own.
    Iterable data sets: checksums of some of its samples."""


class Group(NamedTuple):
    """A global batch before it is divided. `units` is a list of samples, or of lists where `batched`."""

    units: list[Any]
    cursor: int
    last: bool
    batched: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How global batches are cut and divided.

    Raises:
        ConfigError: the numbers cannot be honoured together.
    """

    size: int
    """Ranks."""
    global_batch: int
    """Units in a full global batch."""
    drop_last: bool = False
    """Leave out a last global batch that is not full."""
    even_batches: bool = False
    """Repeat samples in the last global batch until every rank has a full share."""
    shard: Shard = "interleaved"
    nodes: int = 1
    """Nodes that own a part of the data set each; 1 unless `shard` is "node"."""

    def __post_init__(self) -> None:
        if self.size < 1 or self.nodes < 1 or self.size % self.nodes:
            raise ConfigError(f"{self.size} ranks cannot be spread evenly over {self.nodes} nodes")
        if self.global_batch < 1:
            raise ConfigError(f"a global batch must hold at least 1 sample, not {self.global_batch}")

    def slot(self, rank: int) -> int:
        """The rank's place in the dealing order: neighbouring positions go to different nodes."""
        local_size = self.size // self.nodes
        return (rank % local_size) * self.nodes + rank // local_size

    def divide(self, count: int, rank: int) -> slice:
        """Which of `count` samples of a global batch are the rank's, for the arithmetic kinds of shard."""
        slot = self.slot(rank)
        if self.shard != "contiguous":
            return slice(slot, count, self.size)
        base, extra = divmod(count, self.size)
        start = slot * base + min(slot, extra)
        return slice(start, start + base + (slot < extra))

    def full_share(self) -> int:
        """The largest share of a full global batch."""
        return -(-self.global_batch // self.size)


def num_batches(layout: Layout, total: int, position: int = 0) -> int:
    """Global batches, and so steps of every rank, from `position` to the end."""
    rest = total - position
    if layout.drop_last:
        return rest // layout.global_batch
    return -(-rest // layout.global_batch)


def own_shares(
    order: Order, layout: Layout, rank: int, position: int = 0, *, tensors: bool = False
) -> Iterator[Share]:
    """The rank's shares from global `position` on, computed without looking at the others' samples."""
    batch, total = layout.global_batch, order.total
    steps = (total - position) // batch
    offsets = torch.arange(batch)[layout.divide(batch, rank)]
    samples = len(offsets)
    remainder = (total - position) % batch
    ends_full = remainder == 0 or layout.drop_last
    if samples:
        final = position + steps * batch if ends_full else -1
        for first, stop in _blocks(0, steps, samples):
            starts = torch.arange(first, stop) * batch + position
            found = order.take((starts[:, None] + offsets).flatten()).view(-1, samples)
            cursor = position + first * batch
            for indices in found.unbind() if tensors else found.tolist():
                cursor += batch
                yield Share(indices, samples, 0, batch, cursor, cursor == final)
    else:  # a global batch smaller than the number of ranks
        yield from all_shares(order_groups(order, layout, position), layout, (rank,), tensors=tensors)
        return
    if not ends_full:
        start = position + steps * batch
        units = order.take(torch.arange(start, total)).tolist()
        yield from divided(Group(units, total, True), layout, (rank,), tensors)


def order_groups(order: Order, layout: Layout, position: int = 0) -> Iterator[Group]:
    """All ranks' samples of each global batch from `position` on."""
    batch, total = layout.global_batch, order.total
    end = position + num_batches(layout, total, position) * batch
    for first_batch, stop_batch in _blocks(0, num_batches(layout, total, position), batch):
        first = position + first_batch * batch
        block = order.take(torch.arange(first, min(position + stop_batch * batch, total))).tolist()
        for start in range(0, len(block), batch):
            units = block[start : start + batch]
            cursor = first + start + len(units)
            yield Group(units, cursor, cursor >= min(end, total))


def groups_of(
    units: Iterator[Any], layout: Layout, *, cursor: int = 0, batched: bool = False
) -> Iterator[Group]:
    """Global batches of whatever `units` yields: a sampler's indices, or a batch sampler's batches.

    Draws one unit ahead (a whole global batch with `drop_last`), to know which global batch is the last.
    """
    batch = layout.global_batch
    ahead = batch if layout.drop_last else 1
    held = list(itertools.islice(units, batch))
    while len(held) >= (batch if layout.drop_last else 1):
        group, held = held[:batch], held[batch:]
        if len(group) == batch:
            held += itertools.islice(units, max(0, ahead - len(held)))
        cursor += len(group)
        last = len(held) < ahead
        yield Group(group, cursor, last, batched)
        if last:
            return
        held += itertools.islice(units, batch - len(held))


def all_shares(
    groups: Iterable[Group], layout: Layout, ranks: Sequence[int], *, tensors: bool = False
) -> Iterator[Share]:
    """The shares of `ranks`, one global batch after the other and in the order of `ranks` within each."""
    for group in groups:
        yield from divided(group, layout, ranks, tensors)


def divided(group: Group, layout: Layout, ranks: Sequence[int], tensors: bool = False) -> Iterator[Share]:
    """The shares of `ranks` of one global batch."""
    pooled = [one for batch in group.units for one in batch] if group.batched else group.units
    parts = _parts(group, pooled, layout)
    full = 0
    if layout.even_batches and group.last:
        widest = max(len(part) for part in parts)
        full = widest if group.batched else max(widest, layout.full_share())
    for rank in ranks:
        part = parts[rank]
        repeated = max(full, 1) - len(part)
        # A rank repeats its own samples in turn; one that has none, the first sample of the global batch.
        source = part or pooled[:1]
        filled = part + [source[i % len(source)] for i in range(repeated)] if repeated > 0 else part
        indices = torch.tensor(filled, dtype=torch.int64) if tensors else filled
        yield Share(indices, len(part), max(repeated, 0), len(pooled), group.cursor, group.last, None, pooled)


def _parts(group: Group, pooled: list[Any], layout: Layout) -> list[list[Any]]:
    """The real samples of every rank."""
    if callable(layout.shard):
        return _assigned(pooled, layout.shard, layout.size)
    if group.batched and layout.global_batch == layout.size == len(group.units):
        return [list(group.units[layout.slot(rank)]) for rank in range(layout.size)]
    return [pooled[layout.divide(len(pooled), rank)] for rank in range(layout.size)]


def _assigned(pooled: list[Any], assign: Assign, size: int) -> list[list[Any]]:
    owners = list(assign(pooled, size))
    if len(owners) != len(pooled):
        raise ConfigError(
            f"the shard function returned {len(owners)} ranks for a global batch of {len(pooled)} samples; "
            "it must return one rank per sample"
        )
    parts: list[list[Any]] = [[] for _ in range(size)]
    for unit, owner in zip(pooled, owners, strict=True):
        if not 0 <= owner < size:
            raise ConfigError(f"the shard function gave a sample to rank {owner}; ranks are 0 to {size - 1}")
        parts[owner].append(unit)
    return parts
