"""Where a loader stands, as plain values that a checkpoint can hold, and the checks when it comes back."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from nbaccel.core.data.order import ORDER_VERSION
from nbaccel.core.data.sampling import draw, load_sampler_state, sampler_state
from nbaccel.errors import CheckpointError, ConfigError

__all__ = ["Position", "skipped"]

_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """A point between two batches of an epoch, counted in what the loop consumed."""

    epoch: int
    samples: int
    """Real samples consumed in this epoch by all ranks (by this rank where `per_rank`)."""
    cursor: int
    """Units of the plan consumed: samples, or batches of a user's batch sampler."""
    seed: int
    kind: str
    total: int | None
    shuffle: bool
    nodes: int
    per_rank: bool
    """Whether it holds for one rank of a world of `size` only."""
    rank: int
    size: int
    seeded: bool
    sampler: dict[str, Any] | None = None
    """The user's sampler as it was when the epoch began."""
    stream: dict[str, Any] | None = None
    """An iterable data set: {"workers": W, "next": w, "consumed": {w: samples},
    "states": {w: state}, "ended": {w: bool}}."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values: numbers, strings, dicts, tensors, and whatever the data set's own state is."""
        return {"format": _FORMAT, "order_version": ORDER_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Position:
        """The position `to_dict` wrote.

        Raises:
            CheckpointError: it is not one.
        """
        names = {f.name for f in fields(cls)}
        if not isinstance(state, Mapping) or state.get("format") != _FORMAT or not names <= set(state):
            missing = sorted(names - set(state)) if isinstance(state, Mapping) else []
            raise CheckpointError(
                f"this is not the state of a loader of this version (format {_FORMAT})"
                + (f": it lacks {', '.join(missing)}" if missing else "")
            )
        # Copied: what was given may be loaded once more, here or by another loader.
        position = cls(**{name: copy.deepcopy(state[name]) for name in names})
        counts = (position.epoch, position.samples, position.cursor)
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in counts):
            raise CheckpointError(
                f"the loader's state has impossible counts (epoch, samples, cursor): {counts}"
            )
        if state.get("order_version") != ORDER_VERSION and position.shuffle and position.cursor:
            raise CheckpointError(
                "the loader's state was saved in the middle of an epoch by a version that shuffles "
                "differently; finish that epoch with that version, or begin a new one with set_epoch()"
            )
        return position

    def check_fits(self, other: Position, *, where: str) -> None:
        """Refuse to go on from this position in a loader that stands at `other` if samples would not match.

        Raises:
            CheckpointError: another data set, sampler kind or order.
            ConfigError: the state belongs to another rank layout and cannot be carried over.
        """
        names = {"kind": "kind of sampling", "total": "length", "shuffle": "shuffling"}
        for name, words in names.items():
            saved, here = getattr(self, name), getattr(other, name)
            if saved != here and self.cursor:
                raise CheckpointError(
                    f"{where}: the saved loader's {words} was {saved!r}, this one's is {here!r}. It was "
                    f"saved {self.samples} samples into epoch {self.epoch}; going on would repeat or skip "
                    "samples. Give the same data set and sampler, or call set_epoch() after loading to begin "
                    "an epoch anew."
                )
        if self.per_rank != other.per_rank:
            raise ConfigError(f"{where}: the state was saved with shard='none' on one side only")
        if self.per_rank and (self.size, self.rank) != (other.size, other.rank) and self.cursor:
            raise ConfigError(
                f"{where}: the data set divides itself among the ranks (shard='none') and its state was "
                f"saved by rank {self.rank} of {self.size}, but this is rank {other.rank} of {other.size}. "
                "Such a state needs the same ranks again: go on with the same number, or let the loader "
                "divide the stream."
            )
        if self.nodes != other.nodes and self.cursor:
            warnings.warn(
                f"{where}: saved on {self.nodes} node(s), going on with {other.nodes}: the rest of epoch "
                f"{self.epoch} keeps the old order, so a node reads samples of others' parts until the next "
                "epoch.",
                stacklevel=4,
            )
        if self.seeded != other.seeded and self.cursor:
            warnings.warn(
                f"{where}: per_sample_seed was {self.seeded} when saved and is {other.seeded} now; random "
                "augmentation will not continue as it would have.",
                stacklevel=4,
            )

    def check_stream(self, workers: int, *, where: str) -> None:
        """Refuse, or say what it costs, to go on in the middle of an iterable data set with `workers`.

        Raises:
            ConfigError: its position is held by another number of loader workers.
        """
        if self.stream is None:
            return
        saved = self.stream["workers"]
        if workers != saved:
            raise ConfigError(
                f"{where}: saved in the middle of an iterable data set read by {saved} loader worker(s), "
                f"which hold its position between them; now there are {workers}. Set num_workers={saved} to "
                "go on."
            )
        stream = self.stream
        unknown = sum(
            count
            for worker, count in stream["consumed"].items()
            if stream["states"][worker] is None and not stream["ended"][worker]
        )
        if unknown:
            warnings.warn(
                f"{where}: its iterable data set cannot say where it is (no state_dict), so {unknown} "
                "samples will be read and dropped before the first batch. They repeat exactly only if the "
                "data set yields the same samples again.",
                stacklevel=4,
            )


def skipped(position: Position, units: int, sampler: Any) -> Position:
    """`position` moved on by `units` of the plan: a batch sampler's batches are drawn to count their samples."""
    samples, stream = units, position.stream
    if position.kind == "batch_sampler":
        before = sampler_state(sampler)
        load_sampler_state(sampler, position.sampler or {})
        batches = draw(sampler, seed=position.seed, epoch=position.epoch, skip=position.cursor)
        samples = sum(len(batch) for batch in itertools.islice(batches, units))
        load_sampler_state(sampler, before)
    elif position.kind == "stream":
        # Without the state of where it will be, the data set is read up to there.
        consumed = position.cursor + units
        stream = {
            "workers": 0,
            "next": 0,
            "consumed": {0: consumed},
            "states": {0: None},
            "ended": {0: False},
        }
    return replace(
        position, samples=position.samples + samples, cursor=position.cursor + units, stream=stream
    )
