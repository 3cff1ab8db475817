"""Which of its process's ranks the code that asks belongs to: there is one, but where ranks are threads."""

from __future__ import annotations

import threading
import weakref

__all__ = ["belong", "index", "index_of", "let_threads_follow"]

_thread = threading.local()
_owners: weakref.WeakKeyDictionary[threading.Thread, int] = weakref.WeakKeyDictionary()


def index() -> int:
    """The rank's place among those of this process; a thread that is known to be of none counts as the first's."""
    return getattr(_thread, "index", 0)


def index_of(thread: threading.Thread | None) -> int:
    """The same for another thread; None is one that C code has started."""
    return 0 if thread is None else _owners.get(thread, 0)


def belong(index: int) -> None:
    """Let the calling thread be of this rank."""
    _thread.index = _owners[threading.current_thread()] = index


def let_threads_follow() -> None:
    """Let a thread be of the rank that starts it, so that it prints there and finds the classes of its `__main__`."""
    start = threading.Thread.start

    def start_here(thread: threading.Thread) -> None:
        own, run = index(), thread.run

        def run_here() -> None:
            # else the thread would hold itself, and its tensors, until the collector comes
            del vars(thread)["run"]
            belong(own)
            run()

        setattr(thread, "run", run_here)  # noqa: B010  # a patch, and mypy should not see a method
        start(thread)

    setattr(threading.Thread, "start", start_here)  # noqa: B010
