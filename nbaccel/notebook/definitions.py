"""Which of the notebook's own definitions a `%%ranks` cell needs, and its ranks do not have yet.

Functions, classes and modules that ordinary cells defined or imported are there in the ranks as well, the
newest of each: those a cell names, and those that these refer to in turn. Data is not: it is pushed on
purpose. A name that a `%%ranks` cell binds is the ranks' own until the notebook defines it anew.
"""

from __future__ import annotations

import ast
import dis
import functools
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

from nbaccel.rank.namespace import PREBOUND

__all__ = ["Definitions", "Missing", "is_definition"]

_ABSENT = object()
# What IPython keeps for a person: the last values and inputs.
_SHORTHANDS = re.compile(r"_{1,3}|_i{1,3}|_i?\d+|_[doi]h|__\w+__")
# What stands around a function, and calls it.
_WRAPPERS = (
    staticmethod,
    classmethod,
    property,
    functools.partial,
    functools.cached_property,
    functools._lru_cache_wrapper,
)


def is_definition(value: object) -> bool:
    """Whether this is a function, class or module rather than data."""
    return isinstance(value, (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type))


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """What some ranks lack."""

    ranks: tuple[int, ...]
    values: Mapping[str, Any]
    """By name."""
    reloaded: tuple[str, ...]
    """Modules the ranks have as they were before the notebook reloaded them."""


@dataclass(slots=True)
class _Process:
    """What is known of the process that a rank is: one that takes its place has nothing."""

    pid: int | None
    names: dict[str, object] = field(default_factory=dict)
    """What each name was in the notebook when the process got it, or bound it itself."""
    specs: dict[str, object] = field(default_factory=dict)
    """Of the modules it got something from: a reloaded one has another."""


@final
class Definitions:
    """What the ranks of one session know of the notebook's names. `pids` tells its methods which ranks run a
    cell, and which process each of them is."""

    def __init__(self) -> None:
        self._known: dict[int, _Process] = {}

    def missing(
        self, source: str, notebook: Mapping[str, Any], pids: Mapping[int, int | None]
    ) -> list[Missing]:
        """What `source` needs and these ranks lack; ranks that lack the same are together.

        Args:
            source: Python, magics already transformed; nothing is needed when it cannot be parsed.
            notebook: the kernel's namespace.
        """
        needed = _reached(_names(source)[0], notebook)
        specs = _specs(needed.values())
        groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[int]] = {}
        for rank, pid in pids.items():
            known = self._process(rank, pid)
            stale = tuple(name for name, spec in specs.items() if known.specs.get(name, spec) is not spec)
            names = tuple(
                name
                for name, value in needed.items()
                if known.names.get(name, _ABSENT) is not value or _home(value) in stale
            )
            groups.setdefault((names, stale), []).append(rank)
        return [
            Missing(ranks=tuple(ranks), values={name: needed[name] for name in names}, reloaded=stale)
            for (names, stale), ranks in groups.items()
            if names
        ]

    def note_sent(self, sent: Missing, pids: Mapping[int, int | None]) -> None:
        """These ranks have what they lacked."""
        for rank in sent.ranks:
            known = self._process(rank, pids[rank])
            known.names.update(sent.values)
            known.specs.update(_specs(sent.values.values()))

    def note_bound(self, source: str, notebook: Mapping[str, Any], pids: Mapping[int, int | None]) -> None:
        """A cell has run: the names it binds are the ranks' own, whatever the notebook's are now."""
        now = {name: notebook.get(name) for name in _names(source)[1]}
        bound = {name: value if is_definition(value) else _ABSENT for name, value in now.items()}
        for rank, pid in pids.items():
            self._process(rank, pid).names.update(bound)

    def hidden(self, source: str, notebook: Mapping[str, Any]) -> list[str]:
        """The names in `source` under which the notebook defines something, and every rank has its own."""
        loaded, bound = _names(source)
        return [
            name
            for name in PREBOUND
            if name in loaded - bound
            and is_definition(notebook.get(name))
            and notebook[name] is not sys.modules.get("torch.distributed")
        ]

    def _process(self, rank: int, pid: int | None) -> _Process:
        if pid is None or rank not in self._known or self._known[rank].pid != pid:
            self._known[rank] = _Process(pid)
        return self._known[rank]


# ── what definitions refer to ─────────────────────────────────────────────────────────────────────────


def _reached(names: Iterable[str], notebook: Mapping[str, Any]) -> dict[str, Any]:
    """The notebook's definitions of these names, and of those that their code refers to in turn."""
    found: dict[str, Any] = {}
    left = sorted(names, reverse=True)
    while left:
        name = left.pop()
        value = notebook.get(name)
        if name in found or name in PREBOUND or not is_definition(value) or _SHORTHANDS.fullmatch(name):
            continue
        if getattr(value, "__name__", "") != "get_ipython":
            found[name] = value
            left += sorted(_referred(value, notebook), reverse=True)
    return found


def _referred(definition: object, notebook: Mapping[str, Any]) -> set[str]:
    """The global names in the code of a definition of the notebook's."""
    names: set[str] = set()
    left, seen = [definition], {id(definition)}
    while left:
        value = left.pop()
        if isinstance(value, types.FunctionType) and value.__globals__ is notebook:
            names |= _globals_of(value.__code__)
        new = [part for part in _parts(value, notebook.get("__name__")) if id(part) not in seen]
        seen.update(map(id, new))
        left += new
    return names


def _parts(value: object, module: object) -> Iterator[object]:
    """What belongs to a definition and may be code of this module as well."""
    if isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:
                continue  # it is not filled yet
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
    elif isinstance(value, type):
        for base in value.__mro__:
            if base.__module__ == module:
                yield from vars(base).values()
    elif isinstance(value, _WRAPPERS):
        for name in ("__func__", "__wrapped__", "fget", "fset", "fdel", "func"):
            yield getattr(value, name, None)


@functools.lru_cache(maxsize=4096)
def _globals_of(code: types.CodeType) -> frozenset[str]:
    """The global names a piece of code reads, the functions within it too."""
    own = {
        str(step.argval)
        for step in dis.get_instructions(code)
        if step.opname.startswith("LOAD") and step.opname.endswith(("_GLOBAL", "_GLOBALS", "_NAME"))
    }
    return frozenset(own.union(*(_globals_of(c) for c in code.co_consts if isinstance(c, types.CodeType))))


def _home(value: object) -> str:
    """The module that a definition is, or is found in."""
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    return str(name or "")


def _specs(values: Iterable[object]) -> dict[str, object]:
    """How the modules of these were found; reloading one finds it again. The notebook itself has none."""
    homes = {home: getattr(sys.modules.get(home), "__spec__", None) for home in map(_home, values)}
    return {home: spec for home, spec in homes.items() if spec is not None and home != "__main__"}


# ── names in a cell ───────────────────────────────────────────────────────────────────────────────────


def _names(source: str) -> tuple[set[str], set[str]]:
    """The names a piece of code refers to anywhere, and those it binds at its top level."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return set(), set()
    loaded = {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    bound = set(_bound(tree))
    for text in _magics_texts(tree):
        inner, binds = _names(text)
        # what is no Python as a whole may hold some: %timeit -n 5 f()
        loaded |= inner or set(re.findall(r"[^\W\d]\w*", text))
        bound |= binds
    return loaded, bound


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
