"""A session's group made whole again: who was lost, who is back, and what the person must know of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import final

from nbaccel.rank.spec import Join
from nbaccel.session.call import CallInFlight
from nbaccel.session.results import rank_ranges

__all__ = ["Recovery"]

# A group whose ranks are lost again while they come up is given up.
_MOST = 3


@final
class Recovery:
    """What is known of the ranks' process group. Belongs to the relay's thread.

    Args:
        num_ranks: of the group.
    """

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self.generation = 0
        """How many times the group has been made again."""
        self._tries = 0
        self._counts: dict[int, int] = {}
        self._back: set[int] = set()
        self._respawning: set[int] = set()
        self._replicas: dict[int, Mapping[str, str]] = {}

    def answered(self, rank: int, collectives: int) -> None:
        """A call has ended on a rank, which has called so many collectives (-1: it has no group any more)."""
        self._counts[rank] = collectives

    def is_needed(self, call: CallInFlight) -> bool:
        """Whether the next call cannot use the group as it is: somebody was stopped in the middle of a
        collective, destroyed the group, or failed when others had called more."""
        if -1 in self._counts.values() or call.signalled:
            return True
        alike = len(self._counts) == self._num_ranks and len(set(self._counts.values())) == 1
        return call.ending.reason != "returned" and not alike

    def begin(self, lost: Collection[int]) -> Join | None:
        """Make the group again, `lost` as fresh processes; the order to the others, None after too many
        tries in a row."""
        self._tries += 1
        self.generation += 1
        self._back, self._respawning, self._replicas = set(), set(lost), {}
        keep_groups = not lost and -1 not in self._counts.values()
        return Join(self.generation, keep_groups) if self._tries <= _MOST else None

    def respawned(self, rank: int) -> None:
        """A fresh process has taken a lost one's place."""
        self._respawning.discard(rank)

    def is_replacing(self, rank: int) -> bool:
        """Whether what is heard of this rank's end is the end of the process before."""
        return rank in self._respawning

    def is_back(self, rank: int) -> bool:
        """A rank is in the group; whether all are now."""
        self._back.add(rank)
        return len(self._back) == self._num_ranks

    def compared(self, rank: int, replicas: Mapping[str, str]) -> None:
        """The checksums of a rank's replicas."""
        self._replicas[rank] = replicas

    def finish(self) -> list[str]:
        """All are back; what is to be said of replicas that stopped at different steps."""
        self._tries = 0
        self._counts.clear()
        notes = []
        for name in sorted({name for replicas in self._replicas.values() for name in replicas}):
            sums = {rank: one[name] for rank, one in self._replicas.items() if name in one}
            first = min(sums)
            odd = [rank for rank, checksum in sums.items() if checksum != sums[first]]
            if odd:
                notes.append(
                    f"the replicas of {name} are not equal any more: rank {rank_ranges(odd)} differs from rank "
                    f"{first}. They stopped at different steps; broadcast one rank's, or load a checkpoint"
                )
        self._replicas = {}
        return notes

    def name_lost(self, lost: Collection[int]) -> str:
        """Whose variables are gone, and whose are not."""
        kept = [rank for rank in range(self._num_ranks) if rank not in lost]
        many = len(lost) > 1
        return (
            f"rank{'s' if many else ''} {rank_ranges(lost)} {'were' if many else 'was'} replaced by a fresh "
            f"process: {'their' if many else 'its'} variables are lost"
            + (
                f"; rank{'s' if len(kept) > 1 else ''} {rank_ranges(kept)} keep"
                f"{'' if len(kept) > 1 else 's'} {'theirs' if len(kept) > 1 else 'its own'}"
                if kept
                else ""
            )
        )
