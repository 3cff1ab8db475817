"""The seam to experiment trackers, and several of them as one that cannot fail.

A tracker written for Hugging Face Accelerate (`GeneralTracker`) has these methods and can be passed as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, final

from nbaccel.core.trackers.each import LeftOutError
from nbaccel.core.trackers.place import Place
from nbaccel.errors import ConfigError

__all__ = ["Absent", "FullTracker", "Tracker", "Trackers"]

_logger = logging.getLogger("nbaccel")
_MOST_NAMED = 5
"""Values a warning names."""


class Tracker(Protocol):
    """Something that keeps what is logged. Used on the main process only, in one thread."""

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


class FullTracker(Tracker, Protocol):
    """What a tracker may have besides: each of these methods is optional, and is called where it is there."""

    def store_system(self, facts: dict[str, Any]) -> Any:
        """Called once at the start with what `system.facts` found: devices, versions, the git commit."""

    def log_system(self, values: dict[str, float], step: int, time: float) -> Any:
        """Keeps how busy the machine was at `time` (seconds since the epoch)."""

    def log_images(self, values: dict[str, Any], step: int | None = None) -> Any:
        """Keeps pictures: by name, a list of arrays (height, width, 1, 3 or 4) of uint8."""

    def log_table(
        self, table_name: str, columns: list[str], data: list[list[Any]], step: int | None = None
    ) -> Any:
        """Keeps a table, row by row."""

    def log_file(self, path: Path, name: str) -> Any:
        """Keeps a file, or a folder with all that is in it, under `name`."""

    def finish_failed(self) -> Any:
        """Called in the place of `finish` when the function that was launched has raised, or was interrupted."""


@final
class Trackers:
    """Several trackers as one. What one of them raises is reported once and goes no further."""

    def __init__(
        self, trackers: Sequence[Tracker] = (), *, asked: Sequence[str] = (), place: Place | None = None
    ) -> None:
        """`asked`: names of trackers that do not run here, because this is not the main process or because
        they could not be started. `place`: what is let go of at the end."""
        self._trackers = {tracker.name: tracker for tracker in trackers}
        self._asked = frozenset(asked)
        self._place = place
        self._failures: dict[str, int] = {}
        self._lacking: set[tuple[str, str]] = set()
        self._left_out: set[tuple[str, str]] = set()

    def __len__(self) -> int:
        return len(self._trackers)

    def __iter__(self) -> Iterator[Tracker]:
        return iter(self._trackers.values())

    def get(self, name: str) -> Tracker:
        """The tracker of that name; where it was asked for and does not run, one that keeps nothing.

        Raises:
            ConfigError: there is none; says which there are.
        """
        if name in self._trackers:
            return self._trackers[name]
        if name in self._asked:
            return Absent(name)
        known = ", ".join(map(repr, self._trackers)) or "none on this rank"
        raise ConfigError(f"there is no tracker {name!r}; running: {known}")

    def can(self, what: str) -> bool:
        """Whether any of them has the optional method `what`."""
        return any(hasattr(tracker, what) for tracker in self._trackers.values())

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Gives the hyperparameters to all."""
        for name, tracker in self._trackers.items():
            self._guard(name, partial(tracker.store_init_configuration, dict(values)))

    def log(self, values: Mapping[str, Any], step: int | None) -> None:
        """Gives values to all."""
        for name, tracker in self._trackers.items():
            self._guard(name, partial(tracker.log, dict(values), step=step))

    def store_system(self, facts: Mapping[str, Any]) -> None:
        """Tells those that keep it what this run runs on."""
        self._offer("store_system", dict(facts))

    def log_system(self, values: Mapping[str, float], step: int, time: float) -> None:
        """Gives a sample of the machine's utilisation to those that keep it."""
        self._offer("log_system", dict(values), step=step, time=time)

    def log_images(self, values: Mapping[str, Any], step: int | None) -> None:
        """Gives pictures to those that keep them; says once who does not."""
        self._offer("log_images", dict(values), step=step, thing="images")

    def log_table(self, name: str, columns: list[str], data: list[list[Any]], step: int | None) -> None:
        """Gives a table to those that keep them; says once who does not."""
        self._offer("log_table", name, columns=columns, data=data, step=step, thing="tables")

    def log_file(self, path: Path, name: str) -> None:
        """Gives a file or folder to those that keep them; says once who does not."""
        self._offer("log_file", path, name, thing="files")

    def finish(self, *, failed: bool = False) -> None:
        """Ends all; may be called twice. `failed`: those that can are told that the run has."""
        # the last first: several wrap the console's streams around each other, and each puts back what it had found
        for name, tracker in reversed(self._trackers.items()):
            self._guard(name, (failed and getattr(tracker, "finish_failed", None)) or tracker.finish)
        for name, count in self._failures.items():
            if count > 1:
                _logger.warning("tracker %r failed %d times; what it was given then is lost", name, count)
        self._asked |= self._trackers.keys()
        self._trackers, self._failures = {}, {}
        if self._place is not None:
            self._place.release()

    def _offer(self, what: str, *args: Any, thing: str = "", **kwargs: Any) -> None:
        for name, tracker in self._trackers.items():
            method = getattr(tracker, what, None)
            if method is not None:
                self._guard(name, partial(method, *args, **kwargs))
            elif thing and (name, what) not in self._lacking:
                self._lacking.add((name, what))
                _logger.warning("tracker %r keeps no %s; it goes on without them", name, thing)

    def _guard(self, name: str, do: Callable[[], Any]) -> None:
        try:
            do()
        except LeftOutError as left:
            self._tell_left_out(name, left.why)
        # a tracker is somebody else's code and network, and may call sys.exit: training goes on
        except (Exception, SystemExit) as error:  # noqa: BLE001
            self._failures[name] = self._failures.get(name, 0) + 1
            if self._failures[name] == 1:
                _logger.warning(
                    "tracker %r failed (%s: %s); training goes on, further failures of it are only counted",
                    name,
                    type(error).__name__,
                    error,
                )

    def _tell_left_out(self, name: str, why: Mapping[str, Exception]) -> None:
        """Says which values a tracker does not take, each once."""
        new = {one: error for one, error in why.items() if (name, one) not in self._left_out}
        self._left_out.update((name, one) for one in new)
        if new:
            named = LeftOutError(dict(list(new.items())[:_MOST_NAMED]))
            more = f" and {len(new) - _MOST_NAMED} more" if len(new) > _MOST_NAMED else ""
            _logger.warning("tracker %r does not take %s%s; it keeps the other values", name, named, more)


@final
class Absent:
    """Stands for a tracker that runs on another rank, or that could not be started: every call of it does
    nothing, so that a script may say `acc.get_tracker("wandb").log(...)` on all ranks."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def tracker(self) -> Absent:
        """Itself: there is nothing beneath."""
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keeps nothing."""

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Keeps nothing."""

    def finish(self) -> None:
        """Nothing runs."""
