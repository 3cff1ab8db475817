"""The occasions of a rank that others want to be told of: its calls begin, end and fail, and after an interrupt its
group is whole again. `rank.worker` tells; nobody does outside a rank."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

__all__ = [
    "Regroups",
    "at_call_begin",
    "at_call_end",
    "at_call_failure",
    "at_regrouping",
    "call_begins",
    "call_ends",
    "call_fails",
    "regroup",
]


class Regroups(Protocol):
    """What a session's ranks bring to the same place after an interrupt."""

    def standing(self) -> Any:
        """Where this rank stands; can be pickled."""

    def regroup(self, standings: Sequence[Any]) -> None:
        """Go where all are to stand, by the standings of all ranks in rank order."""


_Methods = list[tuple[int, weakref.WeakMethod[Callable[[], None]]]]  # with the thread that asked
_beginnings: _Methods = []
_endings: _Methods = []
_failures: _Methods = []
_regrouping: dict[int, weakref.ref[Regroups]] = {}  # by number: they are made in one order on every rank
_next_number = 0


def at_call_begin(method: Callable[[], None]) -> None:
    """Let a rank call this bound method before the user's next call, and each later one, of a session. It must not
    raise, nor wait for anything. Its object is not kept alive."""
    _add(_beginnings, method)


def at_call_end(method: Callable[[], None]) -> None:
    """Let a rank call this bound method when the user's call has returned and before its result is told: what
    it raises is the call's error. Its object is not kept alive."""
    _add(_endings, method)


def at_call_failure(method: Callable[[], None]) -> None:
    """Let a rank call this bound method when the user's call has raised, or was interrupted, and before that is told.
    It must not raise, nor wait for anything. Its object is not kept alive."""
    _add(_failures, method)


def at_regrouping(member: Regroups) -> None:
    """Let a rank ask this object after an interrupt. It is made on every rank, and is not kept alive."""
    global _next_number
    _regrouping[_next_number] = weakref.ref(member)
    _next_number += 1


def regroup(exchange: Callable[[Any], Sequence[Any]]) -> None:
    """Bring what `at_regrouping` was given to one place, on all ranks of a session at once.

    Args:
        exchange: gives every rank's value, in rank order.
    """
    global _next_number
    alive = {number: member for number, known in _regrouping.items() if (member := known()) is not None}
    told = exchange((_next_number, {number: member.standing() for number, member in alive.items()}))
    # some ranks may have been stopped before they had made the last one, or have let go of one already
    _next_number = max(number for number, _ in told)
    for number in sorted(set.intersection(*(set(standings) for _, standings in told))):
        alive[number].regroup([standings[number] for _, standings in told])
    _regrouping.clear()
    _regrouping.update((number, weakref.ref(member)) for number, member in alive.items())


def _add(methods: _Methods, method: Callable[[], None]) -> None:
    methods[:] = [(thread, one) for thread, one in methods if one() is not None]
    methods.append((threading.get_ident(), weakref.WeakMethod(method)))


def call_begins(thread: int | None = None) -> None:
    """Calls what `at_call_begin` was given, the first first, or only what this thread gave: a rank may be one
    thread of several."""
    _call(_beginnings, thread)


def call_ends(thread: int | None = None) -> None:
    """The same with what `at_call_end` was given."""
    _call(_endings, thread)


def call_fails(thread: int | None = None) -> None:
    """The same with what `at_call_failure` was given."""
    _call(_failures, thread)


def _call(methods: _Methods, thread: int | None) -> None:
    for whose, one in list(methods):
        if thread in (None, whose) and (method := one()) is not None:
            method()
