"""tqdm in a rank, all flavours and the libraries that use it: its bars become the rank's progress.

Nothing is done to a step that tqdm would not draw at: its own loop decides when a bar is due.
"""

from __future__ import annotations

import io
import itertools
import sys
import time
import weakref
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any, final

from nbaccel.rank import here
from nbaccel.rank.late import when_imported
from nbaccel.wire import events
from nbaccel.wire.events import Progress

__all__ = ["relay_bars"]

_EVERY = 0.1
_MOST_OF_NOTE = 200  # characters

_serials = itertools.count()
_owners: weakref.WeakValueDictionary[tuple[int, str], Any] = weakref.WeakValueDictionary()
"""The bar that has a name, by rank of this process and name."""


def relay_bars(*, quiet: bool) -> None:
    """Emit Progress for every tqdm bar from now on.

    Args:
        quiet: somebody paints the bars: they are not written to stdout or stderr any more.
    """
    when_imported("tqdm.std", lambda std: _follow(std.tqdm, quiet=quiet))
    # drawn with what lives in the notebook's process; by tqdm itself they are the same bars
    for name, own in (("tqdm.notebook", "tqdm_notebook"), ("tqdm.rich", "tqdm_rich")):
        when_imported(name, partial(_make_plain, own))


def _follow(bar: Any, *, quiet: bool) -> None:
    begin, draw = bar.__init__, bar.display

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("display", None)  # tqdm.notebook's
        if quiet:
            args, kwargs = _drawn_nowhere(args, kwargs)
        begin(self, *args, **kwargs)

    def display(self: Any, msg: str | None = None, pos: int | None = None) -> Any:
        _tell(self)
        return True if isinstance(_file(self), _Nowhere) else draw(self, msg, pos)

    bar.__init__, bar.display = __init__, display


def _drawn_nowhere(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """tqdm's arguments with nowhere in place of a standard stream; `file` is the fifth by position."""
    file = args[4] if len(args) > 4 else kwargs.get("file")
    if file is not None and file not in (sys.stdout, sys.stderr):
        return args, kwargs
    if len(args) > 4:
        return (*args[:4], _Nowhere(), *args[5:]), kwargs
    return args, {**kwargs, "file": _Nowhere()}


def _file(bar: Any) -> Any:
    return getattr(bar.fp, "_wrapped", bar.fp)  # tqdm wraps it


@dataclass(slots=True)
class _Known:
    """What a bar is told as. It is one loop as long as it lives, whatever its description becomes."""

    name: str
    unnamed: str
    """What it is called while no description says."""
    serial: int
    at: float = 0.0
    """When it was told of last, by the monotonic clock."""
    heading: list[str] | None = None
    """The words that all its descriptions begin with; None before it had one."""


def _tell(bar: Any) -> None:
    """Emit the bar's state, not more often than it is worth; always when it gets its first description or is closed."""
    now = time.monotonic()
    known: _Known | None = vars(bar).get("_nbaccel_known")
    if known is None:
        known = vars(bar)["_nbaccel_known"] = _begun(bar)
    elif now - known.at < _EVERY and not bar.disable and (known.heading is not None or not bar.desc):
        return
    known.at = now
    label, said = _described(bar, known)
    has_prefixes = bar.unit_scale in (True, 1)
    scale = bar.unit_scale if bar.unit_scale and not has_prefixes else 1  # as tqdm does
    events.emit(
        Progress(
            name=known.name,
            step=_figure(bar.n * scale),
            total=_figure(bar.total * scale) if bar.total else None,
            unit=str(bar.unit).strip() or "it",
            note=", ".join(filter(None, [said, str(bar.postfix or "")]))[:_MOST_OF_NOTE],
            depth=abs(bar.pos),
            ended=bool(bar.disable),  # what is disabled from its beginning does not come here
            divisor=int(bar.unit_divisor) if has_prefixes else None,
            label=None if label == known.name else label,
            serial=known.serial,
        )
    )


def _begun(bar: Any) -> _Known:
    """A bar that is told of first. No other one of this rank has its name while it goes on; one that is made anew
    gets the same again."""
    depth = abs(bar.pos)
    unnamed = f"loop {depth + 1}" if depth else "loop"
    name = free = _title(_words(bar)) or unnamed
    rank, number = here.index(), 1
    while (other := _owners.get((rank, free))) is not None and not other.disable:
        number += 1
        free = f"{name} {number}"
    _owners[rank, free] = bar
    return _Known(free, unnamed, next(_serials))


def _described(bar: Any, known: _Known) -> tuple[str, str]:
    """What the bar is called and, where its description changes, as one with the loss in it, what that says.

    It is called by the words that have stayed the same: the others are as old as the figures beside them.
    """
    words = _words(bar)
    if known.heading is None:
        known.heading = words or None
    elif words:
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(words, known.heading, strict=False))
        known.heading = [word for word, _ in alike]
    heading = known.heading or []
    rest = words[len(heading) :]
    # values are told as `set_postfix` writes them
    values = all("=" in word for word in rest)
    said = ", ".join(word.rstrip(",;") for word in rest) if values else " ".join(words)
    return _title(heading) or known.unnamed, said


def _words(bar: Any) -> list[str]:
    return str(bar.desc or "").rstrip(" :").split()


def _title(words: list[str]) -> str:
    return " ".join(words).rstrip(" :,;|=-")


def _figure(count: Any) -> float:
    """A count with its fraction, if it has one, in few digits."""
    exact = float(count)
    short = exact if exact.is_integer() else float(f"{exact:.6g}")
    return int(short) if short.is_integer() else short


def _make_plain(own: str, module: Any) -> None:
    """Names of `module` that make its own kind of bar make a plain one."""
    std = sys.modules["tqdm.std"]
    for name in ("tqdm", own):
        setattr(module, name, std.tqdm)
    for name in ("trange", own.replace("tqdm_", "t") + "range", "tnrange", "trrange"):
        if hasattr(module, name):
            setattr(module, name, std.trange)


@final
class _Nowhere(io.TextIOBase):
    """What tqdm writes to when its bar is painted elsewhere."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        return len(text)

    def isatty(self) -> bool:
        return True  # a bar that is only wanted on a terminal is wanted in the panel
