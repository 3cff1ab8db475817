"""A notebook's cells as plain Python: which lines are IPython's, and what is said of the rest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nbaccel.errors import ConfigError
from nbaccel.rank.cells import Cell, read_cells


def read(tmp_path: Path, *sources: str, tags: Sequence[str] = ()) -> list[Cell]:
    path = tmp_path / "t.ipynb"
    metadata = {"metadata": {"tags": list(tags)}} if tags else {}
    cells = [{"cell_type": "code", "source": source, **metadata} for source in sources]
    path.write_text(json.dumps({"cells": cells}))
    return read_cells(str(path))


RUNS = " (what it measures runs once, as plain Python)"
KEPT = 'x = 2  # is this right?\ntext = """\n! keep me\n% keep me\nwho?\n"""\ny = (x\n% 2)\nz = "\\f|\u2028|\x0c"'


@pytest.mark.parametrize(
    ("lines", "skipped"),
    [
        ("!echo it's \"hi", ("!echo it's \"hi",)),
        (
            "%matplotlib inline\n%%latex?\n?print\nprint??",
            ("%matplotlib inline", "%%latex?", "?print", "print??"),
        ),
        ("!pip install a \\\n   b", ("!pip install a \\\n   b",)),
        ("if True:\n    !ls\n\n    %cd x\nelse: pass", ("!ls", "%cd x")),
        ("\n%%time -q\n!ls", (f"%%time -q{RUNS}", "!ls")),
        ("assert True\n!!ls", ("!!ls",)),
    ],
)
def test_only_commands_of_ipython_are_left_out(tmp_path: Path, lines: str, skipped: tuple[str, ...]):
    (cell,) = read(tmp_path, f"{lines}\n{KEPT}\nwhere = 1 / 0")
    assert cell.skipped == skipped
    assert cell.source.endswith(f"{KEPT}\nwhere = 1 / 0\n")
    found: dict[str, object] = {}
    with pytest.raises(ZeroDivisionError) as raised:
        exec(cell.code, found)
    assert (found["x"], found["y"]) == (2, 0)
    assert (found["text"], found["z"]) == ("\n! keep me\n% keep me\nwho?\n", "\f|\u2028|\x0c")
    assert raised.tb.tb_next is not None
    assert raised.tb.tb_next.tb_lineno == f"{lines}\n{KEPT}\n".count("\n") + 1  # as in the notebook


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("%time x = 1; y = 'a\\n\"b'", {"x": 1, "y": 'a\n"b'}),
        ("if True:\n    x = %time 1 + \\\n 2\n    y = 4", {"x": 3, "y": 4}),
        ("%timeit -n 3 -r2 -q x = -1\n%prun -s cumulative -q y = 2", {"x": -1, "y": 2}),
        ("%%timeit -n 3 x = 1\ny = x + 1", {"x": 1, "y": 2}),
        ("%%time\n%time x = 1\n%time !ls", {"x": 1}),
    ],
)
def test_what_a_magic_measures_runs(tmp_path: Path, source: str, names: dict[str, object]):
    (cell,) = read(tmp_path, source)
    found: dict[str, object] = {}
    exec(cell.code, found)
    assert {name: found[name] for name in found if name != "__builtins__"} == names
    assert all(line.startswith("!") or line.endswith(RUNS) for line in cell.skipped)


def test_tags_of_cells_say_which_may_raise_and_which_are_left_out(tmp_path: Path):
    for source in ("1 / 0", "x = ?"):
        (cell,) = read(tmp_path, source, tags=["other", "raises-exception"])
        assert (cell.may_raise, cell.skipped) == (True, ())
        with pytest.raises(ZeroDivisionError if "/" in source else SyntaxError, match=r"zero|cell 1"):
            exec(cell.code, {})
    (cell,) = read(tmp_path, "1 / 0", tags=["skip-execution"])
    exec(cell.code, {})
    assert cell.skipped == ("the cell, tagged skip-execution",)


def test_cell_of_python_alone_is_as_it_stands(tmp_path: Path):
    (cell, empty) = read(tmp_path, KEPT, " \n")
    assert (cell.source, cell.skipped) == (KEPT, ())
    assert empty.skipped == ()


def test_future_of_a_cell_holds_for_those_that_follow(tmp_path: Path):
    before, first, node, magic = read(
        tmp_path,
        "def f(x: 1 + 1): ...",
        "from __future__ import annotations",
        "class Node:\n    def next(self) -> Node: ...",
        "!ls\ndef g(x: 1 + 1): ...",
    )
    found: dict[str, Any] = {}
    for cell in (before, first, node, magic):
        exec(cell.code, found)
    assert found["f"].__annotations__ == {"x": 2}
    assert found["Node"].next.__annotations__ == {"return": "Node"}
    assert found["g"].__annotations__ == {"x": "1 + 1"}


def test_cell_for_another_language_is_left_out(tmp_path: Path):
    (cell,) = read(tmp_path, "%%bash\nls 'x\n")
    assert (cell.source, cell.skipped) == ("", ("%%bash",))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("\nfiles = !ls", "t.ipynb, cell 2, line 2: 'files = !ls' takes a value from IPython"),
        ("x = %timeit -o f()", "'x = %timeit -o f\\(\\)' takes a value from IPython"),
        ("x = %env HOME", "cell 2, line 1: 'x = %env HOME' takes a value from IPython"),
        ("!ls\nx = = 3", r"cell 2 cannot be run: SyntaxError: .* \(t.ipynb, cell 2, line 2\)"),
        ("x = '\0'", "cell 2 cannot be run: .* null bytes"),
    ],
)
def test_cell_that_is_no_python_is_refused_by_its_line(tmp_path: Path, source: str, words: str):
    with pytest.raises(ConfigError, match=words):
        read(tmp_path, "x = 1", source)
