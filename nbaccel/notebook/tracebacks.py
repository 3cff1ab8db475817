"""An error that nbaccel raises on purpose, as a notebook shows it: the person's lines and the message, none of ours."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any

from nbaccel.ownership import is_users, persons_part

__all__ = ["render"]


def render(error: BaseException) -> list[str]:
    """The error as IPython would show it, without what lies below the last line of the person's own: the message says
    what is wrong there. `%xmode Verbose` shows everything; `%debug` stands in the innermost frame in any case."""
    from IPython.core.getipython import get_ipython  # a script is not to wait for its import

    shell: Any = get_ipython()
    formatter = shell.InteractiveTB
    if formatter.mode == "Verbose":
        lines: list[str] = formatter.structured_traceback(type(error), error, error.__traceback__)
        return lines
    cause, suppressed = error.__cause__, error.__suppress_context__
    if not _concerns_the_person(cause or (None if suppressed else error.__context__)):
        error.__cause__ = None  # and with it the context
    try:
        lines = formatter.structured_traceback(type(error), error, _own_lines(error.__traceback__))
    finally:
        error.__cause__, error.__suppress_context__ = cause, suppressed
    return lines


def _concerns_the_person(error: BaseException | None) -> bool:
    """Whether lines of theirs are in its traceback: else it is how we found out."""
    return error is not None and any(is_users(_filename(part)) for part in _parts(error.__traceback__))


def _own_lines(tb: TracebackType | None) -> TracebackType | None:
    """The traceback without what is below the person's."""
    parts = list(_parts(tb))
    kept: TracebackType | None = None
    for part in reversed(parts[: persons_part([_filename(part) for part in parts])]):
        kept = TracebackType(kept, part.tb_frame, part.tb_lasti, part.tb_lineno)
    return kept


def _parts(tb: TracebackType | None) -> Iterator[TracebackType]:
    while tb is not None:
        yield tb
        tb = tb.tb_next


def _filename(part: TracebackType) -> str:
    return part.tb_frame.f_code.co_filename
