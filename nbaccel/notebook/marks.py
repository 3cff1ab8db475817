"""A cheap mark of a value, another one as soon as the value has changed: it tells whether ranks have the newest.

Numbers and texts count by what they are. Anything else counts by which object it is and by the beginning of its
pickle; in that a tensor stands as the object it is, with torch's count of its changes in place, and a large array,
a function, a class or a module as the object it is. So nothing large is copied.
"""

from __future__ import annotations

import hashlib
import itertools
import pickle
import sys
import types
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, final

__all__ = ["Mark", "Sight", "see"]

_MOST = 1 << 18  # bytes of a pickle, made within 3 ms
_LARGE = 1 << 16  # bytes of an array
_ATOMS = (type(None), bool, int, float, complex, str, bytes)
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type)

Mark = tuple[int, bytes]
"""Equal while the value has not changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What was seen of a value."""

    mark: Mark
    code: tuple[object, ...]
    """The functions, classes and modules within it."""
    learns: bool
    """Whether tensors in it take gradients: a model, or its optimizer."""


def see(value: object) -> Sight:
    """Look at a value. One that cannot be pickled counts by which object it is, and by what comes before that part."""
    beginning = _Beginning()
    pickler = _Pickler(beginning)
    try:
        pickler.dump(value)
        identity = 0 if type(value) in _ATOMS else _number(value)
    except Exception:  # noqa: BLE001  # it is longer than we look, or its own code raises anything
        identity = _number(value)
    return Sight(mark=(identity, beginning.digest.digest()), code=tuple(pickler.code), learns=pickler.learns)


class _EnoughError(Exception):
    """More of it need not be seen."""


@final
class _Beginning:
    """Takes the first bytes of a pickle."""

    def __init__(self) -> None:
        self.digest = hashlib.blake2b(digest_size=16)
        self._left = _MOST

    def write(self, data: Any) -> int:
        part = memoryview(data)
        self.digest.update(part[: self._left])
        self._left -= part.nbytes
        if self._left < 0:
            raise _EnoughError
        return part.nbytes


@final
class _Pickler(pickle.Pickler):
    def __init__(self, file: _Beginning) -> None:
        super().__init__(file, protocol=5)
        self.code: list[object] = []
        self.learns = False
        self._tensor: Any = getattr(sys.modules.get("torch"), "Tensor", ())
        self._array: Any = getattr(sys.modules.get("numpy"), "ndarray", ())

    def reducer_override(self, obj: Any) -> Any:
        if obj is _stand_in:
            return NotImplemented
        if type(obj) is OrderedDict:  # a model has ten for each module, and their own way is slow
            return _stand_in, (dict(obj),) if obj else ()
        if isinstance(obj, _CODE):
            self.code.append(obj)
            return _stand_in, (_number(obj),)
        if isinstance(obj, self._tensor):
            self.learns |= obj.requires_grad
            return _stand_in, (_number(obj), 0 if obj.is_inference() else obj._version)
        if isinstance(obj, self._array) and obj.nbytes > _LARGE:
            return _stand_in, (_number(obj),)
        return NotImplemented


def _stand_in(*_: object) -> None:
    """Stands in a pickle that nobody opens."""


_numbers: dict[int, tuple[weakref.ref[Any], int]] = {}
"""By where the object lies in memory, which another one takes in time."""
_next = itertools.count(1)


def _number(obj: object) -> int:
    """This object's own number; where it lies in memory if nothing can refer to it weakly."""
    key = id(obj)
    known = _numbers.get(key)
    if known is not None and known[0]() is obj:
        return known[1]
    try:
        reference = weakref.ref(obj, lambda _: _numbers.pop(key, None))
    except TypeError:
        return key
    _numbers[key] = reference, next(_next)
    return _numbers[key][1]
