"""The seam to experiment trackers, and several of them as one that cannot fail.

A tracker written for Hugging Face Accelerate (`GeneralTracker`) has these methods and can be passed as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, final

from nbaccel.core.world import World
from nbaccel.errors import ConfigError

__all__ = ["Tracker", "Trackers", "open_trackers"]

_logger = logging.getLogger("nbaccel")
_NEEDS = {"jsonl": None, "tensorboard": "tensorboard"}
"""The trackers built in, by name, with the package each needs."""


class Tracker(Protocol):
    """Something that keeps what is logged. Used on the main process only."""

    @property
    def name(self) -> str:
        """What it is called in messages and in `get_tracker`."""

    @property
    def tracker(self) -> Any:
        """The object beneath: a SummaryWriter, a run, a path."""

    def store_init_configuration(self, values: dict[str, Any]) -> Any:
        """Called once at the start with the hyperparameters."""

    def log(self, values: dict[str, Any], step: int | None = None) -> Any:
        """Keeps numbers, strings, or (small) CPU tensors under their names."""

    def finish(self) -> Any:
        """Called once at the end."""


@final
class Trackers:
    """Several trackers as one. What one of them raises is reported once and goes no further."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = {tracker.name: tracker for tracker in trackers}
        self._failures: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._trackers)

    def get(self, name: str) -> Tracker:
        """The tracker of that name.

        Raises:
            ConfigError: there is none; says which there are.
        """
        if name not in self._trackers:
            known = ", ".join(map(repr, self._trackers)) or "none on this rank"
            raise ConfigError(f"there is no tracker {name!r}; running: {known}")
        return self._trackers[name]

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Gives the hyperparameters to all."""
        for name, tracker in self._trackers.items():
            self._guard(name, partial(tracker.store_init_configuration, dict(values)))

    def log(self, values: Mapping[str, Any], step: int | None) -> None:
        """Gives values to all."""
        for name, tracker in self._trackers.items():
            self._guard(name, partial(tracker.log, dict(values), step=step))

    def finish(self) -> None:
        """Ends all; may be called twice."""
        for name, tracker in self._trackers.items():
            self._guard(name, tracker.finish)
        for name, count in self._failures.items():
            if count > 1:
                _logger.warning("tracker %r failed %d times; what it was given then is lost", name, count)
        self._trackers, self._failures = {}, {}

    def _guard(self, name: str, do: Callable[[], Any]) -> None:
        try:
            do()
        except Exception as error:  # noqa: BLE001 - a tracker is somebody else's code and network; training goes on
            self._failures[name] = self._failures.get(name, 0) + 1
            if self._failures[name] == 1:
                _logger.warning(
                    "tracker %r failed (%s: %s); training goes on, further failures of it are only counted",
                    name,
                    type(error).__name__,
                    error,
                )


def open_trackers(
    log_with: Sequence[str | Tracker],
    *,
    folder: Path,
    project: str,
    world: World,
    config: Mapping[str, Any] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Trackers:
    """Starts the trackers asked for, on the main process; elsewhere gives none.

    Args:
        log_with: "jsonl", "tensorboard", "all" (of these, what is installed), or trackers themselves.
        folder: where the built-in ones write, below `project`.
        config: the hyperparameters.
        options: by tracker name, passed to its constructor.

    Raises:
        ConfigError: on every rank alike: an unknown name, or its package is not installed.
    """
    asked: list[str | Tracker] = []
    for item in log_with:
        asked += [n for n in _NEEDS if _installed(n)] if item == "all" else [item]
    for item in asked:
        _check(item)
    if not world.is_main:
        return Trackers()
    made = [
        _make(item, folder / project, (options or {}).get(item, {})) if isinstance(item, str) else item
        for item in asked
    ]
    trackers = Trackers(made)
    if config:
        trackers.store_init_configuration(config)
    return trackers


def _installed(name: str) -> bool:
    package = _NEEDS[name]
    return package is None or find_spec(package) is not None


def _check(item: str | Tracker) -> None:
    if not isinstance(item, str):
        return
    if item not in _NEEDS:
        known = ", ".join(map(repr, _NEEDS))
        raise ConfigError(
            f"there is no tracker {item!r} built in; there are {known} and 'all'. Pass an object with the methods "
            "of nbaccel.core.trackers.Tracker for any other."
        )
    if not _installed(item):
        raise ConfigError(f"tracker {item!r} needs a package: pip install 'nbaccel[{item}]'")


def _make(name: str, folder: Path, options: Mapping[str, Any]) -> Tracker:
    if name == "tensorboard":
        from nbaccel.core.trackers.tensorboard import TensorBoardTracker

        return TensorBoardTracker(folder, **options)
    from nbaccel.core.trackers.jsonl import JsonlTracker

    return JsonlTracker(folder, **options)
