"""Multiprocessing inside a rank: the notebook's functions and classes reach spawned workers too.

A DataLoader worker that is spawned or forkserved has a `__main__` of its own without the notebook's
definitions; plain pickle would send their names and stall or fail there. By value they arrive, and land
in the worker's `__main__`: what it sends back by name is then the notebook's own class here.
"""

from __future__ import annotations

import io
import sys
import types
from multiprocessing.reduction import ForkingPickler
from typing import Any, final

import cloudpickle

from nbaccel.wire.definitions import MainGlobals, by_value, part_by_value
from nbaccel.wire.submodules import Pickler

__all__ = ["by_value_in_main"]


def by_value_in_main() -> None:
    """Let multiprocessing's pickler send `__main__`'s functions and classes by value from now on."""
    # the C pickler consults a dispatch table for neither functions nor classes, only this method
    setattr(ForkingPickler, "reducer_override", _reduce)  # noqa: B010  # a patch, and mypy should not see a method


def _reduce(_pickler: ForkingPickler, obj: Any) -> Any:
    if isinstance(obj, (types.FunctionType, type)) and obj.__module__ == "__main__":
        return _arrive, (_dumps(obj),)
    return NotImplemented


@final
class _Pickler(Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (types.FunctionType, type)):
            return by_value(obj, super().reducer_override(obj))
        return part_by_value(obj) or super().reducer_override(obj)


def _dumps(obj: Any) -> bytes:
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, protocol=5)
    # cloudpickle gives all functions with these globals this object for theirs
    pickler.globals_ref[id(sys.modules["__main__"].__dict__)] = MainGlobals(__name__="__main__")
    pickler.dump(obj)
    return buffer.getvalue()


def _arrive(data: bytes) -> Any:
    obj = cloudpickle.loads(data)
    sys.modules["__main__"].__dict__.setdefault(obj.__qualname__, obj)
    return obj
