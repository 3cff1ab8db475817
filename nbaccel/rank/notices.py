"""What the notebook has set up for its loggers and warnings, in its ranks too.

`logging.basicConfig(level=logging.INFO)` and `warnings.filterwarnings("ignore")` in a cell are meant for the
functions below it. What needs more than names and numbers stays behind: handlers that write elsewhere than to
stdout and stderr, formatters and filters of classes of their own.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, final

__all__ = ["Notices", "read_notices", "take_over_notices"]


class Printer(NamedTuple):
    """A handler that prints."""

    place: Literal["stdout", "stderr"]
    level: int
    format: str | None
    date_format: str | None
    style: str


class Settings(NamedTuple):
    """Of one logger."""

    level: int
    propagates: bool
    printers: tuple[Printer, ...]


class Filter(NamedTuple):
    """An entry of `warnings.filters`."""

    action: str
    message: str
    category: tuple[str, str]
    """Its module and name: the class itself might have to be imported."""
    module: str
    lineno: int


class Notices(NamedTuple):
    """All that is sent."""

    disabled: int = 0
    """The level given to `logging.disable`."""
    loggers: tuple[tuple[str, Settings], ...] = ()
    """By name; "" is the root."""
    filters: tuple[Filter, ...] = ()


def read_notices(env: Iterable[str] = ()) -> Notices:
    """What this process has set up.

    Args:
        env: names of variables that are the ranks' own: what TORCH_LOGS asks of torch's loggers goes over this.
    """
    given = tuple(name.lower() for name in env)
    root = logging.root
    loggers = [("", Settings(root.level, True, _printers(root)))]
    for name, logger in list(root.manager.loggerDict.items()):
        package = name.split(".")[0]
        # one of a class of its own is its library's affair
        if type(logger) is not logging.Logger or any(
            variable.startswith(f"{package.lower()}_") for variable in given
        ):
            continue
        # a module gives its loggers their handlers where it is imported, in a rank too
        printers = () if package in sys.modules and package != "__main__" else _printers(logger)
        if logger.level or printers:
            loggers.append((name, Settings(logger.level, bool(logger.propagate), printers)))
    return Notices(int(root.manager.disable), tuple(loggers), tuple(_filters()))


def _printers(logger: logging.Logger) -> tuple[Printer, ...]:
    found = []
    for handler in logger.handlers:
        place = _place(handler)
        if place is not None:
            found.append(Printer(place, handler.level, *_format(handler.formatter)))
    return tuple(found)


def _place(handler: logging.Handler) -> Literal["stdout", "stderr"] | None:
    """Where a plain handler prints; None for any other."""
    if type(handler) is not logging.StreamHandler:
        return None
    if handler.stream is sys.stdout or handler.stream is sys.__stdout__:
        return "stdout"
    return "stderr" if handler.stream is sys.stderr or handler.stream is sys.__stderr__ else None


def _format(formatter: logging.Formatter | None) -> tuple[str | None, str | None, str]:
    if type(formatter) is not logging.Formatter:
        return None, None, "%"
    styles: dict[Any, str] = {kind: sign for sign, (kind, _) in logging._STYLES.items()}
    return formatter._fmt, formatter.datefmt, styles.get(type(formatter._style), "%")


def _filters() -> Iterator[Filter]:
    """This process's, the first to be looked at first."""
    entries: list[Any] = list(warnings.filters)
    for action, message, category, module, lineno in entries:
        name = category.__module__, category.__qualname__
        yield Filter(action, _text(message), name, _text(module), lineno)


def _text(pattern: Any) -> str:
    """Of a regular expression, which may be there as itself or as text; "" for none."""
    return str(getattr(pattern, "pattern", pattern or ""))


def take_over_notices(notices: Notices) -> None:
    """Set this process up in the same way. What its own libraries have set up stays where it is not contradicted.

    Nothing is set that is so already: setting a level goes over all loggers, whose memory a rank still shares.
    """
    if logging.root.manager.disable != notices.disabled:
        logging.disable(notices.disabled)
    for name, settings in notices.loggers:
        logger = logging.getLogger(name)
        if settings.level and logger.level != settings.level:
            logger.setLevel(settings.level)
        if settings.printers and not logger.handlers:
            for printer in settings.printers:
                logger.addHandler(_Print(printer))
            logger.propagate = settings.propagates
    _put_first(_that_are_known(notices.filters))


def _that_are_known(filters: Iterable[Filter]) -> Iterator[tuple[Filter, type[Warning]]]:
    """Those whose category this process has."""
    for entry in filters:
        found: Any = sys.modules.get(entry.category[0])
        for name in entry.category[1].split("."):
            found = getattr(found, name, None)
        if isinstance(found, type) and issubclass(found, Warning):
            yield entry, found


def _put_first(filters: Iterable[tuple[Filter, type[Warning]]]) -> None:
    """Before this process's own, but for those at the end of both: Python's, which its libraries' stand before."""
    given, own = list(filters), list(_filters())
    while given and own and given[-1][0] == own[-1]:
        given.pop()
        own.pop()
    for entry, category in reversed(given):
        # what is an error to a test's runner is to end no rank, in a library's code or in ours
        action: Any = "default" if entry.action == "error" else entry.action
        warnings.filterwarnings(action, entry.message, category, entry.module, entry.lineno)
    if given:
        # what a rank has open from the process it was forked from is no oversight of the person's
        warnings.filterwarnings("ignore", category=ResourceWarning)


@final
class _Print(logging.StreamHandler):  # type: ignore[type-arg]  # Python 3.10 knows no argument of it
    """Prints to what `sys` has as this stream when a record comes: a rank gets its own after this is made."""

    def __init__(self, printer: Printer) -> None:
        logging.Handler.__init__(self, printer.level)
        self._place = printer.place
        if printer.format is not None:
            style: Any = printer.style
            self.setFormatter(logging.Formatter(printer.format, printer.date_format, style, validate=False))

    def format(self, record: logging.LogRecord) -> str:
        """The message alone where the notebook's format wants what a filter or default of its own sets."""
        try:
            return super().format(record)
        except (KeyError, ValueError):
            return record.getMessage()

    @property
    def stream(self) -> Any:
        return getattr(sys, self._place)
