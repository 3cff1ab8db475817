"""Where a cell's text goes."""

from __future__ import annotations

import io
import sys
from typing import final

__all__ = ["Streams", "say"]


@final
class Streams:
    """Standard output and error as they are now: a later cell may have redirected them."""

    def __init__(self) -> None:
        self._now = {"stdout": sys.stdout, "stderr": sys.stderr}

    def write(self, text: str, stream: str) -> None:
        """`stream` is "stdout" or "stderr"; nothing happens where there is none, as under pythonw.

        A character that the stream's encoding lacks is written as an escape.
        """
        file = self._now[stream]
        if file is None:
            return
        try:
            file.write(text)
        except UnicodeEncodeError as error:
            file.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        if isinstance(file, io.TextIOWrapper):  # a script's: what a pipe's reader is to see now
            file.flush()

    def say(self, note: str) -> None:
        """One sentence of nbaccel's to the person."""
        try:
            self.write(f"nbaccel: {note}\n", "stderr")
        except (OSError, ValueError):
            pass  # the stream is closed: nobody is there to be told


def say(note: str) -> None:
    """One sentence of nbaccel's to the person, in the cell that runs now."""
    Streams().say(note)
