"""Functions, classes and enumerations on their way to another process by value, as those of the notebook are.

cloudpickle takes them apart. What it does otherwise than the notebook would is done here: closures that share a
variable go on sharing it; making a class anew runs no code of the user's, since `__init_subclass__` and metaclasses
ran when it was defined, and what they did is in what travels; members of an enumeration arrive as they are, without
`__new__` and `__init__`.
"""

from __future__ import annotations

import abc
import contextlib
import enum
import functools
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, final

from cloudpickle import cloudpickle

from nbaccel.wire.annotations import named_by

__all__ = ["MainGlobals", "by_value", "dispatching", "part_by_value", "with_annotations"]

# What an enumeration keeps of its members, and cloudpickle leaves to the metaclass.
_OF_MEMBERS = (
    "_generate_next_value_",
    "_member_map_",
    "_member_names_",
    "_member_type_",
    "_value2member_map_",
)
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that is not built in


def by_value(obj: type | types.FunctionType, reduced: Any) -> Any:
    """How to make a class or a function anew.

    Args:
        reduced: what cloudpickle's pickler says of it: NotImplemented where it goes by name.
    """
    if reduced is NotImplemented or len(reduced) < 6:  # the type of None, and other built-in ones
        return reduced
    if isinstance(obj, types.FunctionType):
        return _function(obj, reduced) if obj.__closure__ else reduced
    return _enumeration(obj, reduced) if isinstance(obj, enum.EnumMeta) else _class(obj, reduced)


def part_by_value(obj: Any) -> tuple[Any, ...] | None:
    """How to make anew a variable of closures, or a member of an enumeration that goes by value; else None."""
    if type(obj) is types.CellType:
        try:
            return _empty_cell, (), (obj.cell_contents,), None, None, _fill_cell
        except ValueError:  # it is not filled yet
            return _empty_cell, ()
    if isinstance(obj, enum.Enum) and not _goes_by_name(type(obj)):
        return _member_by_value(obj)
    return None


def _goes_by_name(cls: type) -> bool:
    return bool(cloudpickle._should_pickle_by_reference(cls))


# ── functions ─────────────────────────────────────────────────────────────────────────────────────────


@final
class MainGlobals(dict[str, Any]):
    """Stands for the notebook's globals in a pickle; becomes the receiver's `__main__` namespace."""

    def __reduce__(self) -> tuple[Callable[[], dict[str, Any]], tuple[()]]:
        return _main_globals, ()


def _main_globals() -> dict[str, Any]:
    return sys.modules["__main__"].__dict__


def _function(function: types.FunctionType, reduced: tuple[Any, ...]) -> tuple[Any, ...]:
    """A closure is made with its own cells, each filled once it is there: cloudpickle makes new ones for each function,
    and functions that share a variable part."""
    make, made_of, (attributes, slots), *rest = reduced
    return make, (*made_of[:-1], function.__closure__), (attributes, {**slots, "__closure__": None}), *rest


def _empty_cell() -> types.CellType:
    return types.CellType()


def _fill_cell(cell: types.CellType, state: tuple[Any]) -> None:
    (cell.cell_contents,) = state


def with_annotations(obj: type | types.FunctionType, reduced: tuple[Any, ...]) -> tuple[Any, ...]:
    """How to make a class or function of the notebook whose annotations, kept as text, name what is there."""
    named = named_by(obj, sys.modules["__main__"].__dict__)
    if not named:
        return reduced
    *made, state, _, _, set_state = reduced
    return *made, (state, named, set_state), None, None, _annotated


def _annotated(obj: Any, state: tuple[Any, Mapping[str, Any], Callable[[Any, Any], Any]]) -> None:
    own, named, set_state = state
    for name, value in named.items():
        _main_globals().setdefault(name, value)
    set_state(obj, own)


def dispatching(function: Any) -> tuple[Any, ...] | None:
    """How to make anew what `functools.singledispatch` has made of functions of the notebook; else None."""
    registry = vars(function).get("registry")
    if not hasattr(function, "dispatch") or not isinstance(registry, types.MappingProxyType):
        return None
    if isinstance(function, type) or function.__module__ != "__main__":
        return None
    # Its functions may call it, so it is there before they are.
    return _dispatching, (function.__qualname__,), dict(registry), None, None, _register


def _dispatching(name: str) -> Any:
    def nothing(*_: Any) -> None:
        """Until its functions have come."""

    nothing.__module__, nothing.__qualname__ = "__main__", name
    return functools.singledispatch(nothing)


def _register(function: Any, registry: Mapping[type, Callable[..., Any]]) -> None:
    for kind, implementation in registry.items():
        function.register(kind, implementation)
    functools.update_wrapper(function, registry[object])


# ── classes ───────────────────────────────────────────────────────────────────────────────────────────


def _class(cls: type, reduced: tuple[Any, ...]) -> tuple[Any, ...]:
    _, (meta, name, bases, namespace, tracker, _), state, *rest = reduced
    namespace = {**namespace, "__qualname__": cls.__qualname__}
    importable = next(kind for kind in meta.__mro__ if kind is type or _goes_by_name(kind))
    hooks = _hooks(cls)
    if importable is meta and not hooks:
        return _skeleton, (tracker, meta, name, bases, namespace), state, *rest
    make = functools.partial(_made_quietly, importable, meta, hooks)
    return _skeleton, (tracker, make, name, bases, namespace), (importable, state[0]), None, None, _fill


def _hooks(cls: type) -> tuple[type, ...]:
    """The bases whose own `__init_subclass__` goes by value."""
    return tuple(
        base for base in cls.__mro__[1:] if "__init_subclass__" in base.__dict__ and not _goes_by_name(base)
    )


def _skeleton(
    tracker: str, meta: Any, name: str, bases: tuple[Any, ...], namespace: Mapping[str, Any]
) -> Any:
    """An empty class, or the one that came before: another would be among the subclasses of its bases."""
    known = cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID.get(tracker)
    if known is not None:
        return known
    return cloudpickle._make_skeleton_class(meta, name, bases, namespace, tracker, None)


def _made_quietly(
    importable: Any,
    meta: type,
    hooks: Iterable[type],
    name: str,
    bases: tuple[type, ...],
    namespace: dict[str, Any],
) -> Any:
    """An empty class, by the metaclass of a library, or `type`, that the user's own derives from."""
    with _hushed(hooks):
        cls = importable.__new__(meta, name, bases, namespace)
        importable.__init__(cls, name, bases, namespace)
    return cls


@contextlib.contextmanager
def _hushed(hooks: Iterable[type]) -> Iterator[None]:
    """For its time, these classes are not told of new subclasses."""
    own = {cls: vars(cls)["__init_subclass__"] for cls in hooks if "__init_subclass__" in vars(cls)}
    try:
        for cls in own:
            type.__setattr__(cls, "__init_subclass__", classmethod(lambda cls: None))
        yield
    finally:
        for cls, hook in own.items():
            type.__setattr__(cls, "__init_subclass__", hook)


def _fill(cls: Any, state: tuple[Any, Mapping[str, Any]]) -> None:
    """As cloudpickle does it, but for a `__setattr__` of the user's metaclass."""
    importable, attributes = state
    has_members = "_member_map_" in vars(cls)  # which may be in use here, and have combinations of their own
    for name, value in attributes.items():
        if name == "_abc_impl":
            for subclass in value:
                abc.ABCMeta.register(cls, subclass)
        elif not (has_members and name in _OF_MEMBERS):
            importable.__setattr__(cls, name, value)
    if "__firstlineno__" in attributes:  # Python 3.13 deletes it when `__module__` is set
        importable.__setattr__(cls, "__firstlineno__", attributes["__firstlineno__"])


# ── enumerations ──────────────────────────────────────────────────────────────────────────────────────


def _enumeration(cls: Any, reduced: tuple[Any, ...]) -> tuple[Any, ...]:
    """An ordinary class, for all that makes it another is kept in it."""
    _, (bases, name, _, members, module, tracker, _), (attributes, _), *_ = reduced
    own = {key: vars(cls)[key] for key in (*members, *_OF_MEMBERS) if key in vars(cls)}
    metas = type(cls).__mro__
    beyond = metas[metas.index(enum.EnumMeta) + 1 :]
    importable = next(kind for kind in beyond if kind is type or _goes_by_name(kind))
    make = functools.partial(_made_quietly, importable, type(cls), _hooks(cls))
    namespace = {"__module__": module, "__qualname__": cls.__qualname__}
    return (
        *(_skeleton, (tracker, make, name, bases, namespace)),
        *((importable, {**attributes, **own}), None, None, _fill),
    )


def _member_by_value(member: Any) -> tuple[Any, ...]:
    cls = type(member)
    value = None if cls._member_map_.get(member._name_) is member else member._value_
    built_in = next(base for base in cls.__mro__ if not base.__flags__ & _HEAP_TYPE)
    made_of = (cls, member._name_, value, built_in, _content(member, built_in))
    return _member, made_of, vars(member), None, None, _fill_member


def _content(member: Any, built_in: Any) -> tuple[Any, ...]:
    """What this type makes the text, the number or the date of that the member is besides."""
    if built_in is object:
        return ()
    if hasattr(built_in, "__getnewargs__"):
        return tuple(built_in.__getnewargs__(member))
    return tuple(built_in.__reduce__(member)[1])


def _member(cls: Any, name: str | None, value: Any, built_in: Any, content: tuple[Any, ...]) -> Any:
    """A member of an enumeration that is being made; of one that is there, the one it has.

    Args:
        value: of a combination of flags, which has no name here.
        built_in: the nearest type of Python's own.
        content: what that makes it of.
    """
    members = vars(cls).get("_member_map_")
    if members is not None:
        return members[name] if name in members else cls(value)
    member = built_in.__new__(cls, *content)
    member.__dict__["_name_"] = name  # by which it is found as the key of a dict
    return member


def _fill_member(member: Any, state: Mapping[str, Any]) -> None:
    member.__dict__.update(state)
