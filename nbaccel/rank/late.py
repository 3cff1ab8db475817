"""Doing something to a module when, and if, it is imported: a rank never imports it for our sake."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, final

__all__ = ["when_imported"]


def when_imported(name: str, action: Callable[[Any], None]) -> None:
    """Call `action(module)` now if the module is there, else at the end of its first import."""
    module = sys.modules.get(name)
    if module is not None and not _half_way(module):
        action(module)
        return
    finder = next((finder for finder in sys.meta_path if isinstance(finder, _Finder)), None)
    if finder is None:
        finder = _Finder()
        sys.meta_path.insert(0, finder)
    finder.actions.setdefault(name, []).append(action)


def _half_way(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


@final
class _Finder(MetaPathFinder):
    """First in line for every import; concerned with a few names."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Callable[[Any], None]]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        actions = self.actions.pop(fullname, None)
        if actions is None:
            return None
        spec = importlib.util.find_spec(fullname)  # asks us again, and then the others
        execute = getattr(spec.loader, "exec_module", None) if spec is not None else None
        if spec is None or execute is None:
            return spec

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for action in actions:
                action(module)

        # on this one loader, which stays what `inspect` and `pkgutil` ask for sources
        vars(spec.loader)["exec_module"] = exec_module
        return spec
