"""tqdm in a rank, all flavours and the libraries that use it: its bars become the rank's progress.

Nothing is done to a step that tqdm would not draw at: its own loop decides when a bar is due.
"""

from __future__ import annotations

import io
import sys
import time
from functools import partial
from typing import Any, final

from nbaccel.rank.late import when_imported
from nbaccel.wire import events
from nbaccel.wire.events import Progress

__all__ = ["relay_bars"]

_EVERY = 0.1
_MOST_OF_NOTE = 200  # characters


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


def _tell(bar: Any) -> None:
    """Emit the bar's state, not more often than it is worth; always when it is closed."""
    now = time.monotonic()
    state = vars(bar)
    if now - state.get("_nbaccel_told", 0.0) < _EVERY and not bar.disable:
        return
    state["_nbaccel_told"] = now
    name = (bar.desc or "").strip().rstrip(":").strip()
    depth = abs(bar.pos)
    has_prefixes = bar.unit_scale in (True, 1)
    scale = bar.unit_scale if bar.unit_scale and not has_prefixes else 1  # as tqdm does
    events.emit(
        Progress(
            name=name or (f"loop {depth + 1}" if depth else "loop"),
            step=_figure(bar.n * scale),
            total=_figure(bar.total * scale) if bar.total else None,
            unit=str(bar.unit).strip() or "it",
            note=str(bar.postfix or "")[:_MOST_OF_NOTE],
            depth=depth,
            ended=bool(bar.disable),  # what is disabled from its beginning does not come here
            divisor=int(bar.unit_divisor) if has_prefixes else None,
        )
    )


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
