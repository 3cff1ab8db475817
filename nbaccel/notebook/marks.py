"""A cheap mark of a value, another one as soon as the value has changed: it tells whether ranks have the newest.

Numbers and texts count by what they are. Anything else counts by which object it is and by the beginning of its
pickle, and where that is cut off by the sizes of what it holds; in the pickle a tensor stands as the object it is, with
torch's count of its changes in place, and a large array or a module as the object it is. A function or a class of the
notebook stands as the object it is with what it holds: a closure, defaults, attributes. So nothing large is copied.
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import itertools
import pickle
import sys
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

__all__ = ["Mark", "Sight", "number", "see"]

_MOST = 1 << 18  # bytes of a pickle, made within 3 ms
_LARGE = 1 << 16  # bytes of an array
_FEW = 1000  # parts of a reduced object that are looked at
_CONTAINERS = (list, tuple, dict, set, frozenset, deque)
_ATOMS = (type(None), bool, int, float, complex, str, bytes)
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type)
# What stands around a function, and calls it.
_WRAPPERS = (
    staticmethod,
    classmethod,
    property,
    functools.partial,
    functools.cached_property,
    functools._lru_cache_wrapper,
)
# How a class may have its objects pickled in a way of its own.
_REDUCING = ("__reduce_ex__", "__reduce__", "__getstate__", "__getnewargs__", "__getnewargs_ex__")
# Caches: what is in them comes and goes with what the rest of the program holds.
_WEAK = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet)
# What Python keeps in a class for itself, some of it only once somebody has asked for it.
_KEPT_BY_PYTHON = frozenset(
    {"__dict__", "__weakref__", "__slotnames__", "__annotations__", "__annotations_cache__", "_abc_impl"}
)

Mark = tuple[int, bytes]
"""Equal while the value has not changed; the first is the object's own number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What was seen of a value."""

    mark: Mark
    code: tuple[object, ...]
    """The functions, classes and modules within it, and itself if it is one."""
    learns: bool
    """Whether tensors in it take gradients: a model, or its optimizer."""


def see(value: object) -> Sight:
    """Look at a value. A part that cannot be pickled counts by which object it is, and by its attributes."""
    beginning = _Beginning()
    pickler = _Pickler(beginning)
    try:
        try:
            pickler.dump(value)
        except _EnoughError:
            beginning.digest.update(repr(_sizes(value)).encode())
            raise
        identity = 0 if type(value) in _ATOMS else number(value)
    except Exception:  # noqa: BLE001  # it is longer than we look, or its own code raises anything
        identity = number(value)
    return Sight(mark=(identity, beginning.digest.digest()), code=tuple(pickler.code), learns=pickler.learns)


def _sizes(value: object) -> list[int]:
    """Of containers in it, the outer ones first: most of what is too long to be looked at changes by growing."""
    left, seen, sizes = deque([value]), {id(value)}, list[int]()
    while left:
        part = left.popleft()
        if isinstance(part, (*_CODE, *_ATOMS)):
            continue
        held: Any = part if isinstance(part, _CONTAINERS) else getattr(part, "__dict__", None)
        if not isinstance(held, _CONTAINERS):
            continue
        sizes.append(len(held))
        inner = held.values() if isinstance(held, dict) else held
        for one in itertools.islice(inner, _FEW - len(seen)):
            if id(one) not in seen:
                seen.add(id(one))
                left.append(one)
    return sizes


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
        self._made: dict[int, object] = {}
        """Tensors and arrays that only this pickle holds, by where they lie."""
        self._plain: set[type] = set()
        """Types whose objects are all of them pickled in Python's own way: there may be many."""
        self._tensor: Any = getattr(sys.modules.get("torch"), "Tensor", ())
        self._array: Any = getattr(sys.modules.get("numpy"), "ndarray", ())

    def reducer_override(self, obj: Any) -> Any:
        if obj is _stand_in or type(obj) in self._plain:
            return NotImplemented
        if type(obj) is OrderedDict:  # a model has ten for each module, and their own way is slow
            return _stand_in, (dict(obj),) if obj else ()
        # what something holds comes last, since it may refer to that in turn
        if isinstance(obj, _CODE):
            self.code.append(obj)
            return _stand_in, (number(obj),), _held_by_code(obj)
        if isinstance(obj, _WRAPPERS):
            return _stand_in, (number(obj),), _held_by_wrapper(obj)
        if isinstance(obj, self._tensor):
            self.learns |= obj.requires_grad
            if id(obj) in self._made:
                return _stand_in, (obj.dtype, tuple(obj.shape), _bytes_of(obj))
            version = 0 if obj.is_inference() else obj._version
            return _stand_in, (number(obj), version, obj.requires_grad)
        if isinstance(obj, self._array):
            large = obj.nbytes > _LARGE and id(obj) not in self._made
            return (_stand_in, (number(obj),)) if large else NotImplemented
        return (_stand_in, (number(obj),)) if isinstance(obj, _WEAK) else self._reduced(obj)

    def _reduced(self, obj: Any) -> Any:
        """As its own code reduces it."""
        try:
            reduced = _reduce(obj)
            if _is_plain(type(obj)):
                self._plain.add(type(obj))
                return reduced
            if isinstance(reduced, str):  # found by name
                return _stand_in, (number(obj),)
            if large := [part for part in _given(obj, reduced) if self._is_large(part)]:
                again = list(_given(obj, _reduce(obj)))
                held = set(map(id, again))
                self._made |= {id(part): part for part in large if id(part) not in held}
        except Exception:  # noqa: BLE001  # it may raise anything
            return _stand_in, (number(obj),), getattr(obj, "__dict__", None) or None
        return reduced

    def _is_large(self, part: object) -> bool:
        return isinstance(part, self._tensor) or (isinstance(part, self._array) and part.nbytes > _LARGE)


def _stand_in(*_: object) -> None:
    """Stands in a pickle that nobody opens."""


def _reduce(obj: Any) -> Any:
    reduce = copyreg.dispatch_table.get(type(obj))
    return obj.__reduce_ex__(5) if reduce is None else reduce(obj)


def _is_plain(kind: type) -> bool:
    return kind not in copyreg.dispatch_table and all(
        getattr(kind, name, None) is getattr(object, name, None) for name in _REDUCING
    )


def _given(obj: Any, reduced: tuple[Any, ...]) -> Iterator[object]:
    """What an object's own code gives as its arguments and its state, which it may make for the asking: a generator
    of random numbers gives its state as a tensor, a fitted tree its nodes as an array."""
    for given in reduced[1:3]:
        for part in given if isinstance(given, tuple) else (given,):
            if not isinstance(part, dict):
                yield part
            elif part is not getattr(obj, "__dict__", None):
                yield from itertools.islice(part.values(), _FEW)


def _bytes_of(tensor: Any) -> bytes:
    import torch

    flat = tensor.detach().cpu().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


# ── what code holds ───────────────────────────────────────────────────────────────────────────────────


def _held_by_code(obj: Any) -> object:
    """What belongs to a function or a class that travels by value, and may change in place; None for others."""
    if isinstance(obj, types.FunctionType):
        # the wrapper of a library's decorator may not say that it is the notebook's
        return _held_by_function(obj) if _is_notebooks(obj) or "<locals>" in obj.__qualname__ else None
    return _held_by_class(obj) if isinstance(obj, type) and _is_notebooks(obj) else None


def _is_notebooks(obj: Any) -> bool:
    return bool(obj.__module__ == "__main__")


def _held_by_function(function: types.FunctionType) -> object:
    attributes = vars(function)
    if (original := attributes.get("_torchdynamo_orig_callable")) is not None:
        return [original]  # around it is what torch keeps of its compiling
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:
            continue  # it is not filled yet
    return number(function.__code__), cells, function.__defaults__, function.__kwdefaults__, attributes


def _held_by_class(kind: type) -> object:
    own = [(name, value) for name, value in vars(kind).items() if name not in _KEPT_BY_PYTHON]
    # code before data: data may be longer than we look
    own.sort(key=lambda item: not isinstance(item[1], (*_CODE, *_WRAPPERS)))
    return type(kind), kind.__bases__, own


def _held_by_wrapper(wrapper: Any) -> object:
    if isinstance(wrapper, functools.partial):
        return wrapper.func, wrapper.args, wrapper.keywords
    return [
        getattr(wrapper, name, None) for name in ("__func__", "__wrapped__", "fget", "fset", "fdel", "func")
    ]


# ── which object ──────────────────────────────────────────────────────────────────────────────────────

_numbers: dict[int, tuple[weakref.ref[Any], int]] = {}
"""By where the object lies in memory, which another one takes in time."""
_next = itertools.count(1)


def number(obj: object) -> int:
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
