"""One value at a time: what a package does not take is left out, and the rest of the call is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["LeftOutError", "keep_each"]


class LeftOutError(Exception):
    """Some values of a call were not taken; all others were. For `Trackers`, which reports it."""

    def __init__(self, why: Mapping[str, Exception]) -> None:
        super().__init__(", ".join(f"{name!r} ({type(one).__name__}: {one})" for name, one in why.items()))
        self.why = why
        """What was raised, by the value's name."""


def keep_each(values: Mapping[str, Any], keep: Callable[[str, Any], Any]) -> None:
    """Calls `keep(name, value)` for each.

    Raises:
        LeftOutError: at the end: it raised for some.
        OSError: what it raised, at once: the disk or network is at fault, not the value.
    """
    why: dict[str, Exception] = {}
    for name, value in values.items():
        try:
            keep(name, value)
        except OSError:
            raise
        except LeftOutError as left:
            why.update(left.why)
        except Exception as error:  # noqa: BLE001 - somebody else's code; which value it was is reported
            why[name] = error
    if why:
        raise LeftOutError(why)
