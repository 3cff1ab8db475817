"""Where a loader stands between two batches, moved on by its passes, and set by whoever resumes or skips."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from nbaccel.core.data.iterable import Origin
from nbaccel.core.data.plan import Layout
from nbaccel.core.data.sampling import load_sampler_state, sampler_state, set_sampler_epoch
from nbaccel.core.data.source import Source
from nbaccel.core.data.state import Position, skipped
from nbaccel.core.world import World
from nbaccel.errors import ConfigError

__all__ = ["Place"]


@final
class Place:
    """The epoch, and how far the loop is in it.

    Args:
        workers: processes that read.
        where: the loader and its rank, for errors.
    """

    def __init__(
        self,
        source: Source,
        layout: Layout,
        axis: World,
        *,
        seed: int,
        seeded: bool,
        per_rank: bool,
        workers: int,
        where: str,
    ) -> None:
        self._source, self._layout, self._axis = source, layout, axis
        self._seeded, self._per_rank, self._workers, self._where = seeded, per_rank, workers, where
        self.seed = seed
        self.epoch = 0
        """Of the pass in progress, or of the next one."""
        self.samples = self.cursor = 0
        """As in `Position`; counted on by the loader for each batch that the loop gets."""
        self.total = source.total
        """Units of the last pass."""
        self.remeasured = 0
        """See `ShardedLoader.remeasured`."""
        self._nodes = layout.nodes
        self._sampler_start: dict[str, Any] | None = None
        self._stream: dict[str, Any] | None = None
        self._started = False
        """Whether a pass of this epoch has begun."""
        self._resume: Position | None = None
        """Where the next pass begins, if it was set."""

    @property
    def resumes(self) -> bool:
        """Whether the next pass begins where `load` or `skip` has set it."""
        return self._resume is not None

    @property
    def next_epoch(self) -> int:
        """The epoch of the next pass."""
        return self.epoch + (self._started and self._resume is None)

    def units(self) -> int | None:
        """Units of the pass in progress, or of the next one."""
        measure = self._source.measure
        return self.total if measure is None or self._started else measure()

    def position(self) -> Position:
        """As a checkpoint takes it."""
        source = self._source
        sampler = self._sampler_start
        if source.sampler is not None and not self._started and self._resume is None:
            sampler = sampler_state(source.sampler)
        return Position(
            epoch=self.epoch,
            samples=self.samples,
            cursor=self.cursor,
            seed=self.seed,
            kind=source.kind,
            total=self.units(),
            shuffle=source.shuffle,
            nodes=self._nodes,
            per_rank=self._per_rank,
            rank=self._axis.rank,
            size=self._axis.size,
            seeded=self._seeded,
            sampler=sampler,
            stream=self._stream,
        )

    def load(self, state: Mapping[str, Any]) -> None:
        """See `ShardedLoader.load_state_dict`."""
        position = Position.from_dict(state)
        position.check_fits(self.position(), where=self._where)
        position.check_stream(self._workers, where=self._where)
        self._resume = position
        self.seed = position.seed
        self.epoch, self.samples, self.cursor = position.epoch, position.samples, position.cursor
        self._sampler_start, self._stream = position.sampler, position.stream
        self._nodes = position.nodes if position.cursor else self._layout.nodes
        self._started = False

    def set_epoch(self, epoch: int) -> None:
        """See `ShardedLoader.set_epoch`."""
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ConfigError(f"an epoch must be an int of at least 0, not {epoch!r}")
        if self._resume is None or self._resume.epoch != epoch:
            self._resume = None
            self.rewind(epoch)

    def skip(self, count: int) -> None:
        """See `ShardedLoader.skip_batches`."""
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ConfigError(f"skip_batches takes a number of batches of at least 0, not {count!r}")
        if self._resume is None:
            self.rewind(self.next_epoch)
        before = self.position()
        if before.kind == "stream" and self._workers:
            raise ConfigError(
                "skip_batches over an iterable data set needs num_workers=0; its state_dict does not"
            )
        units = count * self._layout.global_batch
        if before.total is not None:
            units = min(units, before.total - before.cursor)
        self.load(skipped(before, units, self._source.sampler).to_dict())

    def rewind(self, epoch: int) -> None:
        """To the beginning of an epoch."""
        self.epoch, self.samples, self.cursor = epoch, 0, 0
        self._stream, self._nodes, self._started = None, self._layout.nodes, False

    def begin(self) -> None:
        """A pass begins: where it was set to, or with the next epoch."""
        sampler, resume = self._source.sampler, self._resume
        if resume is None:
            self.rewind(self.next_epoch)
            if sampler is not None:
                self._sampler_start = sampler_state(sampler)
        else:
            # The data set may have grown or shrunk since the state was loaded.
            if resume.total != self.units():
                resume.check_fits(self.position(), where=self._where)
            if sampler is not None and resume.sampler is not None:
                load_sampler_state(sampler, resume.sampler)
        self.total = self.units()
        self.remeasured = (self.total or 0) if self.total != self._source.total else 0
        self._resume, self._started = None, True
        if sampler is not None:
            set_sampler_epoch(sampler, self.epoch)

    def remember(self, origin: Origin) -> None:
        """Keeps where an iterable data set stood after the batch that is in hand."""
        if self._stream is None:
            self._stream = {"workers": self._workers, "next": 0, "consumed": {}, "states": {}, "ended": {}}
        self._stream["consumed"][origin.worker] = origin.consumed
        self._stream["states"][origin.worker] = origin.state
        self._stream["ended"][origin.worker] = origin.ended
        self._stream["next"] = (origin.worker + 1) % max(1, self._workers)
        self.cursor = self.samples
