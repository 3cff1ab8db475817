"""`%nbaccel` and `%%ranks`: a session of ranks, driven from cells. Load with `%load_ext nbaccel`.

A subcommand of `%nbaccel` is a function of (magics, arguments) in `SUBCOMMANDS`.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, final

from IPython import display as ipython
from IPython.core.completer import SimpleCompletion, context_matcher
from IPython.core.error import UsageError
from IPython.core.inputtransformer2 import TransformerManager
from IPython.core.magic import Magics, cell_magic, line_magic, magics_class

from nbaccel.errors import ConfigError, LaunchError, WorkerError
from nbaccel.notebook import debugger
from nbaccel.notebook.session import Session
from nbaccel.notebook.tables import status_table, variables_table
from nbaccel.rank.namespace import is_definition
from nbaccel.rank.shell import Shown
from nbaccel.session.results import Results, rank_ranges

__all__ = ["SUBCOMMANDS", "RankMagics", "parse_ranks"]

_AUTO = "--auto"
# What is for the notebook itself when every other cell runs on the ranks.
_STAYS = ("%%", "%nbaccel", "%rank_debug", "%load_ext", "%reload_ext", "%unload_ext")


@final
@magics_class
class RankMagics(Magics):
    """The magics, and the session they drive."""

    def __init__(self, shell: Any) -> None:
        super().__init__(shell)
        self.front: Any = shell
        self.session: Session | None = None
        self.auto = False
        self._told: set[str] = set()
        """Names of which a person has been told what becomes of them."""

    @line_magic
    def nbaccel(self, line: str) -> Any:
        """%nbaccel start -n 4 | status | stop | restart | interrupt | vars | stacks | debug 3 | doctor | auto on|off"""
        return self._subcommand(line)

    @line_magic
    def rank_debug(self, line: str) -> Any:
        """%rank_debug 3: pdb on the frames of rank 3, which failed."""
        return self._subcommand(f"debug {line}")

    @cell_magic
    def ranks(self, line: str, cell: str) -> None:
        """%%ranks [0,2-3]: run the cell on these ranks of the session, all by default."""
        session = self.running()
        words = line.split()
        automatic = _AUTO in words
        chosen = parse_ranks(" ".join(word for word in words if word != _AUTO), session.num_processes)
        if automatic:
            print(f"▸ ranks {rank_ranges(chosen)} (%nbaccel auto off to end this)")
        source = _as_python(cell)
        notebook = self.front.user_ns
        pids = {rank: session.state.ranks[rank].pid for rank in chosen}
        self._send_definitions(session, source, pids)
        failed = True
        try:
            results = session.execute(cell, ranks=chosen, first_line=1 if automatic else 2)
            failed = False
        except WorkerError as error:
            _hint_at_data(error, notebook)
            raise
        finally:
            session.definitions.note_bound(source, notebook, pids, failed=failed)
        _show(results)

    def _send_definitions(self, session: Session, source: str, pids: Mapping[int, int | None]) -> None:
        """Before a cell, and in calls of their own: what arrived is known, whatever becomes of the cell."""
        notebook, definitions = self.front.user_ns, session.definitions
        for name in definitions.hidden(source, notebook):
            told = f"{name} is each rank's own in %%ranks cells"
            self._tell(name, f"{told}: give the notebook's another name to use it there")
        if paths := definitions.set_here_only(source, notebook):
            told = f"{_listed(paths)}: set in the notebook only, and the ranks import modules of their own"
            print(f"nbaccel: {told}; set it in a %%ranks cell too", file=sys.stderr)
        if unsure := definitions.unsure(pids):
            for rank, names in session.bound(set().union(*unsure.values()), list(unsure)).items():
                definitions.note_own(names, notebook, rank, pids[rank])
        for missing in definitions.missing(source, notebook, pids):
            for name in missing.again:
                others = _listed([other for other in missing.values if other != name])
                told = (
                    f"{name} goes to the ranks again as it is in the notebook{others and f', with {others}'}"
                )
                self._tell(name, f"{told}: make in a %%ranks cell what the ranks train there")
            session.define(missing.values, missing.ranks, reloaded=missing.reloaded)
            definitions.note_sent(missing, pids)

    def _tell(self, name: str, told: str) -> None:
        """Once of each name."""
        if name not in self._told:
            self._told.add(name)
            print(f"nbaccel: {told}", file=sys.stderr)

    def _subcommand(self, line: str) -> Any:
        try:
            name, *arguments = shlex.split(line) or ["status"]
        except ValueError as error:
            raise UsageError(f"%nbaccel {line}: {error}") from None
        if name not in SUBCOMMANDS:
            raise UsageError(f"%nbaccel {name}: there is {', '.join(sorted(SUBCOMMANDS))}")
        if arguments and name in _BARE:
            raise UsageError(f"%nbaccel {name} takes no argument; nothing was done: {' '.join(arguments)}")
        try:
            return SUBCOMMANDS[name](self, arguments)
        except ConfigError as error:
            raise UsageError(str(error)) from None

    def running(self) -> Session:
        """The session.

        Raises:
            UsageError: there is none; it says how to start one.
        """
        if self.session is None:
            raise UsageError("there is no session of ranks: start one with  %nbaccel start -n 4")
        if self.session.closed:
            raise UsageError("the session of ranks has ended: start another with  %nbaccel start -n 4")
        return self.session

    def use(self, session: Session | None) -> None:
        """Drive this session from now on; the one before is ended."""
        before, self.session = self.session, session
        if before is not None and before is not session:
            before.close()

    def set_auto(self, on: bool) -> None:
        """Whether every following cell runs on the ranks."""
        transforms = self.front.input_transformers_cleanup
        if self.auto and self._as_ranks in transforms:
            transforms.remove(self._as_ranks)
        if on:
            transforms.append(self._as_ranks)
        self.auto = on

    def _as_ranks(self, lines: list[str]) -> list[str]:
        """An input transformer: a cell becomes a %%ranks cell unless it begins with a magic of its own."""
        first = next(
            (line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")), ""
        )
        if not first or first.startswith(_STAYS):
            return lines
        return [f"%%ranks {_AUTO}\n", *lines]

    @context_matcher()  # type: ignore[untyped-decorator]
    def match_ranks(self, context: Any) -> Any:
        """Completions in a %%ranks cell, by the ranks' own names."""
        head, _, body = context.full_text.partition("\n")
        in_ranks = head.startswith("%%ranks")
        session = self.session
        if session is None or session.closed or not (in_ranks or self.auto):
            return {"completions": []}
        text = body if in_ranks else context.full_text
        lines = text.split("\n")
        line = context.cursor_line - (1 if in_ranks else 0)
        if not 0 <= line < len(lines):
            return {"completions": []}
        cursor = sum(len(one) + 1 for one in lines[:line]) + context.cursor_position
        try:
            found = session.complete(text, cursor, _ranks_or_all(head, session) if in_ranks else None)
        except (WorkerError, LaunchError, ConfigError):
            return {"completions": []}  # a key press is no place for errors
        before = lines[line][: context.cursor_position].removesuffix(found.fragment)
        a_name = not found.fragment or found.fragment.isidentifier()
        return {
            "completions": [SimpleCompletion(text=name, type="rank") for name in found.texts],
            "matched_fragment": found.fragment,
            # attributes and keys are those of the ranks' objects; names may be the notebook's as well
            "suppress": bool(found.texts) and (not a_name or before.endswith(("'", '"'))),
        }


def parse_ranks(text: str, num_ranks: int) -> tuple[int, ...]:
    """ "0,2-3" as ranks, a blank as good as a comma; nothing is all of them.

    Raises:
        UsageError: it is no such selection, or there is no such rank.
    """
    text = text.strip().strip("[]").strip()
    if not text:
        return tuple(range(num_ranks))
    found: set[int] = set()
    for part in re.split(r"\s*,\s*|\s+", re.sub(r"\s*-\s*", "-", text)):
        ends = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part)
        low, high = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if low > high:
            raise UsageError(f"%%ranks {text}: write ranks as 0,2-3")
        if high >= num_ranks:
            raise UsageError(f"%%ranks {text}: there is no rank {high}, only 0 to {num_ranks - 1}")
        found.update(range(low, high + 1))
    return tuple(sorted(found))


def _as_python(cell: str) -> str:
    """A cell with its magics as calls; nothing when it cannot be: the ranks say what is wrong with it.

    By IPython's own rules alone, as in a rank: what was added to this shell's may be ours, of `auto on`.
    """
    rules: Any = TransformerManager
    try:
        return str(rules().transform_cell(cell))
    except SyntaxError:
        return ""


def _ranks_or_all(head: str, session: Session) -> tuple[int, ...] | None:
    try:
        return parse_ranks(head.removeprefix("%%ranks"), session.num_processes)
    except UsageError:
        return None


def _listed(names: Sequence[str]) -> str:
    *others, last = names or ("",)
    return f"{', '.join(others)} and {last}" if others else last


def _show(results: Results) -> None:
    """The last expressions, one for all ranks that show the same."""
    show: Any = ipython.display
    ranks = results.ranks or range(len(results))
    groups: list[tuple[Shown, list[int]]] = []
    for rank, shown in zip(ranks, results, strict=True):
        if shown is None:
            continue
        for known, who in groups:
            if _content(known) == _content(shown):
                who.append(rank)
                break
        else:
            groups.append((shown, [rank]))
    if all(set(shown.data) <= {"text/plain"} for shown, _ in groups):
        texts = [_labelled(repr(shown), who) for shown, who in groups]
        if texts:
            show({"text/plain": "\n".join(texts)}, raw=True)
        return
    for shown, who in groups:
        if len(who) < len(ranks):
            print(f"[{rank_ranges(who)}]")
        show(dict(shown.data), raw=True, metadata=dict(shown.metadata))


def _content(shown: Shown) -> object:
    """What makes two displays the same: not where an object lies in memory."""
    if len(shown.data) > 1:
        return {mime: value for mime, value in shown.data.items() if mime != "text/plain"}
    return {mime: re.sub(r" at 0x[0-9a-f]+", "", str(value)) for mime, value in shown.data.items()}


def _labelled(text: str, who: Sequence[int]) -> str:
    label = f"[{rank_ranges(who)}] "
    return label + text.replace("\n", "\n" + " " * len(label))


def _hint_at_data(error: WorkerError, notebook: Mapping[str, Any]) -> None:
    """Say how a variable of the notebook comes to the ranks, when it is what a cell missed."""
    cause = error.__cause__
    found = re.match(r"name '(\w+)' is not defined", str(cause)) if isinstance(cause, NameError) else None
    name = found[1] if found else ""
    if name in notebook and not is_definition(notebook[name]):
        hint = f"{name} is a variable of the notebook, not of the ranks: %nbaccel push {name} sends it there"
        error.args = (f"{error.args[0]}\n{hint}",)
        error.rendered = (*error.rendered, hint)


# ── subcommands of %nbaccel ───────────────────────────────────────────────────────────────────────────


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"%nbaccel {self.prog}: {message}")


def _start(magics: RankMagics, arguments: Sequence[str]) -> None:
    parser = _Parser(prog="start", add_help=False)
    parser.add_argument("-n", "--num-processes", type=int)
    parser.add_argument("--device")
    parser.add_argument("--mixed-precision")
    parser.add_argument("--grace", type=float, default=5.0)
    parser.add_argument("--idle-stop")
    parser.add_argument("--output", default="auto", choices=("auto", "all", "rank0", "none"))
    asked = parser.parse_args(list(arguments))
    replaced = magics.session is not None and not magics.session.closed
    session = Session(
        asked.num_processes,
        device=asked.device,
        mixed_precision=asked.mixed_precision,
        grace=asked.grace,
        idle_stop=asked.idle_stop,
        output=asked.output,
        replaces=magics.session,
    )
    session.warm_up()
    if replaced:
        print("the session before this one was ended: the variables of its ranks are gone")
    magics.use(session)
    print(f"{session.num_processes} ranks are ready: begin a cell with %%ranks to run it on them")


def _status(magics: RankMagics, arguments: Sequence[str]) -> None:
    if magics.session is None:
        print("no session of ranks: %nbaccel start -n 4 starts one")
    else:
        print(status_table(magics.session))


def _stop(magics: RankMagics, arguments: Sequence[str]) -> None:
    magics.set_auto(False)
    magics.use(None)


def _restart(magics: RankMagics, arguments: Sequence[str]) -> None:
    session = magics.session
    if session is None:
        magics.running()
    else:
        session.restart()
        magics.use(session)
        session.warm_up()
        print(f"{session.num_processes} fresh ranks are ready")


def _interrupt(magics: RankMagics, arguments: Sequence[str]) -> None:
    magics.running().interrupt()


def _vars(magics: RankMagics, arguments: Sequence[str]) -> None:
    parser = _Parser(prog="vars", add_help=False)
    parser.add_argument("--sort", choices=("name", "size"), default="name")
    parser.add_argument("ranks", nargs="*")
    asked = parser.parse_args(list(arguments))
    session = magics.running()
    chosen = parse_ranks(" ".join(asked.ranks), session.num_processes)
    print(variables_table(session.variables(chosen), by_size=asked.sort == "size"))


def _push(magics: RankMagics, arguments: Sequence[str]) -> None:
    if not arguments:
        raise UsageError("%nbaccel push NAME…: write the names of what is to be sent to all ranks")
    missing = [name for name in arguments if name not in magics.front.user_ns]
    if missing:
        raise UsageError(f"%nbaccel push: there is no {', no '.join(missing)} in the notebook")
    magics.running().push(**{name: magics.front.user_ns[name] for name in arguments})


def _auto(magics: RankMagics, arguments: Sequence[str]) -> None:
    if list(arguments) not in (["on"], ["off"]):
        raise UsageError("%nbaccel auto on, or %nbaccel auto off")
    on = arguments[0] == "on"
    if on:
        magics.running()
    magics.set_auto(on)
    where = "on the ranks" if on else "in the notebook"
    print(f"cells run {where} from now on")


def _stacks(magics: RankMagics, arguments: Sequence[str]) -> Any:
    return debugger.stacks(magics.session)


def _debug(magics: RankMagics, arguments: Sequence[str]) -> None:
    debugger.debug(magics.session, arguments)


def _doctor(magics: RankMagics, arguments: Sequence[str]) -> Any:
    return debugger.show_doctor(magics.front.user_ns, arguments)


SUBCOMMANDS: dict[str, Callable[[RankMagics, Sequence[str]], Any]] = {
    "auto": _auto,
    "debug": _debug,
    "doctor": _doctor,
    "interrupt": _interrupt,
    "push": _push,
    "restart": _restart,
    "stacks": _stacks,
    "start": _start,
    "status": _status,
    "stop": _stop,
    "vars": _vars,
}
"""By name."""
_BARE = frozenset({"interrupt", "restart", "stacks", "status", "stop"})  # what follows would mean nothing
