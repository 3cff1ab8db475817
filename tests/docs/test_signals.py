"""Every sentence that the panel and the reports can say stands in docs/signals.md; they are read from the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import get_args, get_type_hints

import pytest

from nbaccel.session.panel import reading
from nbaccel.session.report import explain_exit
from nbaccel.session.stacks import Finding
from nbaccel.wire.events import State
from tests.docs.pages import ROOT

SPEAKERS = {
    "core/loop/findings.py": "*",
    "core/xla/recompiles.py": "*",
    "core/trackers/base.py": "finish _offer _guard _tell_left_out log_images log_table log_file",
    "core/trackers/logbook.py": "_tell_missed",
    "core/trackers/opening.py": "_start",
    "core/trackers/place.py": "__init__",
    "core/loop/trust.py": "backward stepped _compare _tell_unused _tell_idle _look",
    "engines/forkserver.py": "server_for",
    "engines/local.py": "_ask",
    "session/devices.py": "_unused_notes _mig_notes",
    "session/calls.py": "_on_time_ending _on_time_idle on_death",
    "session/diagnosis.py": "*",
    "session/fates.py": "cause_of_exit fates",
    "notebook/controls.py": "_STOP _paint_stop",
    "notebook/displays.py": "_show_lost",
    "notebook/launcher.py": "_tell_of_unfinished",
    "notebook/magics.py": "_hint_at_data _send_definitions",
    "notebook/session.py": "look",
    "notebook/view.py": "__call__",
    "session/call.py": "_make_late_sinks",
    "session/hosts.py": "_trouble",
    "session/prompts.py": "handle tick _put",
    "session/session.py": "expectations",
    "session/sinks/capped.py": "close",
    "session/sinks/folder.py": "_try",
    "session/sinks/limit.py": "close",
    "session/outcome.py": "_hung _place _came_back",
    "session/panel/failure.py": "headline _fate _how_it_ended",
    "session/panel/reading.py": "_ADVICE _sentences _why_data _straggler _late scaling",
    "session/parking.py": "note",
    "session/recovery.py": "finish name_lost",
    "session/report.py": "explain_exit waited_in _fate _lines",
    "session/request.py": "make_folder",
    "session/resolve.py": "_choose_threads _precision_notes",
    "session/restarts.py": "*",
    "session/room.py": "room_notes",
    "session/stacks.py": "_STATES headlines _state",
    "session/watch.py": "_look_after",
}
"""By file, the functions (and tables) whose words reach a person while a run goes on or when it ends; "*": all."""

QUIET = {
    "name '(w+)' is not defined",
    "after optimizer step",
    "threads: OMP_NUM_THREADS",
    "cores for",
    "per rank",
}
"""Of these, what is said elsewhere, or by Python: a reason of the plan, the beginning of a clause."""


def phrases(path: str, names: str) -> Iterator[str]:
    """What is said there, without what is filled in and without likely causes: texts of at least two words."""
    for node in ast.walk(ast.parse((ROOT / "nbaccel" / path).read_text())):
        if isinstance(node, ast.FunctionDef) and (names == "*" or node.name in names.split()):
            texts = [text for statement in node.body for text in literals(statement)]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and _assigned(node) in names.split():
            texts = list(literals(node))
        else:
            continue
        for text in texts:
            for part in re.split(r"[\n{}]|%[rsd]", text.partition("Likely cause")[0]):
                if " " in bare(part):
                    yield bare(part)


def _assigned(node: ast.Assign | ast.AnnAssign) -> str:
    return str(getattr(node.targets[0] if isinstance(node, ast.Assign) else node.target, "id", ""))


def literals(node: ast.AST) -> Iterator[str]:
    """Text of the code, but for docstrings and errors."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    if not docstring and not isinstance(node, (ast.Raise, ast.Assert)):
        for child in ast.iter_child_nodes(node):
            yield from literals(child)


def bare(text: str) -> str:
    """Words alone: no marks around them, no markup, one space between them."""
    text = re.sub(r"[*`|\\]", "", text).replace("\xa0", " ")
    return " ".join(text.split()).strip(" .,;:()?%#→↳·").strip()


@pytest.mark.parametrize("path", SPEAKERS)
def test_sentence_when_it_can_be_said_is_explained(path: str) -> None:
    told = bare((ROOT / "docs" / "signals.md").read_text()).lower()
    said = set(phrases(path, SPEAKERS[path])) - QUIET
    assert said, f"nothing is said in nbaccel/{path}: have its functions other names?"
    missing = sorted(one for one in said if one.lower() not in told)
    assert not missing, f"docs/signals.md does not explain what nbaccel/{path} says: {missing}"


def test_kinds_states_and_parts_when_shown_are_explained() -> None:
    told = (ROOT / "docs" / "signals.md").read_text()
    for kind in get_args(get_type_hints(Finding)["kind"]):
        assert f"| `{kind}` |" in told
    for state in (*get_args(State), "stopped"):
        assert f"| **{state}** |" in told
    for part in reading.PARTS:
        assert f"| **{part}** |" in told
    for number in (-9, -11, -6, -7):
        assert explain_exit(number) in told
    assert "no sign of life for" in told
