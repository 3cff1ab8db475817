"""First looks at a batch, as `next(iter(loader))` before a loop: passes that are left after one batch and no step.

They count as passes in the run that makes them. So a checkpoint keeps which they were, and the run that is resumed,
which leaves out the passes behind it, gives them their batch again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

__all__ = ["Looks"]


@final
class Looks:
    """Of one loader.

    Args:
        told: what `tell` gave, of a run before.
    """

    def __init__(self, told: Iterable[tuple[int, int, bool]] = ()) -> None:
        self._looks = {epoch: (count, last) for epoch, count, last in told}
        """By epoch: how many, and whether no other pass of that epoch came after them."""

    def tell(self) -> list[tuple[int, int, bool]]:
        """For a checkpoint."""
        return [(epoch, count, last) for epoch, (count, last) in self._looks.items()]

    def begin(self, epoch: int) -> None:
        """A pass begins that is not left out."""
        if epoch in self._looks:
            self._looks[epoch] = (self._looks[epoch][0], False)

    def add(self, epoch: int) -> None:
        """The pass was a look."""
        self._looks[epoch] = (self._looks.get(epoch, (0, True))[0] + 1, True)

    def has(self, epoch: int, number: int) -> bool:
        """Whether the pass of an epoch with this number, from 0, was one."""
        return number < self._looks.get(epoch, (0, True))[0]

    def are_all(self, epoch: int, number: int) -> bool:
        """Whether so many looks were all passes of the epoch."""
        count, last = self._looks.get(epoch, (0, False))
        return last and number >= count
