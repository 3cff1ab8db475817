"""Which of the notebook's own definitions a `%%ranks` cell needs, and its ranks do not have yet.

Functions, classes and modules that ordinary cells defined or imported are there in the ranks as well, the
newest of each: those a cell names, and those that these refer to in turn. They bring the data they refer to, as in
`Session.run`, and are sent again when they or some of it have changed in the notebook (see `marks`). Modules that the
notebook has read again are read again there (see `modules`). Other data is pushed on purpose. A name that a `%%ranks`
cell binds is the ranks' own until the notebook defines it anew; data that a rank has made stays (see `rank.worker`).
"""

from __future__ import annotations

import dis
import functools
import re
import sys
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

from nbaccel.notebook.marks import Mark, Sight, number, see
from nbaccel.notebook.modules import Reading, as_read, home, read_again, readings
from nbaccel.notebook.names import attributes_set, names_in
from nbaccel.rank.namespace import PREBOUND, is_definition

__all__ = ["Definitions", "Missing"]

# What IPython keeps for a person: the last values and inputs.
_SHORTHANDS = re.compile(r"_{1,3}|_i{1,3}|_i?\d+|_[doi]h|__\w+__")


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """What some ranks lack."""

    ranks: tuple[int, ...]
    values: Mapping[str, Any]
    """By name."""
    marks: Mapping[str, Mark]
    """Of these."""
    modules: Mapping[str, Reading]
    """What they come from and refer to."""
    reloaded: tuple[str, ...]
    """Modules the ranks have as they were before the notebook read them again."""
    data: Mapping[str, Mark]
    """What is sent along, since definitions refer to it."""
    again: tuple[str, ...]
    """Of what is sent, what the ranks have had and may have trained since."""


@dataclass(slots=True)
class _Process:
    """What is known of the process that a rank is: one that takes its place has nothing."""

    pid: int | None
    names: dict[str, Mark] = field(default_factory=dict)
    """What each definition was in the notebook when the process got it."""
    own: dict[str, int] = field(default_factory=dict)
    """Of the names it has bound itself, the number of what the notebook defines under the same."""
    unsure: set[str] = field(default_factory=set)
    """Names of definitions it never got, which a cell would have bound that has failed, maybe before that."""
    data: dict[str, Mark] = field(default_factory=dict)
    """What the notebook's data was when it was last sent along."""
    modules: dict[str, Reading] = field(default_factory=dict)
    """Those it got something from, as they were then."""

    def has(self, name: str, notebook: Mapping[str, Any]) -> bool:
        """Whether it got this very definition before, in whatever state."""
        return name in self.names and self.names[name][0] == number(notebook[name])

    def lacks(self, name: str, mark: Mark) -> bool:
        """Whether it needs a definition that the notebook has in this state."""
        return self.own[name] != mark[0] if name in self.own else self.names.get(name) != mark


@final
class Definitions:
    """What the ranks of one session know of the notebook's names. `pids` tells its methods which ranks run a
    cell, and which process each of them is."""

    def __init__(self) -> None:
        self._known: dict[int, _Process] = {}
        self._leads_to: dict[str, set[str]] = {}
        """By name that a cell has bound in ranks, the names in what bound it: the class of an object, what a lambda
        calls."""
        self._num_inputs = 0
        self._set: dict[str, str] = {}
        """Attributes of modules that the notebook has set, and nobody was told of: by their path, the module."""

    def missing(
        self, source: str, notebook: Mapping[str, Any], pids: Mapping[int, int | None]
    ) -> list[Missing]:
        """What `source` needs and these ranks lack; ranks that lack the same are together.

        Args:
            source: Python, magics already transformed; nothing is needed when it cannot be parsed.
            notebook: the kernel's namespace.
        """
        reach = _Reach(notebook)
        reach.follow(self._named_in(source))
        modules = readings(dict.fromkeys(map(home, reach.code())))
        groups: dict[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]], list[int]] = {}
        for rank, pid in pids.items():
            known = self._process(rank, pid)
            stale = read_again(known.modules, modules)
            had = {name for name, sight in reach.data.items() if known.data.get(name) == sight.mark}
            names = tuple(
                name
                for name, sight in reach.definitions.items()
                if known.lacks(name, sight.mark)
                or (name not in known.own and (home(notebook[name]) in stale or reach.data_of[name] - had))
            )
            again = {one for one in had & reach.brought_by(names) if reach.data[one].learns}
            again |= {name for name in names if reach.definitions[name].learns and known.has(name, notebook)}
            groups.setdefault((names, stale, tuple(sorted(again))), []).append(rank)
        return [
            Missing(
                ranks=tuple(ranks),
                values={name: notebook[name] for name in names},
                marks={name: reach.definitions[name].mark for name in names},
                modules=modules,
                reloaded=stale,
                data={name: reach.data[name].mark for name in reach.brought_by(names)},
                again=again,
            )
            for (names, stale, again), ranks in groups.items()
            if names or stale
        ]

    def note_sent(self, sent: Missing, pids: Mapping[int, int | None]) -> None:
        """These ranks have what they lacked."""
        modules = as_read(sent.modules)
        for rank in sent.ranks:
            known = self._process(rank, pids[rank])
            known.names.update(sent.marks)
            known.data.update(sent.data)
            known.modules.update(modules)
            for name in sent.marks:
                known.own.pop(name, None)

    def note_called(
        self, call: object, notebook: Mapping[str, Any], pids: Mapping[int, int | None]
    ) -> Callable[[], None]:
        """These ranks are sent a function and its arguments otherwise than for a cell: data comes along.

        Returns: what undoes it, for a call that has never begun.
        """
        known = [one for rank, pid in pids.items() if (one := self._process(rank, pid)).names]
        if not known:
            return lambda: None  # no cell has run there
        reach = _Reach(notebook)
        reach.follow(reach.referred(see(call)))
        for one in known:
            one.data.update({name: sight.mark for name, sight in reach.data.items()})

        def undo() -> None:
            for one in known:
                for name in reach.data:
                    one.data.pop(name, None)

        return undo

    def note_modules(
        self, names: Iterable[str], pids: Mapping[int, int | None]
    ) -> tuple[dict[tuple[str, ...], list[int]], Callable[[], None]]:
        """These ranks are sent what comes from these modules.

        Returns: by what is to be read again before, the ranks that have it as it was; and what undoes it, for ranks
        that were never told.
        """
        now = readings(names)
        if not now:
            return {}, lambda: None
        outdated: dict[tuple[str, ...], list[int]] = {}
        before: list[tuple[_Process, dict[str, Reading]]] = []
        for rank, pid in pids.items():
            known = self._process(rank, pid)
            before.append((known, known.modules))
            if stale := read_again(known.modules, now):
                outdated.setdefault(stale, []).append(rank)
            fresh = {name: one for name, one in now.items() if name in stale or name not in known.modules}
            known.modules = {**known.modules, **as_read(fresh)}

        def undo() -> None:
            for known, modules in before:
                known.modules = modules

        return outdated, undo

    def note_bound(
        self,
        source: str,
        notebook: Mapping[str, Any],
        pids: Mapping[int, int | None],
        *,
        failed: bool = False,
    ) -> None:
        """A cell has run: the names it binds are the ranks' own, whatever the notebook's are now.

        Args:
            failed: it may not have come to all of them: see `unsure`.
        """
        names = names_in(source)
        for name, within in names.within.items():
            # it may be what it was before, or made of that
            before = self._leads_to.get(name, set()) if failed or name in within else set()
            self._leads_to[name] = within | before
        defined = {name for name in names.bound if is_definition(notebook.get(name))}
        modules = as_read(readings({home(notebook[name]) for name in defined}))
        for rank, pid in pids.items():
            known = self._process(rank, pid)
            known.modules = {**modules, **known.modules}
            if failed:
                known.unsure |= defined - known.names.keys() - known.own.keys()
                continue
            known.unsure -= names.bound
            for name in names.bound:
                known.own.pop(name, None)
                if name in defined:
                    known.own[name] = number(notebook[name])
                else:
                    known.names.pop(name, None)

    def unsure(self, pids: Mapping[int, int | None]) -> dict[int, list[str]]:
        """By rank, the names that it may have bound itself: ask which it has, and `note_own` them."""
        unsure = {rank: sorted(self._process(rank, pid).unsure) for rank, pid in pids.items()}
        return {rank: names for rank, names in unsure.items() if names}

    def note_own(
        self, names: Collection[str], notebook: Mapping[str, Any], rank: int, pid: int | None
    ) -> None:
        """Of those it was unsure of, a rank has these."""
        known = self._process(rank, pid)
        known.own.update({name: number(notebook.get(name)) for name in known.unsure.intersection(names)})
        known.unsure.clear()

    def set_here_only(self, source: str, notebook: Mapping[str, Any]) -> list[str]:
        """What the notebook has set in modules that `source` leads to, as "settings.lr"; each once for each time that
        a cell sets it. The ranks import these modules, and have what is in their files.

        Args:
            notebook: `In` there has its cells.
        """
        inputs = notebook.get("In")
        if not isinstance(inputs, list):  # the person has a value of that name
            return []
        for text in inputs[self._num_inputs :]:
            self._set |= attributes_set(text, notebook)
        self._num_inputs = len(inputs)
        if not self._set:
            return []
        reach = _Reach(notebook)
        reach.follow(self._named_in(source))
        reached = readings(dict.fromkeys(map(home, reach.code())))
        found = [path for path, module in self._set.items() if _is_within(module, reached)]
        for path in found:
            del self._set[path]
        return found

    def hidden(self, source: str, notebook: Mapping[str, Any]) -> list[str]:
        """The names in `source` under which the notebook defines something, and every rank has its own."""
        names = names_in(source)
        return [
            name
            for name in PREBOUND
            if name in names.loaded - names.bound
            and is_definition(notebook.get(name))
            and notebook[name] is not sys.modules.get("torch.distributed")
        ]

    def _named_in(self, source: str) -> set[str]:
        """The names in a cell, and in what bound those that are the ranks'."""
        named, left = set[str](), names_in(source).loaded
        while left:
            named |= left
            left = set[str]().union(*(self._leads_to.get(name, ()) for name in left)) - named
        return named

    def _process(self, rank: int, pid: int | None) -> _Process:
        if pid is None or rank not in self._known or self._known[rank].pid != pid:
            self._known[rank] = _Process(pid)
        return self._known[rank]


def _is_within(module: str, reached: Mapping[str, Reading]) -> bool:
    """Whether it is one of these, or a part of a package that is."""
    return any(module == name or module.startswith(f"{name}.") for name in reached)


# ── what definitions refer to ─────────────────────────────────────────────────────────────────────────


@final
class _Reach:
    """The notebook's definitions and data that some names lead to.

    Attributes:
        definitions: by name, what was seen of them; those named, and those that their code refers to in turn.
        data: by name, what the code of these refers to.
        data_of: by definition, the data that its own code refers to.
    """

    def __init__(self, notebook: Mapping[str, Any]) -> None:
        self._notebook = notebook
        self.definitions: dict[str, Sight] = {}
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
            self.definitions[name] = see(value)
            self._refers[name] = referred = self.referred(self.definitions[name])
            self.data_of[name] = frozenset(referred & self.data.keys())
            left += sorted(referred, reverse=True)

    def referred(self, sight: Sight) -> set[str]:
        """The global names in the code of this, as far as it is the notebook's, and in code within the data of
        such names."""
        names: set[str] = set()
        left = list(sight.code)
        seen = set(map(id, left))
        while left:
            value = left.pop()
            if not isinstance(value, types.FunctionType) or value.__globals__ is not self._notebook:
                continue
            found = _globals_of(value.__code__) - names
            names |= found
            new = [code for name in found & self._notebook.keys() for code in self._code_within(name)]
            left += (code for code in new if id(code) not in seen)
            seen.update(map(id, new))
        return names

    def code(self) -> Iterator[object]:
        """All the functions, classes and modules that were met."""
        for sight in (*self.definitions.values(), *self.data.values()):
            yield from sight.code

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


@functools.lru_cache(maxsize=4096)
def _globals_of(code: types.CodeType) -> frozenset[str]:
    """The global names a piece of code reads, the functions within it too."""
    own = {
        str(step.argval)
        for step in dis.get_instructions(code)
        if step.opname.startswith("LOAD") and step.opname.endswith(("_GLOBAL", "_GLOBALS", "_NAME"))
    }
    return frozenset(own.union(*(_globals_of(c) for c in code.co_consts if isinstance(c, types.CodeType))))
