"""How the modules that the notebook's code comes from were last read: ranks that read them before read them again.

A module is read again by `importlib.reload`, which gives it another `__spec__`, or by `%autoreload`, which changes it
in place and knows the time of the file that it has read.
"""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
import types
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from nbaccel.notebook.kernel import autoreloader

__all__ = ["Reading", "as_read", "home", "read_again", "readings"]


class Reading(NamedTuple):
    """A module as it was read."""

    spec: object
    time: float | None
    """When its file had been changed last, in seconds as the system counts them; None where that is not known."""


def home(value: object) -> str:
    """The module that a definition is, or is found in."""
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    return name if isinstance(name, str) else ""


def readings(names: Iterable[str]) -> dict[str, Reading]:
    """How these modules were read, and the person's own modules that these refer to; what another one needs comes
    before it. The notebook itself is none, nor is what is built in."""
    reloader = autoreloader()
    times, failed = getattr(reloader, "modules_mtimes", {}), getattr(reloader, "failed", {})
    found: dict[str, Reading] = {}
    seen: set[str] = set()

    def visit(name: str) -> None:
        seen.add(name)
        module = sys.modules.get(name)
        spec = getattr(module, "__spec__", None)
        if module is None or spec is None or name == "__main__":
            return
        file = getattr(module, "__file__", None)
        if _is_persons(name, file):
            for other in map(_home_of_part, list(vars(module).values())):
                if other not in seen and _is_persons(
                    other, getattr(sys.modules.get(other), "__file__", None)
                ):
                    visit(other)
        # where the new text of its file could not be read, the notebook goes on with what it had
        found[name] = Reading(spec, None if file in failed else times.get(name))

    for name in names:
        if name not in seen:
            visit(name)
    return found


def as_read(found: Mapping[str, Reading]) -> dict[str, Reading]:
    """The same, their files' times as they are now where `%autoreload` has not looked: it may be loaded later."""
    return {
        name: reading if reading.time is not None else reading._replace(time=_time_of(sys.modules.get(name)))
        for name, reading in found.items()
    }


def read_again(had: Mapping[str, Reading], now: Mapping[str, Reading]) -> tuple[str, ...]:
    """Those that the notebook has read again since a rank has had them."""
    return tuple(name for name, reading in now.items() if name in had and _differ(had[name], reading))


def _differ(had: Reading, now: Reading) -> bool:
    times_known = had.time is not None and now.time is not None
    return had.spec is not now.spec or (times_known and had.time != now.time)


def _home_of_part(value: object) -> str:
    """Of what stands in a module: an object counts by its class, and is asked nothing."""
    code = (types.ModuleType, types.FunctionType, type)
    return home(value if isinstance(value, code) else type(value))


@functools.lru_cache(maxsize=4096)
def _is_persons(name: str, file: str | None) -> bool:
    """Whether a module is one that a person edits, rather than an installed one, Python's own or ours."""
    if file is None or name == "__main__" or name.partition(".")[0] == "nbaccel":
        return False
    installed = f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}"
    library = tuple(sysconfig.get_path(one) + os.sep for one in ("stdlib", "platstdlib"))
    return not file.startswith(library) and not any(part in file for part in installed)


def _time_of(module: types.ModuleType | None) -> float | None:
    try:
        return os.stat(module.__file__).st_mtime if module is not None and module.__file__ else None
    except (AttributeError, OSError):
        return None  # it is built in, or its file is gone
