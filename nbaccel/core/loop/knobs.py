"""Values the loop asks for anew at each step, so that they can be changed while it runs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar, final

from nbaccel.core.world import World
from nbaccel.errors import ConfigError
from nbaccel.wire import events

__all__ = ["Knobs"]

T = TypeVar("T", bool, int, float, str)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Knob:
    value: Any
    low: float | None
    high: float | None
    turned: bool = False
    """Whether it was ever changed; what never was keeps following the program's default."""


@final
class Knobs:
    """The run's knobs. `turn` is called on all ranks at the same optimizer step."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._known: dict[str, _Knob] = {}
        self._early: dict[str, Any] = {}
        """Values that arrived, or were loaded, before the loop first asked for their knob."""

    def value(self, name: str, default: T, *, low: float | None, high: float | None, step: int) -> T:
        """The value in force; `default` until it is changed.

        Raises:
            ConfigError: `default` is of no kind that can be changed, or outside its limits; or the knob was
                asked for with other limits before.
        """
        knob = self._known.get(name)
        if knob is None:
            knob = self._declare(name, default, low, high, step)
        elif (knob.low, knob.high) != (low, high):
            raise ConfigError(
                f"knob {name!r} is asked for with low={low}, high={high}, and was with low={knob.low}, "
                f"high={knob.high} before; give the same limits everywhere"
            )
        value: T = knob.value
        return value

    def turn(self, changes: Iterable[tuple[str, Any]], step: int) -> None:
        """Takes new values over, (name, value) in order; what a knob cannot take is left out, aloud."""
        for name, wanted in changes:
            knob = self._known.get(name)
            if knob is None:
                self._early[name] = wanted
                continue
            try:
                value = _fitting(name, wanted, knob.value, knob.low, knob.high)
            except ConfigError as problem:
                if self._world.is_main:
                    warnings.warn(f"{problem}; it stays {knob.value!r}", stacklevel=2)
                continue
            self._known[name] = replace(knob, value=value, turned=True)
            self._tell(name, step)

    def state(self) -> dict[str, Any]:
        """What was changed, for a checkpoint."""
        turned = {name: knob.value for name, knob in self._known.items() if knob.turned}
        return {**self._early, **turned}

    def _declare(self, name: str, default: Any, low: float | None, high: float | None, step: int) -> _Knob:
        if not isinstance(default, (bool, int, float, str)):
            raise ConfigError(
                f"knob {name!r} has a {type(default).__name__} for default; it must be a number, a bool or "
                "a string"
            )
        value = _fitting(name, default, default, low, high)
        self._known[name] = _Knob(value=value, low=low, high=high)
        early = self._early.pop(name, None)
        if early is None:
            self._tell(name, step)
        else:
            self.turn([(name, early)], step)
        return self._known[name]

    def _tell(self, name: str, step: int) -> None:
        if self._world.is_main:
            knob = self._known[name]
            events.emit(events.Knob(name=name, value=knob.value, step=step, low=knob.low, high=knob.high))


def _fitting(name: str, wanted: Any, like: Any, low: float | None, high: float | None) -> Any:
    """`wanted` as the kind of value `like` is.

    Raises:
        ConfigError: it is of another kind, or outside the limits.
    """
    kind = type(like)
    number = isinstance(wanted, (int, float)) and not isinstance(wanted, bool)
    whole = number and math.isfinite(wanted) and wanted == int(wanted)
    fits = {bool: isinstance(wanted, bool), int: whole, float: number, str: isinstance(wanted, str)}[kind]
    if not fits:
        raise ConfigError(f"knob {name!r} takes a value of type {kind.__name__}, not {wanted!r}")
    value = kind(wanted)
    if kind in (int, float):
        beyond = (low is not None and value < low) or (high is not None and value > high)
        if beyond or not math.isfinite(value):
            raise ConfigError(f"knob {name!r} cannot be {value!r}: low={low}, high={high}")
    return value
