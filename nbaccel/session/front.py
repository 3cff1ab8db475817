"""What the session asks of the notebook it may run in; everything is None or plain outside one."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["cell_label", "running_cell"]


def cell_label(filename: str) -> str | None:
    """What IPython calls the cell that was compiled from this file name: "Cell In[3]"; None for a real file."""
    shell = _shell()
    name = getattr(getattr(shell, "compile", None), "format_code_name", lambda _: None)(filename)
    return f"{name[0]} {name[1]}" if name else None


def running_cell() -> tuple[str, int] | None:
    """The file name the cell that runs now was compiled under, and its execution count."""
    shell = _shell()
    frame = sys._getframe() if shell is not None else None
    while frame is not None:
        if cell_label(frame.f_code.co_filename):
            return frame.f_code.co_filename, int(shell.execution_count)
        frame = frame.f_back
    return None


def _shell() -> Any:
    get = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return get() if get is not None else None
