"""A value on its way to another process: pickled once, its large buffers in one shared memory file.

The receiver maps the file privately, so any number of ranks share one copy of every tensor and array and
still may write to theirs; `wire.tensors` has what that takes of torch. Functions and classes of the notebook (of
`__main__`) travel by value; in a rank they land in its `__main__`, where plain pickle finds them by name.
"""

from __future__ import annotations

import contextlib
import functools
import io
import linecache
import mmap
import os
import pickle
import sys
import types
import uuid
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import cloudpickle

from nbaccel.errors import PayloadError
from nbaccel.wire.content import INLINE, Content, Reader, seal, write_at
from nbaccel.wire.definitions import MainGlobals, by_value, dispatching, part_by_value, with_annotations
from nbaccel.wire.submodules import Pickler
from nbaccel.wire.tensors import TorchReducer, function_made_anew, same
from nbaccel.wire.unpicklable import explain

__all__ = ["Parcel", "Sidecar", "install", "pack", "tensors_and_modules", "unpack"]

_ALIGN = 64  # kernels differ in the last bit on weights that are not 64-byte aligned
_OUT_OF_BAND = 1 << 16  # below this a copy in the pickle is cheaper than a mapping
_PLAIN = (type(None), bool, int, float, str, bytes)
_LruCache = type(functools.lru_cache(lambda: None))
# What every receiver has, and finds by name.
_EVERYWHERE = frozenset(
    {cloudpickle.Pickler.__module__, __name__, TorchReducer.__module__, MainGlobals.__module__}
)


class Parcel(NamedTuple):
    """How to open what `pack` made. A larger content is in a descriptor that travels beside it.

    A named tuple because one travels with every call and every value: a frozen dataclass pickles slower.
    """

    pickled: int
    """Bytes of the pickle, at the start of the content."""
    buffers: tuple[tuple[int, int], ...] = ()
    """(offset, size) in bytes of each out-of-band buffer in the content."""
    inline: bytes | None = None
    """The content itself when it is small."""
    sidecar: bool = False
    """Whether a `Sidecar` follows the value."""
    modules: tuple[str, ...] = ()
    """Modules that opening it will import, unless they are imported already."""
    on_device: bool = False
    """Whether opening it needs an accelerator: then each rank opens it for itself."""


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What must be in place around a value from a notebook for it to feel at home elsewhere."""

    names: Mapping[str, Any] = field(default_factory=dict)
    """The notebook's classes and functions the value needs, by their name in `__main__`."""
    classes: Mapping[str, type] = field(default_factory=dict)
    """The same classes by identity, so that their instances come back as the notebook's own."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Text of the cells they were defined in, by file name: for tracebacks and `inspect.getsource`."""


# Classes that left this process by value, by identity, and the identities of those that came.
_sent: weakref.WeakValueDictionary[str, type] = weakref.WeakValueDictionary()
_known: weakref.WeakKeyDictionary[type, str] = weakref.WeakKeyDictionary()


def pack(value: Any, *, outward: bool) -> tuple[Parcel, int | None]:
    """Pickle `value` into a Parcel and, when it is large, a sealed memory file.

    Args:
        value: anything cloudpickle takes; torch storages and protocol-5 buffers are not copied twice.
        outward: True from the notebook to ranks: `__main__` travels as such and accelerator tensors
            arrive on the rank's own device. False from a rank back: the notebook's classes go by
            identity, accelerator tensors and wrapped modules come back plain and on the CPU.

    Returns:
        The parcel, and a descriptor the caller must close (None: everything is inline).

    Raises:
        PayloadError: a part of it cannot be pickled; the message names it.
    """
    if type(value) in _PLAIN and len(plain := pickle.dumps(value, protocol=5)) < INLINE:
        return Parcel(len(plain), inline=plain), None
    file = Content()
    try:
        pickler = _Pickler(file, outward=outward)
        try:
            pickler.dump(value)
        except PayloadError:
            raise
        except Exception as error:  # any __reduce__ may raise anything
            pickles = functools.partial(_pickles, outward=outward)
            raise PayloadError(explain(value, error, pickles, outward=outward)) from error
        sidecar = bool(pickler.names or pickler.classes or pickler.sources)
        if sidecar:
            pickler.dump((pickler.names, pickler.classes, pickler.sources))
        pickled = file.size
        buffers, end = [], pickled
        for buffer in pickler.buffers:
            offset = -(-end // _ALIGN) * _ALIGN
            raw = buffer.raw()
            write_at(file.fileno(), raw, offset)  # a buffer alone is too large to go inline
            buffers.append((offset, raw.nbytes))
            end = offset + raw.nbytes
        parcel = Parcel(
            pickled,
            tuple(buffers),
            inline=file.small,
            sidecar=sidecar,
            modules=tuple(sorted(pickler.modules)),
            on_device=pickler.torch.on_device,
        )
        if parcel.inline is not None:
            return parcel, None
        fd = os.dup(file.fileno())
    finally:
        file.close()
    seal(fd)
    return parcel, fd


def tensors_and_modules(value: Any) -> list[Any]:
    """Those that `pack` would send from a rank, each once, and modules without what is in them.

    Up to the first part that cannot be pickled: of that `pack` tells.
    """
    found: list[Any] = []
    with contextlib.suppress(Exception):  # any __reduce__ may raise anything
        _Pickler(_Nowhere(), outward=False, seen=found).dump(value)
    return found


def unpack(parcel: Parcel, fd: int | None = None) -> tuple[Any, Sidecar]:
    """The value in a parcel, and its sidecar. `fd` stays the caller's to close.

    Large buffers are private, writable views of the file: nothing is copied until it is written to.
    """
    file: Any
    buffers: list[memoryview] = []
    if parcel.inline is not None:
        file = io.BytesIO(parcel.inline)
    else:
        assert fd is not None, "this parcel's content travels in a descriptor"
        content = memoryview(mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE))
        buffers = [content[offset : offset + size] for offset, size in parcel.buffers]
        file = Reader(content[: parcel.pickled])
    unpickler = pickle.Unpickler(file, buffers=buffers)
    value = unpickler.load()
    sidecar = Sidecar(*unpickler.load()) if parcel.sidecar else Sidecar()
    for identity, cls in sidecar.classes.items():
        _known[cls] = identity
    return value, sidecar


def install(sidecar: Sidecar, main: types.ModuleType, *, replace: bool = False) -> None:
    """Give a rank's `__main__` the notebook's classes and functions, and `linecache` their source.

    Args:
        replace: whether a name that is there already gets the notebook's definition: the newer one.
    """
    for name, value in sidecar.names.items():
        if replace:
            main.__dict__[name] = value
        else:
            main.__dict__.setdefault(name, value)
    for filename, text in sidecar.sources.items():
        # no modification time: linecache then never looks for the file, which exists in no rank
        linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)


@final
class _Pickler(Pickler):
    """cloudpickle, with torch storages out of band and the notebook's `__main__` kept one namespace."""

    def __init__(self, file: Any, *, outward: bool, seen: list[Any] | None = None) -> None:
        self.torch = TorchReducer(outward=outward, seen=seen)
        self.buffers: list[pickle.PickleBuffer] = []
        self.names: dict[str, Any] = {}
        self.classes: dict[str, type] = {}
        self.sources: dict[str, str] = {}
        self.modules: set[str] = set()
        self._outward = outward
        super().__init__(file, protocol=5, buffer_callback=self._take_buffer)
        main = sys.modules.get("__main__")
        if outward and main is not None:
            # cloudpickle gives all functions with these globals this object for theirs
            self.globals_ref[id(main.__dict__)] = MainGlobals(__name__="__main__")

    def _take_buffer(self, buffer: pickle.PickleBuffer) -> bool:
        if buffer.raw().nbytes < _OUT_OF_BAND:
            return True  # in band
        self.buffers.append(buffer)
        return False

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (type, types.FunctionType)):
            made_anew = function_made_anew(obj) or dispatching(obj)
            return self._definition(obj) if made_anew is None else made_anew
        if (reduced := self.torch.reduce(obj)) is not None:
            return reduced
        if isinstance(obj, BaseException) and type(obj).__reduce__ is BaseException.__reduce__:
            return _exception, (type(obj), obj.args), obj.__dict__ or None
        if (rebuilt := _rebuilt(obj)) is not None:
            return rebuilt
        if (part := part_by_value(obj)) is not None and (self._outward or type(obj) not in _known):
            return part
        if isinstance(obj, types.ModuleType):
            self.modules.add(obj.__name__)
        return super().reducer_override(obj)

    def _definition(self, obj: type | types.FunctionType) -> Any:
        """A class or a function: by name, or by value if its module is not there in the receiver."""
        if obj.__module__ in _EVERYWHERE:
            return NotImplemented
        if not self._outward and isinstance(obj, type) and obj in _known:
            return _notebook_class, (_known[obj], obj.__qualname__)
        reduced = by_value(obj, super().reducer_override(obj))
        if reduced is NotImplemented:
            self.modules.add(obj.__module__)
        elif isinstance(reduced, tuple):
            self._note(obj)
            if self._outward and obj.__module__ == "__main__":
                reduced = with_annotations(obj, reduced)
        return reduced

    def _note(self, obj: type | types.FunctionType) -> None:
        """Remember a class or function that travels by value."""
        if not self._outward or obj.__module__ != "__main__":
            return
        if getattr(sys.modules.get("__main__"), obj.__qualname__, None) is obj:
            self.names[obj.__qualname__] = obj
        if isinstance(obj, type):
            identity = _known.get(obj) or uuid.uuid4().hex
            _known[obj] = identity
            _sent[identity] = obj
            self.classes[identity] = obj
        else:
            filename = obj.__code__.co_filename
            if filename not in self.sources and not os.path.exists(filename):
                lines = linecache.getlines(filename)
                if lines:
                    self.sources[filename] = "".join(lines)


def _pickles(value: Any, *, outward: bool) -> bool:
    try:
        _Pickler(_Nowhere(), outward=outward).dump(value)
    except Exception:  # noqa: BLE001  # any __reduce__ may raise anything: the question is only whether it does
        return False
    return True


@final
class _Nowhere(io.RawIOBase):
    """A file that keeps nothing."""

    def write(self, data: Any) -> int:
        return len(data)


def _exception(kind: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    """An exception as it was; calling its class would fail when `__init__` wants other arguments than
    it hands to the base class, or apply what it does to them twice."""
    made = kind.__new__(kind, *args)
    built_in: Any = next(base for base in kind.__mro__ if base.__module__ == "builtins")
    with contextlib.suppress(Exception):  # a class that kept its arguments from this one
        built_in.__init__(made, *args)  # `UnicodeError.start`, `SystemExit.code` and their like
    return made


def _rebuilt(obj: Any) -> tuple[Any, ...] | None:
    """How to make anew what pickle would look for by name, or by the lock it holds; None for anything else."""
    if type(obj) is _LruCache and obj.__module__ == "__main__":
        return _cached, (obj.__wrapped__, obj.cache_parameters())
    if type(obj) is functools.cached_property:
        return _cached_property, (obj.func, obj.attrname)
    if isinstance(obj, types.MethodType) and obj.__name__ == "get_ipython" and "IPython" in sys.modules:
        return same, (sys.modules["IPython"].get_ipython,)  # the rank's own shell, for `!ls` and `%time`
    exits = getattr(sys.modules.get("IPython.core.autocall"), "ExitAutocall", ())
    if isinstance(obj, exits):  # what `exit` and `quit` are in a notebook
        return same, (sys.exit,)
    return None


def _cached(function: Callable[..., Any], parameters: Mapping[str, Any]) -> Any:
    """`functools.lru_cache`, empty."""
    return functools.lru_cache(**parameters)(function)


def _cached_property(function: Callable[[Any], Any], name: str | None) -> Any:
    made = functools.cached_property(function)
    made.attrname = name  # a class that is built piece by piece tells nobody its name
    return made


def _notebook_class(identity: str, name: str) -> type:
    try:
        return _sent[identity]
    except KeyError:
        raise pickle.UnpicklingError(
            f"the notebook's class {name} is gone: it was deleted or redefined"
        ) from None
