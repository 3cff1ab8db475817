"""After an interrupt: a session's ranks, which were stopped at different places of a loop, stand at one again.

Their next loop begins at its first line everywhere. What would still be different then is how far each had come:
steps, epochs, micro-steps of a window, checks of the first steps, words about stops and saves. What each has computed
is left as it is; the session names the replicas that differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from nbaccel.core.data import ShardedLoader
from nbaccel.core.loop.loop import Loop
from nbaccel.core.loop.trust import TrustChecks
from nbaccel.wire import occasions

__all__ = ["Regrouping", "Standing"]


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a rank's loop had come."""

    steps: int
    """Optimizer steps."""
    checked: int | None
    """Steps that the checks of the first ones have seen; None when they are over."""
    epochs: tuple[int, ...]
    """Of each prepared loader's next pass."""


@final
class Regrouping:
    """Of one Accelerator.

    Args:
        loaders: all that were prepared; kept by who prepares them.
    """

    def __init__(self, loop: Loop, trust: TrustChecks | None, loaders: list[ShardedLoader]) -> None:
        self._loop, self._trust, self._loaders = loop, trust, loaders
        occasions.at_regrouping(self)

    def standing(self) -> Standing:
        """Where this rank stands."""
        checked = (
            None if self._trust is None or not self._loop.is_watched_by(self._trust) else self._trust.ticks
        )
        return Standing(self._loop.steps, checked, tuple(loader.next_epoch for loader in self._loaders))

    def regroup(self, standings: Sequence[Standing]) -> None:
        """Go to the place of the rank that had come furthest; called on every rank.

        Args:
            standings: of all ranks, in rank order.
        """
        loop = self._loop
        loop.regroup()
        if loop.control is not None:
            loop.control.regroup(max(one.steps for one in standings) - loop.steps)
        if self._trust is not None:
            checked = [one.checked for one in standings if one.checked is not None]
            self._trust.regroup(max(checked) if len(checked) == len(standings) else None)
        if len({len(one.epochs) for one in standings}) > 1:
            return  # some were stopped while they prepared one: it is to be prepared again
        for loader, *epochs in zip(self._loaders, *(one.epochs for one in standings), strict=True):
            if loader.next_epoch != max(epochs):
                loader.set_epoch(max(epochs))
