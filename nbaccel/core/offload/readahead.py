"""Reading the next mapped layers while one runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import final

from torch.utils.hooks import RemovableHandle

from nbaccel.core.model.hooks import Hook
from nbaccel.core.offload.units import Order, Unit, begins_again_after_fork
from nbaccel.core.offload.weights import are_resident, make_resident, sample_pages

__all__ = ["Readahead"]

_LOOK_AGAIN = 1.0
"""Seconds for which a layer that was in the page cache is taken to be there still."""


@final
class Readahead:
    """Reads the next mapped layers into the page cache while one runs, where they are not there already."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self._order = Order(units)
        self._pages = {
            unit: [page for tensor in unit.mapped for page in sample_pages(tensor)] for unit in units
        }
        self._looked = dict.fromkeys(units, 0.0)
        self.begin_again()
        begins_again_after_fork(self)

    def begin_again(self) -> None:
        """In a forked process, which has no thread."""
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="nbaccel-readahead")

    def hooks(self, unit: Unit) -> list[RemovableHandle]:
        """Attached to the unit's module."""
        enter = Hook(lambda module, args: self.enter(unit))
        return [unit.module.register_forward_pre_hook(enter, prepend=True)]

    def enter(self, unit: Unit) -> None:
        """Asks for the units after this one."""
        self._order.entered(unit)
        now = time.monotonic()
        for later in self._order.after(unit):
            if now - self._looked[later] >= _LOOK_AGAIN:
                self._looked[later] = now
                if not are_resident(self._pages[later]):
                    self._worker.submit(_read, later)

    def close(self) -> None:
        """Ends the thread; may be called twice."""
        self._worker.shutdown(wait=True, cancel_futures=True)


def _read(unit: Unit) -> None:
    for tensor in unit.mapped:
        make_resident(tensor)
