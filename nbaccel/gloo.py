"""What torch's gloo needs in order to end: its workers let go of Python objects a little late.

A worker that is just dropping the last collective's tensors needs the interpreter's lock, and
- torch frees a group by joining its workers with that lock held: the two wait for one another for ever,
  seen once in about fifty calls that end with `destroy_process_group()` and a DDP model going out of scope
  (torch 2.13; pytorch/pytorch#56297). So each group is kept a little longer than the user keeps it;
- an interpreter that is shutting down ends the thread inside a C++ destructor, and the process aborts
  ("terminate called without an active exception"), seen once in about thirty scripts under torchrun on a
  busy machine. So a process that will shut down in the ordinary way waits for its workers first.

And it is not to say of each group that it is connected, in a line on std::cout that nothing turns off (torch 2.9; 2.13
says nothing; pytorch/gloo#462): threads that make groups at once write theirs into each other.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["keep_groups", "let_go", "settle", "silent"]

# Between the end of a collective and its worker's last use of the lock lie microseconds.
_LATER = 2.0
_kept: list[tuple[Any, float | None]] = []
"""Groups of this process, and when each was first found destroyed."""
_lock = threading.Lock()
_making: list[threading.Thread] = []
"""The threads that make a group just now."""
_BAD = 1
"""C++'s `std::ios_base::badbit`: a stream in this state takes nothing."""


def keep_groups() -> None:
    """Hold on to every group made in this process from now on, until `_LATER` seconds after it was
    destroyed and another one is made; the last ones go with the process."""
    import torch.distributed as dist

    if not dist.is_available():
        return
    import torch.distributed.distributed_c10d as c10d

    original = getattr(c10d, "_new_process_group_helper", None)
    if original is None or getattr(original, "keeps_groups", False):
        return

    def make(*args: Any, **options: Any) -> Any:
        _forget(_LATER)
        with silent():
            made = original(*args, **options)
        _kept.append((made[0] if isinstance(made, tuple) else made, None))
        return made

    make.keeps_groups = True  # type: ignore[attr-defined]
    c10d._new_process_group_helper = make


@contextmanager
def silent() -> Iterator[None]:
    """While a group is made: C++'s `std::cout` takes nothing, in no thread; Python's and C's streams are others.

    Not left to whoever reads the rank's output: gloo writes its line in pieces.
    """
    with _lock:
        _making.append(threading.current_thread())
        _set_cout()(_BAD)
    try:
        yield
    finally:
        with _lock:
            _making.remove(threading.current_thread())
            if not _making:
                _set_cout()(0)


@functools.cache
def _set_cout() -> Callable[[int], None]:
    """`std::cout.clear(state)`, as libstdc++ exports it; nothing where there is another library, or torch is silent.

    `std::cout` begins with the address of its table, which has the distance to its `std::ios` three places ahead
    (Itanium C++ ABI, 2.5.2).
    """
    import torch

    try:
        if torch.__version__ >= "2.13":
            return _ignore
        library = ctypes.CDLL("libstdc++.so.6")
        cout = ctypes.addressof(ctypes.c_void_p.in_dll(library, "_ZSt4cout"))
        clear = library["_ZNSt9basic_iosIcSt11char_traitsIcEE5clearESt12_Ios_Iostate"]
    except (OSError, ValueError, AttributeError):
        return _ignore
    table = ctypes.c_void_p.from_address(cout).value or 0
    distance = ctypes.c_ssize_t.from_address(table - 3 * ctypes.sizeof(ctypes.c_void_p)).value
    clear.argtypes, clear.restype = (ctypes.c_void_p, ctypes.c_int), None
    return functools.partial(clear, cout + distance)


def _ignore(state: int) -> None:
    pass


def let_go(name: str) -> None:
    """Free the destroyed groups of this name now: their connections close, and a rank that waits there for
    this one gets an error. To be called where no collective of theirs is under way.

    Groups destroyed beside them are kept for good: one may be under way there, which freeing would wait for.
    """
    import torch.distributed.distributed_c10d as c10d

    settle()
    alive = c10d._world.pg_map
    _kept[:] = [
        (group, since if group in alive else math.inf)
        for group, since in _kept
        if group in alive or group.group_name != name
    ]


def _forget(after: float) -> None:
    """Free the groups that were found destroyed `after` seconds ago or earlier."""
    import torch.distributed.distributed_c10d as c10d

    now, alive = time.monotonic(), c10d._world.pg_map
    ended = [(group, None if group in alive else since or now) for group, since in _kept]
    _kept[:] = [(group, since) for group, since in ended if since is None or now - since < after]


def settle(timeout: float = 1.0) -> None:
    """Returns once no gloo worker of this process is at work (Linux), after at most `timeout` seconds.

    Each sleep lends the interpreter's lock to a worker that waits for it; one that has just got it runs
    when we look, so only two quiet looks in a row count.
    """
    end, quiet = time.monotonic() + timeout, 0
    while quiet < 2 and time.monotonic() < end:
        time.sleep(0.001)
        quiet = 0 if _a_worker_runs() else quiet + 1


def _a_worker_runs() -> bool:
    try:
        threads = os.listdir("/proc/self/task")
    except OSError:
        return False
    for thread in threads:
        try:
            with open(f"/proc/self/task/{thread}/stat") as file:
                name, _, rest = file.read().partition("(")[2].rpartition(")")
        except OSError:
            continue  # it has just ended
        if name.startswith("pt_gloo") and rest.split()[0] == "R":
            return True
    return False
