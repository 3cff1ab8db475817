"""The names in a cell's code: what it refers to, binds and alters, and which attributes of modules it sets."""

from __future__ import annotations

import ast
import re
import sys
import types
from collections.abc import Iterator, Mapping
from typing import NamedTuple

__all__ = ["Names", "attributes_set", "names_in"]

_DEFINING = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_NOT_SET = {*sys.stdlib_module_names, "nbaccel"}


class Names(NamedTuple):
    """The names in a piece of code."""

    loaded: set[str]
    """It refers to them anywhere."""
    bound: set[str]
    """It binds them at its top level."""
    within: dict[str, set[str]]
    """By each of these, and by what it sets attributes or items of, the names that this refers to."""


def names_in(source: str) -> Names:
    """The names in a cell, as IPython has transformed it; none where it is no Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return Names(set(), set(), {})
    names = Names(_loaded(tree), set(), {})
    for statement in tree.body:
        for name, node in _bound(ast.Module([statement], [])):
            names.bound.add(name)
            within = node if isinstance(node, _DEFINING) else statement
            names.within.setdefault(name, set()).update(_loaded(within))
        for name in _altered(statement):
            names.within.setdefault(name, set()).update(_loaded(statement), {name})
    for text in _magics_texts(tree):
        inner = names_in(text)
        # what is no Python as a whole may hold some: %timeit -n 5 f()
        names.loaded.update(inner.loaded or re.findall(r"[^\W\d]\w*", text))
        names.bound.update(inner.bound)
        for name, led_to in inner.within.items():
            names.within.setdefault(name, set()).update(led_to)
    return names


def _loaded(tree: ast.AST) -> set[str]:
    return {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }


def _altered(tree: ast.AST) -> set[str]:
    """The names of what it sets attributes or items of, or adds something to."""
    found = set[str]()
    for node in ast.walk(tree):
        if not isinstance(node, ast.AugAssign) and not isinstance(getattr(node, "ctx", None), ast.Store):
            continue
        target = node.target if isinstance(node, ast.AugAssign) else node
        while isinstance(target, (ast.Attribute, ast.Subscript)):
            target = target.value
        if isinstance(target, ast.Name) and target is not node:
            found.add(target.id)
    return found


def _magics_texts(tree: ast.AST) -> Iterator[str]:
    """What magics are given: %time f() is run_line_magic("time", "f()") by now."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("run_line_magic", "run_cell_magic")
        ):
            for text in node.args[1:]:
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    yield text.value


def _bound(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """The names that are bound, each with what binds it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _DEFINING):
            yield child.name, child  # what is bound within is not the cell's
            continue
        if isinstance(child, ast.Lambda):
            continue
        if isinstance(child, ast.Name) and isinstance(child.ctx, (ast.Store, ast.Del)):
            yield child.id, child
        elif isinstance(child, (ast.Import, ast.ImportFrom)):
            yield from ((alias.asname or alias.name.partition(".")[0], child) for alias in child.names)
        elif isinstance(child, (ast.MatchAs, ast.MatchStar)) and child.name:
            yield child.name, child
        elif isinstance(child, ast.comprehension):
            # its target is its own
            yield from _bound(ast.Tuple([child.iter, *child.ifs]))
            continue
        yield from _bound(child)


def attributes_set(source: str, notebook: Mapping[str, object]) -> dict[str, str]:
    """What a cell sets in modules, as "settings.lr" by `settings.lr = 1` or `settings.lr[0] = 1`, and where that is.

    Python's own modules and ours do not count, nor does what is within functions: they may be called in ranks too.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return {}
    found = {}
    for target in _targets(tree):
        parts = []
        while isinstance(target, (ast.Attribute, ast.Subscript)):
            if isinstance(target, ast.Attribute):
                parts.append(target.attr)
            target = target.value
        if not isinstance(target, ast.Name):
            continue
        path, value = target.id, notebook.get(target.id)
        while isinstance(value, types.ModuleType) and parts:
            home_of, attribute = value.__name__, parts.pop()
            path, value = f"{path}.{attribute}", getattr(value, attribute, None)
            if not isinstance(value, types.ModuleType) and home_of.partition(".")[0] not in _NOT_SET:
                found[path] = home_of
    return found


def _targets(node: ast.AST) -> Iterator[ast.AST]:
    """What is assigned to or deleted, outside functions and classes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        if isinstance(getattr(child, "ctx", None), (ast.Store, ast.Del)):
            yield child
        yield from _targets(child)
