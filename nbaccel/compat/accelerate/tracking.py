"""What trackers of your own are made from; `log_with` takes any object with these methods."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar, cast

from nbaccel.compat.accelerate.names import look_up
from nbaccel.core.world import read_environment

__all__ = ["GeneralTracker", "on_main_process"]

F = TypeVar("F", bound=Callable[..., Any])


class GeneralTracker(ABC):
    """A tracker. Used on the main process only, whatever `main_process_only` says."""

    main_process_only = True
    name: str
    requires_logging_directory: bool = False

    def __init__(self, _blank: bool = False) -> None:  # noqa: B027 - what it needs is the tracker's business
        pass

    @property
    @abstractmethod
    def tracker(self) -> Any:
        """The object beneath."""

    def start(self) -> None:  # noqa: B027 - optional
        """Called by `init_trackers`, on the main process."""

    @abstractmethod
    def store_init_configuration(self, values: dict[str, Any]) -> Any:
        """Called once with the hyperparameters."""

    @abstractmethod
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> Any:
        """Keeps values."""

    def finish(self) -> Any:  # noqa: B027 - optional
        """Called at the end."""


def on_main_process(function: F) -> F:
    """Decorator of a tracker's methods: on other ranks they do nothing."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if read_environment().rank == 0 else None

    return cast(F, call)


def __getattr__(name: str) -> Any:
    return look_up(__name__, name)
