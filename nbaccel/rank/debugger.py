"""pdb in a rank: after a failure on the frames that are kept, or where breakpoint() stands.

It reads with input(), which the notebook asks of the person, and prints to the rank's output. The failure
is kept until the person's next call; it pins whatever its frames hold.
"""

from __future__ import annotations

import os
import pdb
import sys
from code import InteractiveConsole
from collections.abc import Callable
from types import CodeType, FrameType, TracebackType
from typing import Any, NoReturn

from nbaccel.errors import ConfigError
from nbaccel.rank import here

__all__ = ["forget_before", "install", "is_persons", "post_mortem", "remember"]

_HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_OURS = tuple(os.path.join(_HOME, room) + os.sep for room in ("rank", "wire", "engines"))

# Of each rank of this process, by `here.index()`.
_failures: dict[int, BaseException] = {}
_called: set[int] = set()
"""Which of them have run something for the person."""
_looking: set[int] = set()
"""Whose call under way is `post_mortem`: its own errors are not kept."""
_first: list[int] = [0]


def install(rank: int) -> None:
    """Let breakpoint() open the debugger here, unless PYTHONBREAKPOINT says otherwise; `interact` can be left in
    every pdb of this process, `%debug`'s too.

    Args:
        rank: the first of this process.
    """
    _first[:] = [rank]
    pdb.Pdb.do_interact = _interact  # type: ignore[method-assign,assignment]
    if "PYTHONBREAKPOINT" not in os.environ:
        sys.breakpointhook = _at_breakpoint


def remember(error: BaseException) -> None:
    """Keep this failure until the person's next call."""
    if here.index() not in _looking:
        _failures[here.index()] = error


def is_persons(function: Callable[..., Any]) -> bool:
    """Whether a call of this is a cell or a person's function, not one of ours such as a completion."""
    name = getattr(function, "__module__", None) or ""
    return not name.startswith("nbaccel.") or getattr(function, "__name__", "") == "run_cell"


def forget_before(function: Callable[..., Any]) -> None:
    """Let go of what is kept, unless this call is one of ours."""
    (_looking.add if function is post_mortem else _looking.discard)(here.index())
    if is_persons(function):
        _called.add(here.index())
        _failures.pop(here.index(), None)


def post_mortem() -> None:
    """Open the debugger on the frames of the kept failure; returns when the person leaves it.

    Raises:
        ConfigError: there is none.
    """
    error = _failures.get(here.index())
    if error is None:
        rank = _first[0] + here.index()
        why = "its last call ended well" if here.index() in _called else "its process is a fresh one"
        raise ConfigError(f"rank {rank} has kept no failure: {why}")
    debugger = _new()
    debugger.reset()
    print(f"{type(error).__name__}: {error}", flush=True)
    try:
        debugger.interaction(None, _users_part(error.__traceback__))
    except KeyboardInterrupt:
        return  # the person has seen enough


def _at_breakpoint(*_: Any, **__: Any) -> None:
    caller: FrameType = sys._getframe(1)
    _new().set_trace(caller)


class _Debugger(pdb.Pdb):
    """pdb, but an interrupt at its prompt leaves it, and `w` leaves out what stands around the call."""

    def _cmdloop(self) -> None:
        self.cmdloop()

    def print_stack_trace(self, *_: Any) -> None:
        whole, self.stack = self.stack, [at for at in self.stack if not _is_ours(at[0])]
        try:
            super().print_stack_trace()
        finally:
            self.stack = whole


def _interact(debugger: pdb.Pdb, _: str) -> None:
    """interact

    Python with the names of this frame. quit() goes back to the debugger; an interrupt leaves that too.
    """

    def leave() -> NoReturn:
        raise SystemExit

    # pdb's own loop ends at the end of the file, which an input box has not, and goes on after an interrupt
    frame = debugger.curframe
    assert frame is not None
    # before Python 3.13 a frame asked again forgets what was assigned in the debugger, which has its own copy
    own = vars(debugger).get("curframe_locals")
    names = {**frame.f_globals, **(frame.f_locals if own is None else own), "quit": leave, "exit": leave}
    console, more = _Console(names), False
    debugger.message("Python with the names of this frame; quit() goes back to the debugger")
    while True:
        line = input("... " if more else ">>> ")
        word = line.strip()
        if not more and (word in ("quit", "exit") or (word == "q" and "q" not in names)):
            return
        try:
            more = console.push(line)
        except SystemExit:
            return


class _Console(InteractiveConsole):
    """Runs what is typed; an interrupt of it leaves, as one at the prompt does. Values are printed: the hook of the
    rank keeps them for a cell."""

    def runcode(self, code: CodeType) -> None:
        hook, sys.displayhook = sys.displayhook, _print_value
        try:
            exec(code, self.locals)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException:  # noqa: BLE001  # the person's own: it is shown, and the next line asked for
            self.showtraceback()
        finally:
            sys.displayhook = hook


def _print_value(value: object) -> None:
    if value is not None:
        print(repr(value))


def _new() -> pdb.Pdb:
    # with its own SIGINT handler, an interrupt after "continue" would open the debugger again
    return _Debugger(nosigint=True)


def _is_ours(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    return name.startswith(_OURS) or name == "<string>"


def _users_part(tb: TracebackType | None) -> TracebackType | None:
    """Without our frames around the call."""
    inner = tb
    while inner is not None and _is_ours(inner.tb_frame):
        inner = inner.tb_next
    return inner or tb
