"""What a process can ask the operating system about itself, its parent and what it started.

Linux gives all of it; elsewhere the functions do what the platform offers and say so in their docstring.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

__all__ = [
    "become_subreaper",
    "call_here",
    "call_process",
    "descendants",
    "device_files",
    "die_with_parent",
    "kill_children_but",
    "kill_descendants",
    "unclean",
]

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def die_with_parent(parent: int) -> None:
    """Be killed when `parent`, the process that forked this one, ends. Nothing outside Linux.

    Follows the forking *thread*, so call it only in children forked from a main thread. A parent that
    ended before this call is noticed too.
    """
    if _libc is None:
        return
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def call_process(name: str) -> None:
    """What `top` and `ps` call this process, up to 15 characters. Nothing outside Linux."""
    if _libc is not None:
        _libc.prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def become_subreaper() -> None:
    """Adopt orphaned descendants, so that none escapes `descendants`. Nothing outside Linux."""
    if _libc is not None:
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _children(pid: int) -> list[int]:
    """Direct children by /proc; empty where there is none, or once the process is gone."""
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", "rb") as file:
                found.extend(map(int, file.read().split()))
    except OSError:
        pass  # it ended while we looked
    return found


def descendants(pid: int) -> Iterator[int]:
    """Every process below `pid`, children before grandchildren."""
    level = _children(pid)
    while level:
        yield from level
        level = [below for child in level for below in _children(child)]


def kill_children_but(kept: int) -> None:
    """SIGKILL every child of this process except `kept`, and what is below each. Nothing without /proc."""
    for stray in _children(os.getpid()):
        if stray != kept:
            for pid in (*descendants(stray), stray):
                try:
                    os.kill(pid, signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    pass  # it ended meanwhile, or it took another user's identity and is beyond us


def kill_descendants() -> None:
    """SIGKILL everything below this process and reap it; returns when nothing is left.

    Looks again after each round: a process that forks faster than we kill loses in the end, because
    its parents die first. Outside Linux it reaps what has ended and no more.
    """
    me = os.getpid()
    while True:
        for pid in list(descendants(me)):
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass  # it ended meanwhile, or it took another user's identity and is beyond us
        try:
            os.waitpid(-1, 0 if _libc is not None else os.WNOHANG)
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        if _libc is None:
            return


def device_files() -> list[str]:
    """Open files of accelerators in this process: a sign that a device context exists here."""
    prefixes = ("/dev/nvidia", "/dev/accel", "/dev/vfio", "/dev/kfd", "/dev/dri/render")
    found = set()
    try:
        for fd in os.listdir("/proc/self/fd"):
            try:
                target = os.readlink(f"/proc/self/fd/{fd}")
            except OSError:
                continue
            # NVML alone opens the control node: reading a GPU's name is no context
            if target.startswith(prefixes) and target != "/dev/nvidiactl":
                found.add(target)
    except OSError:
        pass  # no /proc on this platform
    return sorted(found)


def unclean() -> str | None:
    """Why forking this process is unsafe now: a second thread, an open accelerator. None when it is safe."""
    native: Any = getattr(sys.modules.get("torch_xla"), "_XLAC", None)
    if native is not None and native._xla_runtime_is_initialized():  # named before the threads it has
        return "it initialised XLA"
    try:
        num_threads = len(os.listdir("/proc/self/task"))
    except OSError:
        import threading

        num_threads = threading.active_count()
    if num_threads > 1:
        return f"it runs {num_threads - 1} thread{'s' if num_threads > 2 else ''} of its own"
    if files := device_files():
        return f"it opened {files[0]}"
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized():
        return "it initialised CUDA"
    return None


def call_here(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Its value. A child that the function forks ends where it comes out of it: it is no second rank."""
    own = os.getpid()
    try:
        value = function(*args, **kwargs)
    except BaseException as error:
        if os.getpid() == own:
            raise
        code = error.code if isinstance(error, SystemExit) else 1
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        _leave(code if isinstance(code, int) else int(code is not None))
    if os.getpid() != own:
        _leave(0)
    return value


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
