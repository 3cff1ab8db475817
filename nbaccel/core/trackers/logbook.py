"""What `acc.log`, `init_trackers` and `get_tracker` do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor

from nbaccel.core.trackers.base import Tracker, Trackers, open_trackers
from nbaccel.core.trackers.metriclog import MetricLog
from nbaccel.core.world import World
from nbaccel.errors import ConfigError

__all__ = ["Logbook"]


@final
class Logbook:
    """Where logged values go: to the dashboard at once, to the trackers once they have been started.

    Args:
        wanted: trackers to start, by name or ready made.
        folder: where those by name write.
        reduce: (tensors, "mean" or "sum", 1.0) -> the same over the ranks.
    """

    def __init__(
        self,
        world: World,
        *,
        wanted: Sequence[str | Tracker],
        folder: str | None,
        reduce: Callable[[Any, Any, float], Any],
    ) -> None:
        self._world, self._wanted, self._folder, self._reduce = world, wanted, folder, reduce
        self._log = MetricLog(Trackers(), world=world)

    def start(
        self, project: str, config: Mapping[str, Any] | None, options: Mapping[str, Mapping[str, Any]] | None
    ) -> None:
        """Starts the trackers, on the main process.

        Raises:
            ConfigError: none was asked for, an unknown one, or it has nowhere to write.
        """
        if not self._wanted:
            raise ConfigError("init_trackers needs Accelerator(log_with='jsonl' or 'tensorboard', ...)")
        if self._folder is None and any(isinstance(one, str) for one in self._wanted):
            raise ConfigError("trackers need a folder to write to: Accelerator(project_dir=...)")
        trackers = open_trackers(
            self._wanted,
            folder=Path(self._folder or "."),
            project=project,
            world=self._world,
            config=config,
            options=options,
        )
        self._log = MetricLog(trackers, world=self._world)

    def get(self, name: str) -> Tracker:
        """The running tracker of that name; on the main process only.

        Raises:
            ConfigError: there is none.
        """
        return self._log.trackers.get(name)

    def log(self, values: Mapping[str, Any], *, step: int, reduction: Literal["mean", "sum"] | None) -> None:
        """Takes values of this rank; with `reduction` those of all ranks, which then all call it."""
        if reduction not in (None, "mean", "sum"):
            raise ConfigError(f"log(reduce={reduction!r}): it must be 'mean', 'sum' or None")
        if reduction is not None and self._world.size > 1:
            numbers = {
                name: value.detach().float() if isinstance(value, Tensor) else torch.tensor(float(value))
                for name, value in values.items()
                if isinstance(value, (Tensor, int, float))
            }
            values = {**values, **self._reduce(numbers, reduction, 1.0)}
        self._log.log(values, step=step, reduced=reduction)

    def flush(self) -> None:
        """Hands on what is held back."""
        self._log.flush()

    def close(self) -> None:
        """Hands on the last values and ends the trackers; may be called twice."""
        self._log.close()
