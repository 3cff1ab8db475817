"""Checks of what options are given: types, choices and counts; what is wrong is told in a user's words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from nbaccel.errors import ConfigError

__all__ = ["check_types", "choice", "count", "did_you_mean", "nearest", "which_there_are"]


def check_types(key: str, options: Any) -> None:
    """That each of these options, a dataclass, is of the type it is declared with.

    Args:
        key: what the options are called in messages: "fsdp".

    Raises:
        ConfigError: one is not.
    """
    for name, kind in get_type_hints(type(options)).items():
        value = getattr(options, name)
        if not _fits(value, kind):
            choices = [one for part in _parts(kind) if get_origin(part) is Literal for one in get_args(part)]
            if choices and not _in_words(kind):
                choice(f"{key}: {name}", value, choices)
            *others, last = [*map(repr, choices), *_in_words(kind)]
            wanted = f"{', '.join(others)} or {last}" if others else last
            raise ConfigError(f"{key}: {name} is {value!r}; it must be {wanted}")


def choice(what: str, value: object, choices: Sequence[object]) -> None:
    """That a value is one of these.

    Raises:
        ConfigError: it is not; the nearest is named.
    """
    if value not in choices:
        allowed = ", ".join(map(repr, choices))
        raise ConfigError(f"{what} is {value!r}; it must be one of {allowed}.{did_you_mean(value, choices)}")


def count(what: str, value: object, least: int) -> None:
    """That a value is a number of things, at least so many.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{what} is {value!r}; it must be an int of at least {least}")


def nearest(name: object, known: Iterable[object]) -> str | None:
    """Which of these was meant, if one is near."""
    return next(iter(difflib.get_close_matches(str(name), list(map(str, known)), n=1)), None)


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """ " Did you mean 'x'?", to stand behind a sentence; empty when nothing is near."""
    close = nearest(name, known)
    return f" Did you mean {close!r}?" if close else ""


def which_there_are(name: object, known: Iterable[str]) -> str:
    """What was meant, or else all there is, to end a sentence about a name that is unknown."""
    names = sorted(known)
    close = nearest(name, names)
    return f"; did you mean {close!r}?" if close else f". There are {', '.join(names)}."


def _parts(kind: Any) -> Iterator[Any]:
    """The types of which a value may be one."""
    if get_origin(kind) in (Union, UnionType):
        for part in get_args(kind):
            yield from _parts(part)
    else:
        yield kind


def _fits(value: object, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in inner)
    if origin is Literal:  # True equals 1, and is none of 0, 1, 2
        return not isinstance(value, bool) and any(
            value == one and isinstance(value, type(one)) for one in inner
        )
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if origin is Sequence:
        return (
            isinstance(value, Sequence)
            and not isinstance(value, str)
            and all(_fits(one, inner[0]) for one in value)
        )
    return kind is Any or isinstance(value, origin or kind)


def _in_words(kind: Any) -> list[str]:
    """What a value of this type is called, but for choices."""
    words: dict[Any, str] = {
        bool: "true or false",
        int: "an int",
        float: "a number",
        str: "text",
        Sequence: "a list of names",
        Mapping: "keys with values",
        Callable: "a function",
        type: "a class",
    }
    parts = (get_origin(part) or part for part in _parts(kind))
    return [words.get(part) or _class_in_words(part) for part in parts if part not in (Literal, NoneType)]


def _class_in_words(kind: type) -> str:
    key = re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()
    return f"{kind.__name__}(...); in YAML, the key {key} beside this one"
