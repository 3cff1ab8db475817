"""What in a value cannot be pickled: the variable, its type, where it is used, what to do instead."""

from __future__ import annotations

import dis
import functools
import linecache
import math
import time
import types
from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any

__all__ = ["explain"]

_LONGEST = 1.0  # seconds beyond what the person named: each step of the search pickles what is left once more
_NAMED = ("the variable", "argument", "args[", "kwargs[", "the returned value")
_MOST_OF_PATH = 30  # characters, beyond what the person named
_INSTEAD = {
    "lock": "create it inside the function",
    "RLock": "create it inside the function",
    "_io.": "open it inside the function, or pass its path",
    "socket": "connect inside the function",
    "generator": "pass the function that makes it, or list(…) of it",
    "Connection": "connect inside the function",
    "cudaStream": "create it inside the function",
    "Thread": "start it inside the function",
    "module": "import it inside the function",
}


def explain(value: Any, error: BaseException, pickles: Callable[[Any], bool], *, outward: bool) -> str:
    """A sentence that names the innermost part of `value` that does not pickle.

    Args:
        value: (function, args, kwargs), or a return value.
        error: what pickling it raised.
        pickles: whether a part of it can be pickled.
        outward: whether it was on its way to the ranks, and not back.
    """
    too_deep = isinstance(error, RecursionError) or isinstance(error.__cause__, RecursionError)
    steps = _innermost(value, "" if outward else "the returned value", pickles, named_only=too_deep)
    if not steps:
        return f"it cannot be pickled: {error}"
    (start, outer, _), (path, culprit, where) = steps[0], steps[-1]
    if too_deep:
        return (
            f"{start} is a {_type_name(outer)} that is nested too deeply to be sent to another process, as a list "
            f"whose nodes are linked one to the next{steps[0][2]}. Send its parts in a flat list or dict, and link "
            f"them again where it arrives. ({error})"
        )
    name, held = _type_name(culprit), ""
    if (
        len(path) > len(start) + _MOST_OF_PATH
    ):  # what lies deep inside a library's object says nothing by its path
        path, held, name = start, f" with a {name} inside it", _type_name(outer)
    instead = "return something else in its place, as its state"
    if outward:
        instead = next(
            (text for key, text in _INSTEAD.items() if key in name), "create it inside the function"
        )
    return (
        f"{path} is a {name}{held}, which cannot be sent to another process{where}. Instead, {instead}. "
        f"({error})"
    )


def _type_name(value: Any) -> str:
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


def _innermost(
    value: Any, path: str, pickles: Callable[[Any], bool], *, named_only: bool
) -> list[tuple[str, Any, str]]:
    """Follow what fails to pickle to a part none of whose own parts fails: each step's (path, part, use).

    The first is what the person called by a name: a variable, an argument, or all that was returned.

    Args:
        named_only: go no further than that.
    """
    where, seen, end = "", set[int](), math.inf
    if pickles(value):
        return []
    steps = [(path or "the value", value, "")]
    while not (named_only and path.startswith(_NAMED)):
        if path.startswith(_NAMED):
            end = min(end, time.monotonic() + _LONGEST)
        seen.add(id(value))
        found = _failing(_parts(value, path), seen, pickles, end)
        if found is None:
            break
        path, value, use = found
        where = use or where
        steps.append((path, value, where))
    named = next((at for at, step in enumerate(steps) if step[0].startswith(_NAMED)), 0)
    return steps[named:]


def _failing(
    parts: Iterable[tuple[str, Any, str]], seen: Set[int], pickles: Callable[[Any], bool], end: float
) -> tuple[str, Any, str] | None:
    """The first of these that is not seen and does not pickle; None too when time is up."""
    for step in parts:
        if time.monotonic() > end:
            return None
        if id(step[1]) not in seen and not pickles(step[1]):
            return step
    return None


def _parts(value: Any, path: str) -> Iterator[tuple[str, Any, str]]:
    """The direct parts of a value, each with a path a person understands."""
    if isinstance(value, types.FunctionType):
        yield from _parts_of_function(value)
    elif isinstance(value, types.MethodType):
        yield f"the object of {value.__qualname__}", value.__self__, ""
        yield value.__qualname__, value.__func__, ""
    elif isinstance(value, functools.partial):
        yield "the partial's function", value.func, ""
        yield "the partial's arguments", value.args, ""
        yield "the partial's arguments", value.keywords, ""
    elif isinstance(value, dict):
        for key, part in value.items():
            yield (f"{path}[{key!r}]" if path else f"argument {key!r}"), part, ""
    elif isinstance(value, (list, tuple, set, frozenset)):
        for index, part in enumerate(value):
            yield _item(value, index, part, path), part, ""
    elif isinstance(value, type):
        for name, part in vars(value).items():
            if not name.startswith("__") or isinstance(part, types.FunctionType):
                yield f"{value.__qualname__}.{name}", part, ""
    else:
        for name, part in getattr(value, "__dict__", {}).items():
            yield f"{path or type(value).__name__}.{name}", part, ""
        for name in getattr(type(value), "__slots__", ()):
            if hasattr(value, name):
                yield f"{path or type(value).__name__}.{name}", getattr(value, name), ""
        yield f"the class {type(value).__qualname__}", type(value), ""


def _item(value: Any, index: int, part: Any, path: str) -> str:
    """How to call an item; the outermost tuple is the call itself."""
    if path:
        return f"{path}[{index}]"
    if isinstance(value, tuple) and len(value) == 3 and callable(value[0]):
        return (getattr(part, "__name__", "the function"), "args", "kwargs")[index]
    return f"item {index}"


def _parts_of_function(function: types.FunctionType) -> Iterator[tuple[str, Any, str]]:
    name = function.__name__
    for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield f"the variable {variable!r}", cell.cell_contents, _use(function, variable)
        except ValueError:
            continue  # a cell that is still empty
    for variable in _names(function.__code__):
        if variable in function.__globals__:
            yield f"the variable {variable!r}", function.__globals__[variable], _use(function, variable)
    for index, default in enumerate(function.__defaults__ or ()):
        yield f"default {index} of {name}()", default, ""
    for key, default in (function.__kwdefaults__ or {}).items():
        yield f"the default of {key!r} of {name}()", default, ""


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _names(code: types.CodeType) -> list[str]:
    return list(dict.fromkeys(name for inner in _codes(code) for name in inner.co_names))


def _use(function: types.FunctionType, variable: str) -> str:
    """ ", used in f(), line 4: `with lock:`" for the first line that uses the variable."""
    for code in _codes(function.__code__):
        line = code.co_firstlineno
        for step in dis.get_instructions(code):
            line = (
                step.starts_line
                if type(step.starts_line) is int
                else getattr(step, "line_number", None) or line
            )
            if step.argval == variable:
                source = linecache.getline(code.co_filename, line).strip()
                return f"; it is used in {function.__name__}(), line {line}" + (
                    f": `{source}`" if source else ""
                )
    return f"; it is used in {function.__name__}()"
