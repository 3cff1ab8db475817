"""What ranks returned is kept when the run was stopped."""

from __future__ import annotations

from typing import Any

import pytest

from nbaccel.errors import RunTimeout
from nbaccel.session.ending import Limits, Reason
from nbaccel.session.outcome import Ended, conclude
from nbaccel.wire import payload
from nbaccel.wire.events import ExceptionInfo, Frame, Raised


def cannot_open() -> None:
    raise ValueError("locked")


class Locked:
    def __reduce__(self) -> Any:
        return cannot_open, ()


def ended(reason: Reason, *, keep: bool = False) -> Ended:
    """Rank 0 returned a list, rank 1 what cannot be opened, rank 2 was stopped."""
    frame = Frame("/code/train.py", 8, "train", "")
    stopped = Raised(rank=2, call=0, info=ExceptionInfo("KeyboardInterrupt", "KeyboardInterrupt", (frame,)))
    return Ended(
        num_ranks=3,
        ranks=(0, 1, 2),
        reason=reason,
        startup_error=None,
        failures={2: stopped},
        signalled={},
        values={rank: payload.pack(value, outward=False) for rank, value in enumerate(([5], Locked()))},
        errors={},
        last_words={},
        limits=Limits(run=2.0),
        folder=None,
        keep=keep,
    )


@pytest.mark.parametrize(("reason", "kind"), [("interrupted", KeyboardInterrupt), ("timeout", RunTimeout)])
def test_what_came_back_is_kept_when_ranks_were_stopped(reason: Reason, kind: type[BaseException]) -> None:
    error = conclude(ended(reason), lambda _: None)
    assert isinstance(error, kind)
    assert error.results == [[5], None, None]  # type: ignore[attr-defined]
    assert "ranks 0-1 had returned; rank 2 was at train.py:8, in train" in str(error)
    assert "rank 1's value has come and cannot be opened here: ValueError: locked" in str(error)
    assert str(error).endswith("nbaccel.last_run().exception().results has what came back")


def test_session_says_nothing_of_a_last_run() -> None:
    error = conclude(ended("interrupted", keep=True), lambda _: None)
    assert error.results == [[5], None, None]  # type: ignore[union-attr]
    assert "last_run" not in str(error)
