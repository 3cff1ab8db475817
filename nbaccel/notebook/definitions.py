"""Which of the notebook's own definitions a `%%ranks` cell needs, and the ranks do not have yet.

Functions, classes and modules that ordinary cells defined or imported are there in the ranks as well, the
newest of each. Data is not: it is pushed on purpose. A name that a `%%ranks` cell binds is the ranks' own
until the notebook defines it anew.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Mapping
from typing import Any, final

__all__ = ["Definitions", "is_definition"]

_ABSENT = object()


def is_definition(value: object) -> bool:
    """Whether this is a function, class or module rather than data."""
    return isinstance(value, (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type))


@final
class Definitions:
    """What one session's ranks know of the notebook's names."""

    def __init__(self) -> None:
        self._known: dict[str, object] = {}

    def needed(self, source: str, notebook: Mapping[str, Any]) -> dict[str, Any]:
        """The definitions `source` refers to that are new since the ranks had them.

        Args:
            source: Python, magics already transformed; nothing is needed when it cannot be parsed.
            notebook: the kernel's namespace.
        """
        loaded, _ = _names(source)
        return {
            name: notebook[name]
            for name in sorted(loaded)
            if name in notebook
            and is_definition(notebook[name])
            and not name.startswith("_")
            and getattr(notebook[name], "__name__", "") != "get_ipython"
            and self._known.get(name, _ABSENT) is not notebook[name]
        }

    def note_run(self, source: str, sent: Mapping[str, Any], notebook: Mapping[str, Any]) -> None:
        """A cell has run: the names it binds are the ranks' own, whatever the notebook's are now."""
        _, bound = _names(source)
        self._known.update(sent)
        self._known.update({name: notebook.get(name, _ABSENT) for name in bound})


def _names(source: str) -> tuple[set[str], set[str]]:
    """The names a piece of code refers to anywhere, and those it binds at its top level."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return set(), set()
    loaded = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return loaded, set(_bound(tree))


def _bound(node: ast.AST) -> list[str]:
    found: list[str] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.append(child.name)  # what is bound within is not the cell's
            continue
        if isinstance(child, ast.Lambda):
            continue
        if isinstance(child, ast.Name) and isinstance(child.ctx, (ast.Store, ast.Del)):
            found.append(child.id)
        elif isinstance(child, (ast.Import, ast.ImportFrom)):
            found += [alias.asname or alias.name.partition(".")[0] for alias in child.names]
        found += _bound(child)
    return found
