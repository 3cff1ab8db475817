"""Which of the notebook's own definitions a `%%ranks` cell needs, and its ranks do not have yet.

Functions, classes and modules that ordinary cells defined or imported are there in the ranks as well, the
newest of each: those a cell names, and those that these refer to in turn. They bring the data they refer to, as in
`Session.run`, and are sent again when some of it has changed in the notebook (see `marks`). Other data is pushed on
purpose. A name that a `%%ranks` cell binds is the ranks' own until the notebook defines it anew; data that a rank
has made stays (see `rank.worker`).
"""

from __future__ import annotations

import ast
import dis
import functools
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

from nbaccel.notebook.marks import Mark, Sight, see
from nbaccel.rank.namespace import PREBOUND, is_definition

__all__ = ["Definitions", "Missing"]

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """What some ranks lack."""

    ranks: tuple[int, ...]
    values: Mapping[str, Any]
    """By name."""
    reloaded: tuple[str, ...]
    """Modules the ranks have as they were before the notebook reloaded them."""
    data: Mapping[str, Mark]
    """What is sent along, since definitions refer to it."""
    again: tuple[str, ...]
    """Of that, what the ranks have had in this state and may have trained since."""


@dataclass(slots=True)
class _Process:
    """What is known of the process that a rank is: one that takes its place has nothing."""

    pid: int | None
    names: dict[str, object] = field(default_factory=dict)
    """What each name was in the notebook when the process got it, or bound it itself."""
    data: dict[str, Mark] = field(default_factory=dict)
    """What the notebook's data was when it was last sent along."""
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
        reach = _Reach(notebook)
        reach.follow(_names(source)[0])
        specs = _specs(reach.definitions.values())
        groups: dict[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]], list[int]] = {}
        for rank, pid in pids.items():
            known = self._process(rank, pid)
            stale = tuple(name for name, spec in specs.items() if known.specs.get(name, spec) is not spec)
            had = {name for name, sight in reach.data.items() if known.data.get(name) == sight.mark}
            names = tuple(
                name
                for name, value in reach.definitions.items()
                if known.names.get(name, _ABSENT) is not value
                or _home(value) in stale
                or reach.data_of[name] - had
            )
            again = tuple(sorted(one for one in had & reach.brought_by(names) if reach.data[one].learns))
            groups.setdefault((names, stale, again), []).append(rank)
        return [
            Missing(
                ranks=tuple(ranks),
                values={name: reach.definitions[name] for name in names},
                reloaded=stale,
                data={name: reach.data[name].mark for name in reach.brought_by(names)},
                again=again,
            )
            for (names, stale, again), ranks in groups.items()
            if names
        ]

    def note_sent(self, sent: Missing, pids: Mapping[int, int | None]) -> None:
        """These ranks have what they lacked."""
        for rank in sent.ranks:
            known = self._process(rank, pids[rank])
            known.names.update(sent.values)
            known.data.update(sent.data)
            known.specs.update(_specs(sent.values.values()))

    def note_called(
        self, call: object, notebook: Mapping[str, Any], pids: Mapping[int, int | None]
    ) -> Callable[[], None]:
        """These ranks are sent a function and its arguments otherwise than for a cell: data comes along.

        Returns: what undoes it, for a call that has never begun.
        """
        known = [one for rank, pid in pids.items() if (one := self._known.get(rank)) and one.pid == pid]
        if not known:
            return lambda: None  # no cell has run there
        reach = _Reach(notebook)
        reach.follow(reach.referred(see(call).code))
        for one in known:
            one.data.update({name: sight.mark for name, sight in reach.data.items()})

        def undo() -> None:
            for one in known:
                for name in reach.data:
                    one.data.pop(name, None)

        return undo

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


@final
class _Reach:
    """The notebook's definitions and data that some names lead to.

    Attributes:
        definitions: by name; those named, and those that their code refers to in turn.
        data: by name, what the code of these refers to.
        data_of: by definition, the data that its own code refers to.
    """

    def __init__(self, notebook: Mapping[str, Any]) -> None:
        self._notebook = notebook
        self.definitions: dict[str, Any] = {}
        self.data: dict[str, Sight] = {}
        self.data_of: dict[str, frozenset[str]] = {}
        self._refers: dict[str, set[str]] = {}

    def follow(self, names: Iterable[str]) -> None:
        """Reach what these lead to."""
        left = sorted(names, reverse=True)
        while left:
            name = left.pop()
            value = self._notebook.get(name)
            if name in self.definitions or not is_definition(value) or not self._is_brought(name):
                continue
            referred = self.referred([value])
            self.definitions[name], self._refers[name] = value, referred
            self.data_of[name] = frozenset(referred & self.data.keys())
            left += sorted(referred, reverse=True)

    def referred(self, definitions: Iterable[object]) -> set[str]:
        """The global names in the code of these, as far as it is the notebook's, and in code within the data of
        such names."""
        names: set[str] = set()
        left = list(definitions)
        seen = set(map(id, left))
        while left:
            value = left.pop()
            new = list(_parts(value, self._notebook.get("__name__")))
            if isinstance(value, types.FunctionType) and value.__globals__ is self._notebook:
                found = _globals_of(value.__code__) - names
                names |= found
                for name in found & self._notebook.keys():
                    new += self._code_within(name)
            new = [part for part in new if id(part) not in seen]
            seen.update(map(id, new))
            left += new
        return names

    def brought_by(self, names: Iterable[str]) -> set[str]:
        """The data that travels when these definitions do."""
        left, seen, brought = list(names), set(names), set[str]()
        while left:
            name = left.pop()
            brought |= self.data_of[name]
            new = (self._refers[name] & self.definitions.keys()) - seen
            seen |= new
            left += new
        return brought

    def _code_within(self, name: str) -> tuple[object, ...]:
        """Of data, which is looked at once."""
        if name not in self.data:
            if is_definition(self._notebook[name]) or not self._is_brought(name):
                return ()
            self.data[name] = see(self._notebook[name])
        return self.data[name].code

    def _is_brought(self, name: str) -> bool:
        if name in PREBOUND or _SHORTHANDS.fullmatch(name):
            return False
        return getattr(self._notebook[name], "__name__", "") != "get_ipython"


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
        if isinstance(value, functools.partial):
            yield from (*value.args, *value.keywords.values())


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
