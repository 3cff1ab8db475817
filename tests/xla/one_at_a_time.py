"""Lets thread replicas of torch_xla's CPU device compile one at a time, so that their collectives meet. For tests.

XLA:CPU knows a collective by the program it is in. Two replicas that compile one graph at the same moment get two
programs, and each waits in its own for the other (pytorch/xla#5005, #9089). Where the second compiles after the first
it finds the first's program in torch_xla's cache. So whatever may compile takes its turn here. The turn ends with the
compilation and not with the call: the call also lets go of the step's old buffers, which waits for the program to
end, and that waits in its collective for the replica whose turn it is next. TPUs need none of this.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

_READS = ("__bool__", "__float__", "__int__", "__repr__", "cpu", "item", "numpy", "to", "tolist")
_state = threading.RLock()
_installed = threading.Event()
_turns: list[tuple[int, int]] = []
"""For the call whose turn it is, the state of the cache when it began: another one says that it has its program."""


def install() -> None:
    """In the process of the replicas, by any of their threads, before the first collective; again is no harm."""
    with _state:
        if not _installed.is_set():
            _installed.set()
            for name in ("_xla_step_marker", "_xla_sync_multi"):
                _take_turns(name)
            for name in _READS:
                _cut_before(name)


def alone() -> AbstractContextManager[Any]:
    """For what replicas share besides, held by one at a time."""
    return _state


def _native() -> Any:
    import torch_xla

    return torch_xla._XLAC


def _take_turns(name: str) -> None:
    native = _native()
    original = getattr(native, name)

    def in_turn(*args: Any, **kwargs: Any) -> Any:
        with _turn():
            result = original(*args, **kwargs)
        device = native._xla_get_default_device()
        native._xla_wait_device_ops([f"CPU:{native._xla_get_device_ordinal(device)}"])
        return result

    setattr(native, name, in_turn)


@contextmanager
def _turn() -> Iterator[None]:
    while True:
        with _state:
            now = _programs()
            if not _turns or now != _turns[0]:
                _turns[:] = [now]
                break
        time.sleep(0.002)
    try:
        yield
    finally:
        with _state:
            if _turns == [now]:
                _turns.clear()


def _programs() -> tuple[int, int]:
    """How often a program was found in the cache, and how many it holds."""
    native = _native()
    return int(
        native._xla_counter_value("CachedCompile") or 0
    ), native._xla_get_num_cached_compilation_graph()


def _cut_before(name: str) -> None:
    """Reading a value compiles too: have it done before, in turn."""
    original: Callable[..., Any] = getattr(torch.Tensor, name)

    def read(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.device.type == "xla":
            _native()._xla_sync_multi([self.detach()], [], False, True)
        return original(self, *args, **kwargs)

    setattr(torch.Tensor, name, read)
