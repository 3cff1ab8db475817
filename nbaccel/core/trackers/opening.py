"""From what was asked to trackers that run: which there are, what each needs, starting them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from inspect import getattr_static
from pathlib import Path
from typing import Any

from nbaccel.core.trackers.base import Tracker, Trackers
from nbaccel.core.trackers.place import Place, below
from nbaccel.core.world import World
from nbaccel.errors import ConfigError

__all__ = ["needs_folder", "open_trackers"]

_logger = logging.getLogger("nbaccel")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """A tracker built in. Its class is `<home>` in the module of its own beside this file."""

    home: str
    """Module and class."""
    package: str | None = None
    """What must be installed."""
    folder: bool = False
    """Whether it writes to a folder of ours, which must then be given."""


_KINDS: Mapping[str, _Kind] = {
    "jsonl": _Kind(home="jsonl:JsonlTracker", folder=True),
    "csv": _Kind(home="csv:CsvTracker", folder=True),
    "tensorboard": _Kind(home="tensorboard:TensorBoardTracker", package="tensorboard", folder=True),
    "wandb": _Kind(home="wandb:WandbTracker", package="wandb"),
    "mlflow": _Kind(home="mlflow:MlflowTracker", package="mlflow"),
    "comet_ml": _Kind(home="comet:CometTracker", package="comet_ml"),
    "trackio": _Kind(home="trackio:TrackioTracker", package="trackio"),
    "aim": _Kind(home="aim:AimTracker", package="aim"),
}
"""By the names Hugging Face Accelerate has for them."""

_METHODS = ("name", "tracker", "store_init_configuration", "log", "finish")
_LACKS = object()


def open_trackers(
    log_with: Sequence[str | Tracker],
    *,
    folder: Path | None,
    project: str,
    world: World,
    config: Mapping[str, Any] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Trackers:
    """Starts the trackers asked for, on the main process; elsewhere gives none.

    One that cannot be started (no account, no network) is reported and left out.

    Args:
        log_with: names of trackers built in, "all" (of these, what is installed), or trackers themselves.
        folder: where those that write files do, below `project`.
        config: the hyperparameters.
        options: by tracker name, passed to its constructor.

    Raises:
        ConfigError: on every rank alike: an unknown name, its package is not installed, an object that is no
            tracker, two of one name, or options for a tracker that was not asked for.
    """
    asked = _asked(log_with)
    for item in asked:
        _check(item, folder)
    names = [item if isinstance(item, str) else item.name for item in asked]
    if twice := [name for at, name in enumerate(names) if name in names[:at]]:
        raise ConfigError(f"log_with has two trackers called {twice[0]!r}; give one of them another name")
    for name in options or {}:
        if name not in names:
            raise ConfigError(f"init_kwargs has options for {name!r}, which is not in log_with={names}")
    if not world.is_main:
        return Trackers(asked=names)
    home = None if folder is None else below(folder, project)
    place = Place(home) if home is not None and any(map(needs_folder, asked)) else None
    made = [
        _start(
            item,
            place.path if place is not None and needs_folder(item) else home,
            project,
            (options or {}).get(name, {}),
        )
        for item, name in zip(asked, names, strict=True)
    ]
    trackers = Trackers([one for one in made if one is not None], asked=names, place=place)
    if config:
        trackers.store_init_configuration(config)
    return trackers


def needs_folder(item: str | Tracker) -> bool:
    """Whether this tracker writes below the project's folder. ("all" takes what can be started.)"""
    return isinstance(item, str) and item in _KINDS and _KINDS[item].folder


def _asked(log_with: Sequence[str | Tracker]) -> list[str | Tracker]:
    """Each tracker once, "all" spelt out."""
    asked: list[str | Tracker] = []
    for item in log_with:
        asked += [name for name in _KINDS if _installed(name)] if item == "all" else [item]
    return [item for at, item in enumerate(asked) if not isinstance(item, str) or item not in asked[:at]]


def _installed(name: str) -> bool:
    package = _KINDS[name].package
    return package is None or find_spec(package) is not None


def _check(item: str | Tracker, folder: Path | None) -> None:
    if not isinstance(item, str):
        # not hasattr: `tracker` may be a property of what is there only once it was started
        lacks = [name for name in _METHODS if getattr_static(item, name, _LACKS) is _LACKS]
        if isinstance(item, type) or lacks:
            why = "is a class: give an object of it" if isinstance(item, type) else f"has no {lacks[0]}"
            raise ConfigError(
                f"log_with: {item!r} {why}. A tracker has {', '.join(_METHODS)}; those built in are given by name."
            )
        return
    if item not in _KINDS:
        known = ", ".join(map(repr, _KINDS))
        raise ConfigError(
            f"there is no tracker {item!r} built in; there are {known} and 'all'. Pass an object with the methods "
            "of nbaccel.core.trackers.Tracker for any other."
        )
    if not _installed(item):
        raise ConfigError(f"tracker {item!r} needs a package: pip install 'nbaccel[{item}]'")
    if folder is None and needs_folder(item):
        raise ConfigError(f"tracker {item!r} needs a folder to write to: Accelerator(project_dir=...)")


def _start(
    item: str | Tracker, folder: Path | None, project: str, options: Mapping[str, Any]
) -> Tracker | None:
    try:
        if isinstance(item, str):
            module, _, name = _KINDS[item].home.partition(":")
            made: Tracker = getattr(import_module(f"nbaccel.core.trackers.{module}"), name)(
                folder, project=project, **options
            )
            return made
        if (start := getattr(item, "start", None)) is not None:
            start()  # one written for Hugging Face Accelerate begins here, after the process group
        return item
    # somebody else's code and network, which may call sys.exit: training goes on
    except (Exception, SystemExit) as error:  # noqa: BLE001
        _logger.warning(
            "tracker %r could not be started (%s: %s); training goes on without it",
            item if isinstance(item, str) else item.name,
            type(error).__name__,
            error,
        )
        return None
