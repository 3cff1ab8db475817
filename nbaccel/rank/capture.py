"""A rank's three standard streams: 0 from nowhere, 1 and 2 into pipes the relay reads.

The relay holds the reading ends, so the last words of a rank that crashes are in the pipe, not in it.
"""

from __future__ import annotations

import ctypes
import io
import os
import sys
from typing import Any

__all__ = ["drain", "redirect", "unbuffered"]

_libc = ctypes.CDLL(None)


def redirect(stdout: int, stderr: int) -> None:
    """Make these descriptors this process's 1 and 2, for Python, for C and for what it starts."""
    drain()
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    for fd in {nowhere, stdout, stderr}:
        if fd > 2:
            os.close(fd)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  # lives as long as the process
    sys.stdout = unbuffered(1)
    sys.stderr = unbuffered(2)
    # some libraries print to the originals
    vars(sys).update(__stdin__=sys.stdin, __stdout__=sys.stdout, __stderr__=sys.stderr)
    _buffer_c_stdout_by_line()


def drain() -> None:
    """Push everything Python and C still hold into the pipes."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            pass  # the user's code closed or replaced it: nothing of it can be saved
    _libc.fflush(None)


def unbuffered(fd: int) -> io.TextIOWrapper:
    """A text stream that holds nothing back: a crash loses no word of it."""
    raw: Any = io.FileIO(fd, "wb", closefd=False)
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", write_through=True)


def _buffer_c_stdout_by_line() -> None:
    """C libraries see a pipe and would hold 4 KiB back, until the crash that loses them."""
    name = "__stdoutp" if sys.platform == "darwin" else "stdout"
    _libc.setvbuf(ctypes.c_void_p.in_dll(_libc, name), None, 1, 0)  # 1 is _IOLBF on glibc, musl and Darwin
