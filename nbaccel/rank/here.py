"""Which of its process's ranks the code that asks belongs to: there is one, but where ranks are threads."""

from __future__ import annotations

import threading

__all__ = ["belong", "index", "let_threads_follow"]

_thread = threading.local()


def index() -> int:
    """The rank's place among those of this process; a thread that is known to be of none counts as the first's."""
    return getattr(_thread, "index", 0)


def belong(index: int) -> None:
    """Let the calling thread be of this rank."""
    _thread.index = index


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
