"""Cells in a rank, run by IPython's own machinery: magics, top-level await, `?`, rich last expressions.

The only module of a rank that knows IPython's shell; it is imported by the first cell.
"""

from __future__ import annotations

import asyncio
import builtins
import importlib
import sys
import threading
import traceback
import warnings
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, final

from nbaccel.rank import here
from nbaccel.rank.display import Publisher

__all__ = ["Cell", "Completions", "Shown", "complete", "run_cell", "set_displayhook", "warm_up"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A cell's text, and what the notebook calls it."""

    source: str
    filename: str | None = None
    """The name the notebook compiles the cell under; None for one of this rank's own."""
    number: int = 1
    """Its execution count."""
    first_line: int = 1
    """Where `source` begins in the notebook's cell."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A cell's last expression as it is displayed."""

    data: Mapping[str, Any]
    """By MIME type."""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return str(self.data.get("text/plain", ""))


class Completions(NamedTuple):
    """What could stand in the place of a few characters."""

    fragment: str
    """Those before the cursor that each text is to replace."""
    texts: tuple[str, ...]


def run_cell(cell: Cell) -> Shown | None:
    """Run a cell in this rank's `__main__`; its last expression, or None.

    Raises: what the cell raises, its traceback without IPython's frames.
    """
    shell = _shell()
    shell.shown, shell.source = None, cell.source
    shell.execution_count = cell.number
    if cell.filename is not None:
        shell.compile.get_code_name = lambda *_: cell.filename
    else:
        vars(shell.compile).pop("get_code_name", None)
    if "%debug" not in cell.source:  # else what failed before would keep its tensors until the next failure
        for name in ("last_type", "last_value", "last_traceback", "last_exc"):
            vars(sys).pop(name, None)
    # comments keep the numbers of the lines; a cell magic must come first
    above = "" if cell.source.lstrip().startswith("%%") else "#\n" * (cell.first_line - 1)
    try:
        result = shell.run_cell(above + cell.source, store_history=False)
    except KeyboardInterrupt as stopped:  # before the cell's own code: IPython's says nothing of it
        raise stopped.with_traceback(None) from None
    error = result.error_before_exec or result.error_in_exec
    if error is not None:
        if isinstance(error, SyntaxError) and error.filename == "<tokenize>":  # a dedent that fits nothing
            error.filename = shell.compile.get_code_name(cell.source, cell.source, cell.number)
        error = error.with_traceback(_users_part(error.__traceback__, shell.user_ns))
        vars(sys).update(
            last_type=type(error), last_value=error, last_traceback=error.__traceback__
        )  # for %debug
        raise error
    shown: Shown | None = shell.shown
    shell.shown = None
    return shown


def complete(text: str, cursor: int) -> Completions:
    """What could stand at `cursor`, by this rank's own names."""
    shell = _shell()
    line_start = text.rfind("\n", 0, cursor) + 1
    line_end = text.find("\n", cursor)
    line = text[line_start : line_end if line_end >= 0 else None]
    fragment, matches = shell.complete("", line, cursor - line_start)
    return Completions(fragment, tuple(matches[:500]))


def warm_up() -> None:
    """Make IPython's shell ahead of the first cell."""
    _shell()


def _users_part(tb: TracebackType | None, names: dict[str, Any]) -> TracebackType | None:
    """The traceback from the cell's own frame on; all of it when there is none, as for a magic's error."""
    found = tb
    while found is not None:
        if found.tb_frame.f_globals is names:
            return found
        found = found.tb_next
    return None


_made: dict[int, Any] = {}
"""By `here.index()`: ranks that are threads of one process have one each."""
_making = threading.RLock()


def _shell() -> Any:
    """This rank's shell, made by the first cell; from then on IPython's functions find it."""
    own = here.index()
    if own not in _made:
        with _making:
            _made[own] = _made.get(own) or _make()
    return _made[own]


def _make() -> Any:
    from IPython.core.getipython import get_ipython
    from IPython.core.interactiveshell import InteractiveShell

    importlib.import_module(
        "pygments.lexers"
    )  # its first import fails in one of two threads that come together
    main = sys.modules["__main__"]
    shell = _kind()(config=_config(), user_module=main, user_ns=main.__dict__)
    shell.display_pub = Publisher()
    shell.set_hook("show_in_pager", _page, 90)
    shell.Completer.use_jedi = False
    shell.loop_runner = _Loop()
    warnings.filterwarnings("ignore", message="To exit: use")  # there is nothing to exit from
    # as a cell leaves it that is interrupted before its own code runs
    warnings.filterwarnings("ignore", message="coroutine '.*run_cell_async' was never awaited")
    own: Any = InteractiveShell
    own.instance = classmethod(lambda cls, *args, **options: _shell())
    own.initialized = classmethod(lambda cls: True)
    # What IPython sets for each cell and puts back behind it is one for all ranks of a process: set once, for good.
    shell.builtin_trap.auto_builtins.clear()
    builtins.get_ipython = get_ipython  # type: ignore[attr-defined]
    shell.display_trap.hook = _show_value
    shell.display_trap.__enter__()
    return shell


def set_displayhook() -> None:
    """Let last expressions go to the shell of their rank, whatever a cell has put in its place."""
    if _made:
        sys.displayhook = _show_value


def _show_value(value: Any) -> None:
    """`sys.displayhook`."""
    _shell().displayhook(value)


@final
class _Loop:
    """Runs a cell's top-level await, in an event loop that stays; IPython has one for all shells of a process."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def __call__(self, cell: Coroutine[Any, Any, Any]) -> Any:
        if self._loop is None or self._loop.is_closed():
            self._loop = asyncio.new_event_loop()
        task = self._loop.create_task(cell)
        try:
            return self._loop.run_until_complete(task)
        except BaseException:  # such as an interrupt, which comes while the loop waits
            if not task.done():  # or it would run on inside the cells to come
                task.cancel()
                self._loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
            raise


def _config() -> Any:
    from traitlets.config import Config

    config = Config()
    config.HistoryManager.enabled = False  # the notebook keeps it; and it would start a thread
    config.InteractiveShell.cache_size = 0  # `Out` would keep every tensor that was looked at
    config.InteractiveShell.banner1 = ""
    return config


def _kind() -> Any:
    from IPython.core.displayhook import DisplayHook
    from IPython.core.interactiveshell import InteractiveShell

    class Hook(DisplayHook):
        """Keeps what the last expression would display."""

        def quiet(self) -> bool:
            shell: Any = self.shell
            ends = getattr(self, "semicolon_at_end_of_expression", lambda _: False)
            return bool(ends(shell.source))

        def start_displayhook(self) -> None:
            pass

        def write_output_prompt(self) -> None:
            pass

        def write_format_data(self, format_dict: Any, md_dict: Any = None) -> None:
            shell: Any = self.shell
            shell.shown = Shown(dict(format_dict), dict(md_dict or {}))

        def finish_displayhook(self) -> None:
            pass

    class RankShell(InteractiveShell):
        """IPython's shell without a terminal: what is raised goes to the notebook."""

        displayhook_class = Hook
        shown: Shown | None = None
        source = ""
        """Of the cell that runs."""

        def showtraceback(self, exc_tuple: Any = None, *args: Any, **options: Any) -> None:
            # a cell's own error is told with its answer; a widget's, which ipywidgets keeps to itself, is not
            if exc_tuple is not None and not issubclass(exc_tuple[0], SyntaxError):
                traceback.print_exception(*exc_tuple)

        def showsyntaxerror(self, *args: Any, **options: Any) -> None:
            pass

        def enable_gui(self, gui: Any = None) -> None:
            pass

        def ask_exit(self) -> None:
            print("the rank stays, with its variables; %nbaccel stop ends the session")

    return RankShell


def _page(_shell: Any, data: Any, *_: Any, **__: Any) -> None:
    """`?` prints; there is no pager."""
    print(data.get("text/plain", "") if isinstance(data, Mapping) else data)
