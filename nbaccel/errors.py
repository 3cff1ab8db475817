"""Every exception nbaccel raises on purpose.

NbaccelError
├── ConfigError            what was asked cannot be done; nothing was started
│   └── PayloadError       the function or an argument cannot travel to the ranks
├── LaunchError            the ranks could not be brought up
├── WorkerError            a rank failed while it ran the user's code
├── RunTimeout             the run took longer than its `max_time`
├── RunInterrupted         a run that a task awaited was interrupted or killed
├── CollectiveMismatch     ranks called the same collective with different shapes or types
├── CheckpointError        a checkpoint is incomplete, damaged, or of another model
└── TrustError             ranks that should be equal are not
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

__all__ = [
    "CheckpointError",
    "CollectiveMismatch",
    "ConfigError",
    "LaunchError",
    "LeftLoopError",
    "NbaccelError",
    "PayloadError",
    "RunInterrupted",
    "RunTimeout",
    "TrustError",
    "WorkerError",
]


class NbaccelError(Exception):
    """The root: catch this to catch whatever nbaccel raises on purpose."""

    @staticmethod
    def paint(error: BaseException) -> list[str]:
        """The lines of its traceback; the notebook puts a way of its own here."""
        return traceback.format_exception(error)

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of all local frames (IPython's own protocol)."""
        return self.paint(self)


class ConfigError(NbaccelError, ValueError):
    """What was asked cannot be honoured. Raised before any process starts."""


class PayloadError(ConfigError):
    """The function or one of its arguments cannot be sent to the ranks; the message names it."""


class LaunchError(NbaccelError, RuntimeError):
    """The ranks could not be brought up; the message gives the state of each."""


class WorkerError(NbaccelError, RuntimeError):
    """One or more ranks failed while running the user's code.

    `str(error)` holds the whole story: which rank, its traceback, what became of the others.
    `__cause__` is the rank's own exception where it could be brought back.

    Args:
        message: the report, ready to print.
        ranks: the ranks that failed by themselves, the first failure first.
        exitcodes: exit code by rank for those that ended without an exception (negative: a signal).
        rendered: the same report as coloured lines, for IPython.
    """

    def __init__(
        self,
        message: str,
        *,
        ranks: tuple[int, ...] = (),
        exitcodes: dict[int, int] | None = None,
        rendered: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.ranks = ranks
        self.exitcodes = dict(exitcodes or {})
        self.rendered = rendered

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of the local frames: the remote traceback (IPython's own protocol)."""
        return list(self.rendered) or str(self).splitlines()


class _EndedEarlyError(NbaccelError):
    """A run was ended before its ranks had returned.

    Args:
        results: what some had returned all the same, in rank order; None for the others.
    """

    def __init__(self, message: str, *, results: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.results = results


class RunTimeout(_EndedEarlyError, TimeoutError):
    """The run was ended because it took longer than `max_time`; `results` are what ranks had returned."""


class RunInterrupted(_EndedEarlyError, RuntimeError):
    """A run was interrupted or killed while a task awaited it; `results` are what ranks had returned.

    `Run.result` raises KeyboardInterrupt for the same, which would end the event loop, and with it a notebook's kernel.
    """


class CollectiveMismatch(NbaccelError, RuntimeError):
    """Ranks entered the same collective with different shapes, dtypes or structures."""


class CheckpointError(NbaccelError, RuntimeError):
    """A checkpoint is incomplete, damaged, or belongs to another model."""


class TrustError(NbaccelError, RuntimeError):
    """A trust check found ranks that disagree where they must be equal."""


class LeftLoopError(TrustError):
    """Another rank has left the loop that this one goes on with: by a break, or by an error, the cause then."""
