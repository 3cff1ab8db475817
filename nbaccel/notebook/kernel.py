"""What nbaccel asks of IPython and its kernel, and what it does between cells."""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import Any

from nbaccel.engines import forkserver
from nbaccel.errors import LaunchError
from nbaccel.notebook.culprit import Culprit, Tracer
from nbaccel.wire.channel import ChannelClosed

__all__ = ["autoreloader", "cell_label", "cell_source", "culprit", "prepare", "running_cell"]

_tracers: list[Tracer] = []


def _shell() -> Any:
    get = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return get() if get is not None else None


def prepare() -> None:
    """In a kernel: warm the server up now, and let it follow what cells import."""
    shell = _shell()
    if shell is None or "IPKernelApp" not in shell.config or not sys.platform.startswith("linux"):
        return
    _follow()
    shell.events.register("post_run_cell", _follow)
    _tracers.append(Tracer(_cell_name, cell_label))
    shell.events.register("post_run_cell", _tracers[0].after_cell)


def culprit() -> Culprit | None:
    """What first opened an accelerator in this kernel, as far as it was seen."""
    return _tracers[0].culprit if _tracers else None


def _cell_name() -> str:
    """The cell that runs, or has just run: the counter is one ahead by then."""
    return f"Cell In[{max(1, len(_cells()) - 1)}]"


def _follow(*_: Any) -> None:
    """Keep the warm server fit for the next launch; a failure here shows at that launch, not in this cell."""
    try:
        server, notes = forkserver.server_for(os.environ, "fork")
        for note in notes:
            print(f"nbaccel: {note}", file=sys.stderr)
        server.preload()
    except (LaunchError, ChannelClosed):
        return  # somebody killed it, or no process can be made: the next launch tries again and says so


def cell_label(filename: str) -> str | None:
    """What IPython calls the cell that was compiled from this file name: "Cell In[3]"; None for a real file."""
    shell = _shell()
    name = getattr(getattr(shell, "compile", None), "format_code_name", lambda _: None)(filename)
    return f"{name[0]} {name[1]}" if name else None


def running_cell() -> tuple[str, int] | None:
    """The file name the cell that runs now was compiled under, and its execution count."""
    shell = _shell()
    frame: FrameType | None = sys._getframe() if shell is not None else None
    while frame is not None:
        if cell_label(frame.f_code.co_filename):
            return frame.f_code.co_filename, int(shell.execution_count)
        frame = frame.f_back
    return None


def autoreloader() -> Any:
    """What `%autoreload` knows of modules: their files' `modules_mtimes`, by name, and which `failed`; else None."""
    magics = getattr(getattr(_shell(), "magics_manager", None), "registry", {}).get("AutoreloadMagics")
    return getattr(magics, "_reloader", None)


def cell_source() -> str | None:
    """The text of the cell that runs now."""
    cells = _cells()
    return str(cells[-1]) if cells else None


def _cells() -> list[Any]:
    """IPython's list of cells, and not its name `In` in the notebook, which is the user's to take."""
    cells = getattr(getattr(_shell(), "history_manager", None), "input_hist_parsed", None)
    return cells if isinstance(cells, list) else []
