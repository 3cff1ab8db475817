"""Whose a line of code is: the person's, an installed package's, Python's or ours."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Sequence

__all__ = ["is_ours", "is_users", "level_of_call", "persons_part"]

_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
_STDLIB = tuple(
    {os.path.realpath(sysconfig.get_paths()[name]) + os.sep for name in ("stdlib", "platstdlib")}
    | {sysconfig.get_paths()[name] + os.sep for name in ("stdlib", "platstdlib")}
)


def is_ours(filename: str) -> bool:
    """Whether it is a file of nbaccel."""
    return filename.startswith(_OURS)


def is_users(filename: str) -> bool:
    """Whether it is code of the person, not of an installed package, of Python or of ours."""
    if is_ours(filename) or filename.startswith("<frozen") or "-packages" + os.sep in filename:
        return False
    return not filename.startswith(_STDLIB) and not filename.startswith("<string>")


def level_of_call() -> int:
    """`stacklevel` for a warning that the caller gives: the line that called into nbaccel, however far in that is."""
    level, frame = 1, sys._getframe(1)
    while is_ours(frame.f_code.co_filename) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    return level


def persons_part(filenames: Sequence[str]) -> int:
    """How many of a traceback's frames, the outermost first, go down to the last of the person's and what that called
    of other packages, before the first of ours; all, if none is theirs."""
    last = max((at for at, name in enumerate(filenames) if is_users(name)), default=None)
    if last is None:
        return len(filenames)
    return next((at for at in range(last, len(filenames)) if is_ours(filenames[at])), len(filenames))
