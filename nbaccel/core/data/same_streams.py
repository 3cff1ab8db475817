"""Workers that read the same samples: an iterable data set is given to each of them whole, and has to divide itself."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import final

from nbaccel.ownership import level_of_call

__all__ = ["SameStreams"]

_ENOUGH = 4  # different samples: fewer may be equal by chance, or be all that there are


@final
class SameStreams:
    """Compares what a loader's workers have read, by checksums of the first samples of each in a pass.

    Args:
        dataset: the name of the data set's class, for the warning.
        workers: how many there are.
    """

    def __init__(self, dataset: str, workers: int) -> None:
        self._dataset, self._workers = dataset, workers
        self._read: dict[int, list[int]] = {}
        self._told = False

    def begin(self) -> None:
        """A pass begins."""
        self._read.clear()

    def add(self, worker: int, digests: Sequence[int]) -> None:
        """A worker has read a batch more, of which these samples are known; warns if another has read the same."""
        mine = self._read.setdefault(worker, [])
        mine += digests
        for other, theirs in self._read.items():
            common = min(len(mine), len(theirs))
            if other == worker or len(set(mine[:common])) < _ENOUGH or mine[:common] != theirs[:common]:
                continue
            if not self._told:
                self._told = True
                warnings.warn(
                    f"workers {min(worker, other)} and {max(worker, other)} of the loader over {self._dataset} read "
                    f"the same samples, so they come up to {self._workers} times in an epoch: every worker is given "
                    "the whole iterable data set. Let each yield a part of it, by torch.utils.data.get_worker_info() "
                    "in __iter__, or set num_workers to 1",
                    stacklevel=level_of_call(),
                )
            return
