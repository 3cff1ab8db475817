"""ShardedLoader: a DataLoader divided over the ranks, which knows where it is and can go on from there.

plan (who reads what) -> reading (here or in workers) -> dispatch, if rank 0 reads for all
                      -> transfer (to the device)     -> the loop, where `position` counts
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, final

import torch
from torch.utils.data import DataLoader

from nbaccel.core.data.agreement import agree, make_layout, warn_of_disorder, warn_of_tails
from nbaccel.core.data.dispatch import Receiver, Sender
from nbaccel.core.data.place import Place
from nbaccel.core.data.plan import Shard, Share, num_batches
from nbaccel.core.data.reading import MapReader, Reader, StreamBatches
from nbaccel.core.data.source import read_dataloader
from nbaccel.core.data.transfer import Transfer
from nbaccel.core.data.upload import Upload
from nbaccel.core.data.wires import connect_wires
from nbaccel.core.refused import LOADER
from nbaccel.core.world import World
from nbaccel.errors import ConfigError
from nbaccel.wire import events

__all__ = ["LoopControl", "ShardedLoader"]

_EMIT_EVERY = 0.1  # seconds between two Progress events of a loader


class LoopControl(Protocol):
    """What the owner of the training loop wants to know of its loaders, and to decide."""

    def began(self, loader: ShardedLoader) -> None:
        """A pass over the loader is about to begin; its place may still be set."""

    def ended(self, loader: ShardedLoader) -> None:
        """The pass is over: at its end, left early, or by an exception."""

    def should_stop(self, loader: ShardedLoader) -> bool:
        """Asked before each batch: True ends the pass here, and its position stays."""

    def why_stopped(self, loader: ShardedLoader) -> str:
        """What to tell whoever reads the pass with `next()`, where `should_stop` has ended it."""

    def times(self, loader: ShardedLoader) -> Mapping[str, float] | None:
        """Seconds by part of the step since it was last asked, for Progress."""


@final
class ShardedLoader:
    """Batches of this rank, on its device, of a data set divided over all ranks.

    Each sample of an epoch is seen once over all ranks, whatever their number, also when the run was
    interrupted in between (`state_dict`). A pass begins at the first batch of the next epoch, or where
    `load_state_dict` points.

    Args:
        dataloader: the torch DataLoader to take data set, sampler, batch size, workers and collate_fn from.
        world: the ranks. Making the loader is collective: they compare what they were given.
        device: where batches go; the world's device if None.
        seed: of the epochs' orders; None takes the shuffling generator's, else rank 0's torch seed.
        even_batches: repeat samples in the last batch so that all ranks' batches are full.
        tell_repeats: say so, where the script has asked for it.
        split_batches: `batch_size` is that of the global batch and not of each rank.
        dispatch: rank 0 reads for all ranks and sends them their batches.
        shard: how a global batch is divided: "interleaved", "contiguous", "node" (every node keeps to its
            own contiguous part of the data set), "none" (an iterable data set that divides itself), or a
            function (samples' indices, number of ranks) -> the rank of each.
        per_sample_seed: read every sample under the seed (seed, epoch, index), so that random
            augmentation is the same whoever reads it and after resuming.
        name: of the progress bar.
        loop: told when a pass begins and ends, asked whether to stop.
        axis: the world as the samples are divided over it, where several ranks get the same ones.
        upload: how a thread moves tensors to the device ahead of the loop; None: as the device has it.

    Raises:
        ConfigError: not a DataLoader, or options that cannot be honoured together.
        TrustError: the ranks were given different loaders.
    """

    def __init__(
        self,
        dataloader: DataLoader[Any],
        *,
        world: World,
        device: torch.device | str | None = None,
        seed: int | None = None,
        even_batches: bool = False,
        tell_repeats: bool = True,
        split_batches: bool = False,
        dispatch: bool = False,
        shard: Shard = "interleaved",
        per_sample_seed: bool = False,
        name: str = "train",
        loop: LoopControl | None = None,
        axis: World | None = None,
        upload: Upload | None = None,
    ) -> None:
        axis = world if axis is None else axis
        if dispatch and axis.size != world.size:
            raise ConfigError("dispatch_batches=True cannot go with tensor parallelism; leave it out")
        source = read_dataloader(dataloader, axis.size)
        self.dataloader = dataloader
        self.name = name
        self.world = world
        self._axis = axis
        self.device = torch.device(world.device if device is None else device)
        self._source = source
        self._layout = make_layout(source, axis, even_batches, split_batches, dispatch, shard)
        self._dispatch = dispatch and world.size > 1
        self._per_rank = shard == "none"
        self._seeded = per_sample_seed
        self._loop = loop
        self._place = Place(
            source,
            self._layout,
            axis,
            seed=agree(source, self._layout, world, seed, (dispatch, split_batches, per_sample_seed)),
            seeded=per_sample_seed,
            per_rank=self._per_rank,
            workers=dataloader.num_workers,
            where=f"loader {name!r} on rank {world.rank}",
        )
        self._reader = self._make_reader()
        wires = connect_wires(world) if self._dispatch else {}
        self._sender = Sender(wires) if wires and world.rank == 0 else None
        self._receiver = Receiver(world, wires[0]) if wires and world.rank else None
        self._transfer = Transfer(self.device, upload)
        self._passes = self._steps = self._entries = self._repeated = 0
        self._share: Share | None = None
        self._emitted, self._unsent = 0.0, False
        self.data_seconds = 0.0
        """Seconds the loop has waited for batches so far."""
        if world.rank == 0:
            warn_of_tails(source, self._layout, name, repeats=tell_repeats)
            warn_of_disorder(dataloader)

    # What the loop sees -------------------------------------------------------------------------

    def __iter__(self) -> Generator[Any, None, str | None]:
        self._passes += 1
        loop, place, clock, number = self._loop, self._place, time.perf_counter, self._passes
        try:
            reads = self._begin()
            while True:
                if number != self._passes:
                    raise ConfigError(
                        f"loader {self.name!r} is iterated twice at once; its position can follow one pass "
                        "only. Prepare a second DataLoader for the inner loop."
                    )
                if loop is not None and loop.should_stop(self):
                    return loop.why_stopped(self)  # the text of the StopIteration
                started = clock()
                read = next(reads, None)
                if read is None:
                    place.rewind(place.epoch + 1)
                    return None
                share = read[1]
                arrived = clock()
                self.data_seconds += arrived - started
                self._share = share
                self._entries += share.samples + share.repeated
                self._repeated += share.repeated
                place.cursor = share.cursor
                counted = share.global_samples
                place.samples += share.samples if counted is None else counted
                self._steps += 1
                if share.origin is not None:
                    place.remember(share.origin)
                if events.active():
                    self._emit(arrived, share.last)
                yield read[0]
        finally:
            if number == self._passes:
                self._end()

    def __len__(self) -> int:
        """Batches of a whole epoch, the same on every rank: of the pass in progress, or of the next one.

        Raises:
            TypeError: the data set or sampler has no length.
        """
        total = self._place.units()
        if total is None:
            raise TypeError(f"the length of this loader is unknown: its {self._source.kind} has no __len__")
        return num_batches(self._layout, total)

    @property
    def next_epoch(self) -> int:
        """The epoch of the next pass."""
        return self._place.next_epoch

    @property
    def resumes(self) -> bool:
        """Whether the next pass begins where `load_state_dict` or `skip_batches` has set it."""
        return self._place.resumes

    @property
    def epoch(self) -> int:
        """The epoch of the pass in progress, or of the next one."""
        return self._place.epoch

    @property
    def seed(self) -> int:
        """Of the epochs' orders."""
        return self._place.seed

    @property
    def position(self) -> int:
        """Samples of this epoch the loop has consumed, over all ranks (of this rank with shard="none")."""
        return self._place.samples

    @property
    def remeasured(self) -> int:
        """Samples of the data set as the last pass found it, where it was another number when the ranks compared it;
        else 0."""
        return self._place.remeasured

    @property
    def at_end(self) -> bool:
        """Whether the batch in hand is the last of the epoch."""
        return self._share is not None and self._share.last

    @property
    def batch_samples(self) -> int:
        """Real samples in this rank's batch in hand; what else it holds is repeated and does not count."""
        return self._share.samples if self._share is not None else 0

    @property
    def batch_repeated(self) -> int:
        """Repeated samples at the end of this rank's batch in hand."""
        return self._share.repeated if self._share is not None else 0

    @property
    def pass_entries(self) -> tuple[int, int]:
        """Entries of all this rank's batches since the pass began, also when it is over, and how many are repeated."""
        return self._entries, self._repeated

    @property
    def global_batch_samples(self) -> int | None:
        """Real samples in all ranks' batches in hand; None with shard="none", where a rank cannot know."""
        return self._share.global_samples if self._share is not None else 0

    @property
    def batch_indices(self) -> Any:
        """Sample indices of the batch in hand, real ones only; None where this rank does not know them."""
        share = self._share
        if share is None or share.origin is not None or self._receiver is not None:
            return None
        if self._source.kind == "stream":
            return None
        return share.indices[: share.samples]

    @property
    def global_batch_indices(self) -> Any:
        """Sample indices of all ranks' batches in hand as a user's sampler gave them on this rank; None where
        no sampler did."""
        return None if self._share is None or "sampler" not in self._source.kind else self._share.units

    @property
    def global_batch_digests(self) -> tuple[int, ...]:
        """Checksums of what this rank has read of an iterable data set for all ranks' batches in hand; empty but
        for the first batches of a pass."""
        if self._share is None or self._per_rank or self._source.kind != "stream":
            return ()
        return self._share.units or ()

    @property
    def total_samples(self) -> int | None:
        """Samples an epoch gives over all ranks; None when unknown."""
        total, batch = self._place.units(), self._layout.global_batch
        if total is None or self._source.kind == "batch_sampler" or self._per_rank:
            return None
        return total - total % batch if self._layout.drop_last else total

    @property
    def total_batch_size(self) -> int | None:
        """Samples of a full global batch; None where a batch sampler or the data set decides."""
        return None if self._source.batch_size is None else self._layout.global_batch

    @property
    def ends_thin(self) -> bool:
        """Whether some rank has one sample or none of its own in the last batch of an epoch, and a batch more."""
        total, layout = self._place.units(), self._layout
        if total is None or self._source.batch_size is None or layout.drop_last or layout.even_batches:
            return False
        return 0 < total % layout.global_batch < 2 * layout.size and layout.global_batch >= 2 * layout.size

    @property
    def with_replacement(self) -> bool:
        """Whether the sampler may give a sample more than once."""
        return self._source.with_replacement

    @property
    def dataset(self) -> Any:
        """The user's data set."""
        return self._source.dataset

    @property
    def even_batches(self) -> bool:
        """Whether the last batch of an epoch is filled with repeated samples."""
        return self._layout.even_batches

    @contextmanager
    def filling(self, even_batches: bool) -> Iterator[None]:
        """A context whose passes fill the last batch of an epoch with repeated samples, or do not."""
        before = self._layout, self._reader
        self._layout = replace(self._layout, even_batches=even_batches)
        self._reader = self._make_reader()
        try:
            yield
        finally:
            self._layout, self._reader = before

    def __getattr__(self, name: str) -> Any:
        """What else the user's DataLoader has: `batch_size`, `sampler`, `batch_sampler`, `num_workers`, …"""
        if name == "dataloader" or name.startswith("_"):
            raise AttributeError(name)
        try:
            return getattr(self.dataloader, name)
        except AttributeError:
            if name in LOADER:
                raise AttributeError(f"loader.{name} {LOADER[name]}") from None
            raise

    @property
    def transfer_seconds(self) -> float:
        """Seconds the host has spent on moving batches to the device so far."""
        return self._transfer.seconds

    # Where it stands ----------------------------------------------------------------------------

    @property
    def state_scope(self) -> str:
        """ "global" if rank 0's state serves every rank of any world, "rank" if each needs its own back."""
        return "rank" if self._per_rank else "global"

    def state_dict(self) -> dict[str, Any]:
        """Where the loop stands: the batch in hand counts as consumed, prefetched ones do not.

        So it is after a `break` too: what resumes reads the rest of the epoch, where the next pass here is that of the
        next one.
        """
        return self._place.position().to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next pass go on where `state` was taken, on any number of ranks.

        Raises:
            CheckpointError: not a loader's state, or one of another data set or sampler.
            ConfigError: it belongs to one rank or worker, and those are others now.
        """
        self._place.load(state)

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass that of `epoch`. The place `load_state_dict` set in that same epoch is kept."""
        self._place.set_epoch(epoch)

    def skip_batches(self, count: int) -> None:
        """Let the next pass begin `count` batches further on than it would; map-style samples are not read.

        Raises:
            ConfigError: not a number of batches, or an iterable data set read by loader workers.
        """
        self._place.skip(count)

    def _make_reader(self) -> Reader:
        kind = StreamBatches if self._source.kind == "stream" else MapReader
        ranks = range(self._axis.size) if self._dispatch else (0 if self._per_rank else self._axis.rank,)
        pin = self.device.type == "cuda" and self.dataloader.pin_memory
        return kind(self._source, self._layout, ranks, self.dataloader, seeded=self._seeded, pin=pin)

    # One pass -----------------------------------------------------------------------------------

    def _begin(self) -> Iterator[tuple[Any, Share]]:
        if self._loop is not None:
            self._loop.began(self)
        place, self._share = self._place, None
        place.begin()
        self._entries = self._repeated = 0
        self._steps = -(-place.cursor // self._layout.global_batch)
        if callable(getattr(self.dataset, "set_epoch", None)):
            self.dataset.set_epoch(place.epoch)
        if self._receiver is not None:
            reads = self._received(self._receiver)
        else:
            reads = self._reader.read(place.position())
            if self._sender is not None:
                reads = self._sent(reads, self._sender)
        return self._transfer.moved(reads)

    def _emit(self, now: float, last: bool) -> None:
        self._unsent = True
        if now - self._emitted < _EMIT_EVERY and not last:
            return
        self._emitted, self._unsent = now, False
        total = None if self._place.total is None else len(self)
        times = None if self._loop is None else self._loop.times(self)
        events.emit(
            events.Progress(
                name=self.name,
                step=self._steps,
                total=total,
                epoch=self._place.epoch,
                unit="batch",
                times=times,
                workers=self.dataloader.num_workers,
            )
        )

    def _end(self) -> None:
        if self._unsent:
            self._emit(time.perf_counter(), True)
        if self._loop is not None:
            self._loop.ended(self)
        self._share = None

    def _sent(self, reads: Iterator[tuple[Any, Share]], sender: Sender) -> Iterator[tuple[Any, Share]]:
        number, step, size = self._passes, 0, self.world.size
        try:
            for first in reads:
                together = [first, *(next(reads) for _ in range(size - 1))]
                sender.send([one[0] for one in together], [one[1] for one in together], (number, step))
                yield first
                step += 1
                if first[1].last:
                    break
            if step == 0:
                sender.finish((number, 0))
            sender.wait()  # the process may end now: what is under way must have arrived
        except GeneratorExit:  # the loop was left early
            sender.wait()
            raise
        except Exception as error:
            sender.fail(error, (number, step))
            raise

    def _received(self, receiver: Receiver) -> Iterator[tuple[Any, Share]]:
        step = 0
        while True:
            read = receiver.receive((self._passes, step))
            if read is None:
                return
            yield read
            step += 1
            if read[1].last:
                return
