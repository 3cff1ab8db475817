"""Who initialised CUDA in this kernel: the cell, and the line where torch did it.

A context in the kernel holds memory and is what breaks every launcher that forks. torch reaches CUDA
through `torch._C._cuda_init`, which is wrapped until its first success. A library that gets there without
torch is found after its cell by the device files this process then has open; that tells the cell only.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from nbaccel.rank.process import device_files

__all__ = ["Culprit", "Tracer"]

_LIBRARIES = f"-packages{os.sep}", f"{os.sep}torch{os.sep}", "<frozen"


@dataclass(frozen=True, slots=True)
class Culprit:
    """What first opened an accelerator in this process."""

    cell: str
    """What the front end calls the cell; empty when it was before the first one we saw."""
    line: str = ""
    """The person's own line, as file:line; empty when it is not known."""
    through: str = ""
    """The line of the library that it went through, outside torch."""

    def __str__(self) -> str:
        where = " ".join(filter(None, [self.line or self.cell or "before nbaccel was imported"]))
        return where + (f", by {self.through}" if self.through else "")


@final
class Tracer:
    """Watches this process from cell to cell.

    Args:
        cell: what the front end calls the cell that runs now or has just run.
        label: what it calls the file a cell was compiled from; None for a real file.
    """

    def __init__(self, cell: Callable[[], str], label: Callable[[str], str | None]) -> None:
        self._cell, self._label = cell, label
        self.culprit: Culprit | None = Culprit("") if device_files() else None
        self._wrapped = False
        self.after_cell()

    def after_cell(self, *_: Any) -> None:
        """Look at what the cell has left open, and wrap torch once it is there. 0.4 ms."""
        native = getattr(sys.modules.get("torch"), "_C", None)
        if not self._wrapped and self.culprit is None and hasattr(native, "_cuda_init"):
            self._wrap(native)
        if self.culprit is None and device_files():
            self.culprit = Culprit(self._cell())

    def _wrap(self, native: Any) -> None:
        original = native._cuda_init
        self._wrapped = True

        def init(*args: Any, **options: Any) -> Any:
            found = original(*args, **options)
            native._cuda_init = original
            self.culprit = self._from_stack(traceback.extract_stack(sys._getframe(1)))
            return found

        native._cuda_init = init

    def _from_stack(self, stack: traceback.StackSummary) -> Culprit:
        through = ""
        for frame in reversed(stack):
            cell = self._label(frame.filename)
            if cell is None and any(part in frame.filename for part in _LIBRARIES):
                if f"{os.sep}torch{os.sep}" not in frame.filename and not frame.filename.startswith("<"):
                    through = through or f"{frame.filename}:{frame.lineno}"
                continue
            place = f"{cell} line {frame.lineno}" if cell else f"{frame.filename}:{frame.lineno}"
            return Culprit(self._cell(), place, through)
        return Culprit(self._cell(), "", through)
