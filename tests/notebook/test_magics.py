"""%nbaccel and %%ranks in a real kernel."""

from __future__ import annotations

import importlib
import itertools
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from nbaccel.notebook.definitions import Definitions
from nbaccel.notebook.magics import parse_ranks
from tests.conftest import Cell, Kernel, gone, wait_until

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def live(kernel: Kernel) -> Iterator[Kernel]:
    """The kernel with a session of three ranks."""
    kernel.ok("%load_ext nbaccel")
    kernel.ok("%nbaccel start -n 3 --device cpu --grace 2", timeout=120)
    kernel.ok("%%ranks\nimport torch, time, os\ntorch.set_num_threads(1)")
    kernel.ok("session = get_ipython().magics_manager.registry['RankMagics'].session")
    yield kernel
    kernel.run("%nbaccel stop")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, state_home: None) -> Iterator[Kernel]:
    """A kernel without a session; the last test kills it."""
    kernel = Kernel(tmp_path_factory.mktemp("bare"))
    kernel.ok("%load_ext nbaccel")
    yield kernel
    kernel.close()


def shown(kernel: Kernel, code: str) -> str:
    """What a cell displays."""
    cell = kernel.ok(code)
    return "\n".join(str(data.get("text/plain", "")) for data in cell.displays)


def pids(kernel: Kernel) -> list[int]:
    return [int(text) for text in re.findall(r"\[\d\] (\d+)", shown(kernel, "%%ranks\nos.getpid()"))]


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


# ── cells ─────────────────────────────────────────────────────────────────────────────────────────────


def test_values_are_folded_when_ranks_agree(live: Kernel) -> None:
    assert shown(live, "%%ranks\n1 + 1") == "[0-2] 2"
    assert shown(live, "%%ranks\nrank // 2") == "[0-1] 0\n[2] 1"
    assert shown(live, "%%ranks 0,2\nrank") == "[0] 0\n[2] 2"
    assert shown(live, "%%ranks [1-2]\nx = 1") == ""
    assert shown(live, "%%ranks\n5;") == ""


def speakers(cell: Cell) -> dict[str, set[int]]:
    """The ranks that said each line, however many lines the relay made of it: on a busy machine one comes late."""
    found: dict[str, set[int]] = {}
    for line in cell.stdout.splitlines():
        label, text = re.fullmatch(r"(?:\[([\d,-]+)\] )?(.*)", line).groups()  # type: ignore[union-attr]
        for part in (label or "0").split(","):
            first, _, last = part.partition("-")
            found.setdefault(text, set()).update(range(int(first), int(last or first) + 1))
    return found


def test_rich_value_is_shown_as_such_when_it_has_html(live: Kernel) -> None:
    cell = live.ok("%%ranks\nclass Rich:\n    def _repr_html_(self): return '<b>rich</b>'\nRich()")
    assert [data["text/html"] for data in cell.displays] == ["<b>rich</b>"]


def test_output_appears_in_the_cell_that_ran_it(live: Kernel) -> None:
    first = live.ok("%%ranks\nprint('one', rank // 2)")
    second = live.ok("%%ranks\nprint('two')")
    assert speakers(first) == {"one 0": {0, 1}, "one 1": {2}}
    assert speakers(second) == {"two": {0, 1, 2}}


def test_output_of_a_thread_appears_below_the_last_cell_when_no_call_runs(live: Kernel) -> None:
    cell = live.ok("%%ranks 0\nimport threading\nthreading.Timer(0.5, print, ['from a thread']).start()")
    assert cell.stdout == ""
    live.pump(lambda: "from a thread" in cell.stdout, 10, "what the thread printed")


def test_ipython_is_there_when_a_cell_uses_it(live: Kernel) -> None:
    cell = live.ok(
        "%%ranks 0\nimport asyncio\nawait asyncio.sleep(0)\n%timeit -n 5 -r 1 1+1\nlen?\n!echo from the shell"
    )
    assert "per loop" in cell.stdout
    assert "Return the number of items" in cell.stdout
    assert "from the shell" in cell.stdout
    assert "Wall time" in live.ok("%%ranks 1\n%%time\nx = 2").stdout


def test_rank_stays_when_a_cell_calls_exit(live: Kernel) -> None:
    live.ok("%%ranks\nkept_by_ranks = 5")
    assert "%nbaccel stop ends the session" in live.ok("%%ranks\nexit()").stdout
    assert shown(live, "%%ranks\nkept_by_ranks") == "[0-2] 5"


def test_error_names_cell_and_line_when_a_rank_raises(live: Kernel) -> None:
    live.ok("%%ranks\ndef invert(a):\n    return 1 / a")
    for _ in range(3):  # on a starved machine the others may not be there in their 2 s
        began = time.monotonic()
        cell = live.run("%%ranks\nif rank == 1:\n    invert(0)\ndist.barrier()")
        assert time.monotonic() - began < 15  # a bound against a hang
        text = plain(cell.traceback)
        if "still busy" not in text:
            break
    assert cell.error == "WorkerError"
    assert re.search(r"Cell In\[\d+\], line 3, in <module>\n    invert\(0\)", text)
    assert re.search(r"Cell In\[\d+\], line 3, in invert\n    return 1 / a", text)
    assert re.search(r"rank 1 of 3 failed: ZeroDivisionError.*\(at Cell In\[\d+\] line 3\)", text)
    assert re.search(r"ranks 0,2 waited in barrier, called from Cell In\[\d+\] line 4", text)
    assert "magics.py" not in text
    assert shown(live, "%%ranks\n1+1") == "[0-2] 2"


def test_syntax_error_names_the_cell_when_it_cannot_be_compiled(live: Kernel) -> None:
    text = plain(live.run("%%ranks\nx = 1\nfoo bar").traceback)
    assert re.search(r"Cell In\[\d+\], line 3\n\s+foo bar", text)


def test_error_is_told_once_and_names_the_cell_when_a_dedent_fits_nothing(live: Kernel) -> None:
    cell = live.run("%%ranks\nif rank:\n        x = 1\n    y = 2")
    assert cell.stdout + cell.stderr == ""
    text = plain(cell.traceback)
    assert re.search(r"Cell In\[\d+\], line 4\n\s+y = 2", text)
    assert "IndentationError" in text
    assert "tokenize" not in text


def test_interrupted_await_ends_with_its_cell(live: Kernel) -> None:
    cell = live.start("%%ranks\nimport asyncio\nawait asyncio.sleep(1.5)\nzombie = True")
    live.settle(0.7)
    live.interrupt()
    live.finish(cell, timeout=20)
    assert cell.error == "KeyboardInterrupt"
    live.ok("%%ranks\nawait asyncio.sleep(1.5)")
    assert shown(live, "%%ranks\n'zombie' in globals()") == "[0-2] False"


# ── the notebook's names ──────────────────────────────────────────────────────────────────────────────


def test_definitions_of_the_notebook_are_there_when_a_cell_needs_them(live: Kernel) -> None:
    live.ok("import math\nclass Net:\n    def version(self): return helper()\ndef helper(): return 1")
    assert shown(live, "%%ranks\nNet().version(), math.floor(2.5)") == "[0-2] (1, 2)"
    live.ok("def helper(): return 2\nclass Net:\n    def version(self): return helper() * 10")
    assert shown(live, "%%ranks\nold = Net(); old.version()") == "[0-2] 20"
    live.ok("class Net:\n    def version(self): return 'new'")
    assert shown(live, "%%ranks\nNet().version(), old.version()") == "[0-2] ('new', 20)"
    live.ok("%%ranks\nclass Net:\n    def version(self): return 'of the ranks'")
    assert shown(live, "%%ranks\nNet().version()") == "[0-2] 'of the ranks'"


def test_definitions_changed_in_place_are_there_when_a_cell_uses_them(live: Kernel) -> None:
    live.ok("class Place:\n    lr = 1\ndef at(place=Place): return place.lr\ndef late(self): return 'late'")
    assert shown(live, "%%ranks\nPlace.lr, at()") == "[0-2] (1, 1)"
    live.ok("Place.lr, Place.late = 2, late")
    assert shown(live, "%%ranks\nPlace.lr, at(), Place().late()") == "[0-2] (2, 2, 'late')"


def test_definition_arrives_when_a_cell_has_not_bound_its_name(live: Kernel) -> None:
    live.ok("def unbound(): return 'notebook'")
    assert "ZeroDivisionError" in live.run("%%ranks\n1 // rank\nunbound = lambda: 'rank'").traceback
    live.ok("%%ranks 0\nnumbers = [0 for unbound in range(3)]")
    assert shown(live, "%%ranks 0\nunbound()") == "[0] 'notebook'"
    live.ok("%%ranks 1\ndef unbound(): return 'rank'")
    assert shown(live, "%%ranks 1\nunbound()") == "[1] 'rank'"


def test_data_of_the_notebook_stays_there_when_a_cell_names_it(live: Kernel) -> None:
    live.ok("rate = 0.25\nonly_here = 1")
    cell = live.run("%%ranks\nrate")
    assert "rate is a variable of the notebook, not of the ranks: %nbaccel push rate" in cell.traceback
    live.ok("%nbaccel push rate")
    assert shown(live, "%%ranks\nrate") == "[0-2] 0.25"
    live.ok("%%ranks\nonly_there = 1")
    assert live.ok("'only_there' in globals()").result == "False"


def test_own_data_stays_when_a_function_brings_the_notebooks(live: Kernel) -> None:
    live.ok("state = 'notebook'\nspeed = 1\ndef look(): return state, speed")
    live.ok("%%ranks\nstate = 'rank'")
    assert shown(live, "%%ranks\nlook()") == "[0-2] ('rank', 1)"
    live.ok("speed = 2\ndef look(): return state, speed")
    assert shown(live, "%%ranks\nlook()") == "[0-2] ('rank', 2)"


def test_newest_data_is_seen_in_every_way_of_calling_a_function_that_refers_to_it(live: Kernel) -> None:
    live.ok(
        "import nbaccel\nclass Settings: pass\nsettings = Settings()\nsettings.lr = LR = 1\n"
        "def h(): return LR, settings.lr\ndef by_way(): return h()"
    )
    assert shown(live, "%%ranks\nh()") == "[0-2] (1, 1)"
    assert live.ok("settings.lr = LR = 2\nlist(session.run(h))").result == "[(2, 2), (2, 2), (2, 2)]"
    live.ok("settings.lr = LR = 1")
    assert shown(live, "%%ranks\nh()") == "[0-2] (1, 1)"
    live.ok("settings.lr = LR = 3")
    assert shown(live, "%%ranks\nby_way()") == "[0-2] (3, 3)"
    live.ok("LR = 4")
    assert live.ok("list(nbaccel.notebook_launcher(h, session=session))").result == "[(4, 3), (4, 3), (4, 3)]"
    live.ok("%%ranks 1\nLR = 'of the rank'\nsettings.lr = 'changed by the rank'")
    assert shown(live, "%%ranks 1\nh()") == "[1] ('of the rank', 'changed by the rank')"
    live.ok("LR = 5")
    assert shown(live, "%%ranks\nh()") == "[0,2] (5, 3)\n[1] ('of the rank', 3)"


def test_model_that_the_ranks_have_trained_is_not_sent_again_without_a_word(live: Kernel) -> None:
    live.ok(
        "import torch\nweight = torch.zeros(1, requires_grad=True)\n"
        "def step():\n    with torch.no_grad(): return weight.add_(STEP)\nSTEP = 1"
    )
    live.ok("%%ranks\nstep();")
    assert shown(live, "%%ranks\nfloat(step())") == "[0-2] 2.0"
    live.ok("STEP = 5")
    cell = live.ok("%%ranks\nfloat(step())")
    assert [data["text/plain"] for data in cell.displays] == ["[0-2] 5.0"], "as in session.run"
    assert "weight goes to the ranks again as it is in the notebook, with step" in cell.stderr


def test_functions_in_any_form_are_there_when_a_cell_needs_them(live: Kernel) -> None:
    live.ok(
        "import functools\nOFFSET = 1\n@functools.cache\ndef cached(n): return n + OFFSET\n"
        "Batch = dict[str, int]\npart = functools.partial(cached, 5)\ndef through(): return cached(0)"
    )
    assert shown(live, "%%ranks\nmine: Batch = {'a': cached(2)}\nmine, part(), through()") == (
        "[0-2] ({'a': 3}, 6, 1)"
    )
    live.ok("OFFSET = 2")
    assert shown(live, "%%ranks\ncached(2), part()") == "[0-2] (4, 7)"
    assert "cached" not in live.ok("%nbaccel vars").stdout
    live.ok("@functools.cache\ndef cached(n): return 'anew'")
    assert live.ok("list(session.run(through))").result == "['anew', 'anew', 'anew']"
    assert shown(live, "%%ranks\ncached(2)") == "[0-2] 'anew'"


def test_needed_definitions_are_those_not_yet_sent() -> None:
    def first() -> None: ...

    def second() -> None: ...

    known, notebook = Definitions(), {"f": first, "x": 1}
    ranks = {0: 100, 1: 101}
    (sent,) = known.missing("f(x)", notebook, ranks)
    assert (sent.ranks, sent.values, sent.reloaded) == ((0, 1), {"f": first}, ())
    assert known.missing("f(x)", notebook, ranks) == [sent], "nothing has arrived yet"
    known.note_sent(sent, ranks)
    assert known.missing("f(x)", notebook, ranks) == []
    notebook["f"] = second
    assert known.missing("f(x)", notebook, ranks)[0].values == {"f": second}
    known.note_bound("def f(): pass", notebook, ranks)
    assert known.missing("f()", notebook, ranks) == [], "the ranks' own until the notebook defines it anew"
    assert known.missing("not python (", notebook, ranks) == []


def test_needed_definitions_are_told_rank_by_rank_when_one_has_them_or_is_a_new_process() -> None:
    def first() -> None: ...

    known, notebook = Definitions(), {"f": first}
    (sent,) = known.missing("f()", notebook, {0: 100})
    known.note_sent(sent, {0: 100})
    assert [one.ranks for one in known.missing("f()", notebook, {0: 100, 1: 101})] == [(1,)]
    assert [one.ranks for one in known.missing("f()", notebook, {0: 200})] == [(0,)]


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("get_ipython().run_line_magic('time', 'f()')", {"f"}),
        ("get_ipython().run_line_magic('timeit', '-n 5 f()')", {"f"}),
        ("get_ipython().run_cell_magic('time', '', 'f()\\n_g()\\n')", {"f", "_g"}),
        ("_g() + _ + _1", {"_g"}),
        ("f = 1", set()),
        ("rank, device", set()),
    ],
)
def test_needed_definitions_are_found_when_a_magic_or_an_underscore_hides_them(
    source: str, names: set[str]
) -> None:
    def function() -> None: ...

    notebook = dict.fromkeys(("f", "_g", "_", "_1", "device"), function)
    missing = Definitions().missing(source, notebook, {0: 100})
    assert {name for one in missing for name in one.values} == names


def test_definition_is_sent_anew_when_what_it_calls_has_changed() -> None:
    notebook: dict[str, Any] = {"__name__": "__main__"}
    exec(
        "import functools\n"
        "def helper(): return 1\n"
        "def around(f):\n    @functools.wraps(f)\n    def wrapper(): return f()\n    return wrapper\n"
        "@around\ndef outer(): return [helper() for _ in range(2)]\n"
        "class Net:\n    @property\n    def one(self): return outer()\n"
        "def unrelated(): return [].helper\n",
        notebook,
    )
    known, ranks = Definitions(), {0: 100}
    (sent,) = known.missing("Net()", notebook, ranks)
    assert set(sent.values) == {"Net", "outer", "helper"}
    known.note_sent(sent, ranks)
    exec("def helper(): return 2", notebook)
    assert [set(one.values) for one in known.missing("Net()", notebook, ranks)] == [{"helper"}]
    assert [set(one.values) for one in known.missing("unrelated()", notebook, ranks)] == [{"unrelated"}]


def test_definition_is_sent_anew_when_data_it_brings_has_changed() -> None:
    notebook: dict[str, Any] = {"__name__": "__main__"}
    exec(
        "class Config:\n    rate = 1\n    def scaled(self): return self.rate * SCALE\n"
        "cfg, SCALE, items = Config(), 2, [1]\n"
        "def uses(): return cfg.scaled(), rank, _1\ndef other(): return len(items)\n"
        "def both(): return uses(), other()\nrank, _1 = 1, 1",
        notebook,
    )
    known, ranks = Definitions(), {0: 100}

    def sent() -> list[tuple[set[str], set[str]]]:
        found = known.missing("both()", notebook, ranks)
        for one in found:
            known.note_sent(one, ranks)
        return [(set(one.values), set(one.data)) for one in found]

    assert sent() == [({"both", "uses", "other"}, {"cfg", "SCALE", "items"})]
    assert sent() == []
    notebook["SCALE"] = 3  # by way of cfg's class
    assert sent() == [({"uses"}, {"cfg", "SCALE"})]
    notebook["cfg"].rate = 2
    assert sent() == [({"uses"}, {"cfg", "SCALE"})]
    notebook["items"].append(2)
    assert sent() == [({"other"}, {"items"})]
    notebook["rank"] = notebook["_1"] = 5
    assert sent() == []


def test_definition_is_sent_anew_when_it_has_changed_in_place_unless_it_is_the_ranks_own() -> None:
    notebook: dict[str, Any] = {"__name__": "__main__"}
    exec("class Config:\n    rate = 1\ndef rate(): return Config.rate", notebook)
    known, ranks = Definitions(), {0: 100}

    def sent() -> list[set[str]]:
        found = known.missing("rate()", notebook, ranks)
        for one in found:
            known.note_sent(one, ranks)
        return [set(one.values) for one in found]

    assert sent() == [{"Config", "rate"}]
    exec("Config.rate = 2", notebook)
    assert sent() == [{"Config"}]
    known.note_bound("class Config: rate = 'of the ranks'", notebook, ranks)
    exec("Config.rate = 3", notebook)
    assert sent() == []
    exec("class Config: rate = 4", notebook)
    assert sent() == [{"Config"}]


@pytest.mark.parametrize(
    ("source", "own"),
    [
        ("f = 1", True),
        ("for f in range(3): pass", True),
        ("z = [(f := n) for n in range(3)]", True),
        ("match 1:\n    case f: pass", True),
        ("import json as f", True),
        ("z = [0 for f in range(3)]", False),
        ("z = {f: 0 for _, f in {}}", False),
        ("z = lambda: (f := 1)", False),
        ("def g(f): f = 1", False),
    ],
)
def test_name_is_the_ranks_own_when_a_cell_binds_it_and_not_something_within(source: str, own: bool) -> None:
    def function() -> None: ...

    known, ranks = Definitions(), {0: 100}
    known.note_bound(source, {"f": function}, ranks)
    assert (known.missing("f()", {"f": function}, ranks) == []) is own


def test_name_is_the_ranks_own_only_where_it_is_there_when_the_cell_has_failed() -> None:
    def function() -> None: ...

    known, notebook, ranks = Definitions(), {"f": function}, {0: 100, 1: 101}
    known.note_bound("1 / rank\nf = 3", notebook, ranks, failed=True)
    assert known.unsure(ranks) == {0: ["f"], 1: ["f"]}
    known.note_own((), notebook, 0, 100)
    known.note_own(("f",), notebook, 1, 101)
    assert known.unsure(ranks) == {}
    assert [one.ranks for one in known.missing("f()", notebook, ranks)] == [(0,)]
    known.note_bound("1 / rank\nf = 3", notebook, {1: 101}, failed=True)
    assert known.unsure(ranks) == {}, "it is its own already"


def test_definition_that_holds_a_model_is_told_when_it_goes_again() -> None:
    notebook: dict[str, Any] = {"__name__": "__main__"}
    exec(
        "import torch\nLR = 1\ndef make(model):\n    def step(): return model(LR)\n    return step\n"
        "step = make(torch.nn.Linear(1, 1))",
        notebook,
    )
    known, ranks = Definitions(), {0: 100}
    (sent,) = known.missing("step()", notebook, ranks)
    assert sent.again == ()
    known.note_sent(sent, ranks)
    exec("LR = 2", notebook)
    assert [one.again for one in known.missing("step()", notebook, ranks)] == [("step",)]


@pytest.mark.parametrize(
    "cells",
    [
        ["def mine(): return helper()\ndef through(): return mine()"],
        ["through = lambda: helper()"],
        ["one = Net()", "one = one.eval()", "through = one.forward"],
        ["through = None", "through.loss = helper", "through += 1", "through[0].lr = 2"],
        ["for _ in range(2):\n    through = Net()"],
    ],
)
def test_helper_is_sent_anew_when_only_what_the_ranks_have_bound_calls_it(cells: list[str]) -> None:
    notebook: dict[str, Any] = {"__name__": "__main__"}
    exec("def helper(): return 1\nclass Net:\n    def forward(self): return helper()", notebook)
    known, ranks = Definitions(), {0: 100}
    for cell in cells:
        for sent in known.missing(cell, notebook, ranks):
            known.note_sent(sent, ranks)
        known.note_bound(cell, notebook, ranks)
    assert known.missing("through()", notebook, ranks) == []
    exec("def helper(): return 2", notebook)
    assert [set(one.values) for one in known.missing("through()", notebook, ranks)] == [{"helper"}]
    known.note_bound("through = 1", notebook, ranks)
    assert known.missing("through()", notebook, ranks) == []


def test_data_counts_as_sent_when_a_call_has_brought_it_unless_that_never_began() -> None:
    notebook: dict[str, Any] = {"__name__": "__main__", "LR": 1}
    exec("def h(): return LR", notebook)
    known, ranks = Definitions(), {0: 100}
    (sent,) = known.missing("h()", notebook, ranks)
    known.note_sent(sent, ranks)
    notebook["LR"] = 2
    undo = known.note_called((print, (notebook["h"],), {}), notebook, ranks)
    assert known.missing("h()", notebook, ranks) == []
    undo()
    assert [set(one.values) for one in known.missing("h()", notebook, ranks)] == [{"h"}]


def test_modules_are_read_again_where_they_are_older_than_in_the_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "settings_of_a_person.py").write_text("LR = 1\n")
    (tmp_path / "code_of_a_person.py").write_text("import settings_of_a_person\ndef f(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    code = importlib.import_module("code_of_a_person")
    known, notebook = Definitions(), {"f": code.f}
    assert known.note_modules(["code_of_a_person", "torch"], {0: 100})[0] == {}
    importlib.reload(code.settings_of_a_person)
    (needed,) = known.missing("f()", notebook, {0: 100})
    assert (needed.reloaded, dict(needed.values)) == (("settings_of_a_person",), {"f": code.f})
    importlib.reload(code)
    outdated, undo = known.note_modules(["code_of_a_person"], {0: 100, 1: 101})
    assert outdated == {("settings_of_a_person", "code_of_a_person"): [0]}
    assert known.note_modules(["code_of_a_person"], {0: 100, 1: 101})[0] == {}
    undo()
    assert known.note_modules(["code_of_a_person"], {0: 100, 1: 101})[0] == outdated


def test_definition_arrives_when_a_rank_was_left_out_or_replaced(live: Kernel) -> None:
    live.ok("def one(): return 'one'")
    assert shown(live, "%%ranks 0\none()") == "[0] 'one'"
    assert shown(live, "%%ranks\none()") == "[0-2] 'one'"
    assert "rank 1 was replaced" in live.run("%%ranks 1\nimport os; os._exit(3)").traceback
    assert shown(live, "%%ranks\none()") == "[0-2] 'one'"
    live.ok("%%ranks\nimport os, time, torch")


def test_definition_arrives_when_it_could_not_be_sent_with_another(live: Kernel) -> None:
    live.ok("import threading\nlock = threading.Lock()\ndef bad(): return lock\ndef good(): return 1")
    assert live.run("%%ranks\ngood(), bad()").error == "PayloadError"
    assert shown(live, "%%ranks\ngood()") == "[0-2] 1"
    live.ok("lock = 3")
    assert shown(live, "%%ranks\nbad()") == "[0-2] 3"


def test_module_that_ranks_cannot_import_is_told_each_time(live: Kernel, tmp_path: Path) -> None:
    (tmp_path / "only_in_the_notebook.py").write_text("x = 1\n")
    live.ok(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport only_in_the_notebook")
    for _ in range(2):
        cell = live.run("%%ranks\nonly_in_the_notebook.x")
        assert "ModuleNotFoundError: No module named 'only_in_the_notebook'" in plain(cell.traceback)


def test_newest_helper_is_called_when_only_a_function_that_uses_it_is_named(live: Kernel) -> None:
    live.ok("def inner(): return 1\ndef outer(): return inner()")
    assert shown(live, "%%ranks\nouter()") == "[0-2] 1"
    live.ok("def inner(): return 2")
    assert shown(live, "%%ranks\nouter()") == "[0-2] 2"
    assert shown(live, "%%ranks\n%time outer()") == "[0-2] 2"


def test_module_is_read_again_when_the_notebook_has_reloaded_it(live: Kernel, tmp_path: Path) -> None:
    module = tmp_path / "reloaded_later.py"
    module.write_text("def version(): return 'old'\n")
    live.ok(f"import sys, importlib\nsys.dont_write_bytecode = True\nsys.path.insert(0, {str(tmp_path)!r})")
    live.ok(f"%%ranks\nimport sys\nsys.dont_write_bytecode = True\nsys.path.insert(0, {str(tmp_path)!r})")
    live.ok("import reloaded_later")
    assert shown(live, "%%ranks\nreloaded_later.version()") == "[0-2] 'old'"
    module.write_text("def version(): return 'the new one'\n")
    live.ok("importlib.reload(reloaded_later)\nfrom reloaded_later import version")
    assert shown(live, "%%ranks\nversion(), reloaded_later.version()") == (
        "[0-2] ('the new one', 'the new one')"
    )


def test_attribute_of_a_module_is_told_when_only_the_notebook_has_set_it(
    live: Kernel, tmp_path: Path
) -> None:
    (tmp_path / "set_later.py").write_text("LR, limits = 1, {}\n")
    path = f"import sys\nsys.dont_write_bytecode = True\nsys.path.insert(0, {str(tmp_path)!r})"
    live.ok(path), live.ok(f"%%ranks\n{path}")
    live.ok("import os, set_later as own\nown.LR = own.limits['top'] = 7\nos.environ['UNSEEN'] = '1'")
    live.ok("def rate(): return own.LR\ndef change(): own.UNSEEN = 1")
    assert live.ok("%%ranks\n1 + 1").stderr == ""
    cell = live.ok("%%ranks\nprint(rate(), os.sep) if rank == 1 else None")
    assert "own.LR and own.limits: set in the notebook only" in cell.stderr
    assert "UNSEEN" not in cell.stderr
    assert "1 /" in cell.stdout
    assert live.ok("%%ranks\nown.LR = 7; rate()").stderr == ""
    live.ok("own.LR = 8")
    assert "own.LR: set" in live.ok("%%ranks\nrate()").stderr


def test_edited_module_is_read_again_in_every_way_of_calling_when_autoreload_is_on(
    live: Kernel, tmp_path: Path
) -> None:
    helper, user = tmp_path / "edited_helper.py", tmp_path / "edited_user.py"
    helper.write_text("LR = 1\ndef f(): return LR\n")
    user.write_text("from edited_helper import f\nclass K:\n    def v(self): return f()\n")
    edits = itertools.count(2)

    def edit() -> str:
        """The helper with another number, and the time of its file."""
        number = next(edits)
        helper.write_text(f"LR = {number}\ndef f(): return LR\n")
        os.utime(helper, (time.time() + 100 * number,) * 2)
        return str(number)

    live.ok(
        f"import sys, nbaccel\nsys.dont_write_bytecode = True\nsys.path.insert(0, {str(tmp_path)!r})\n"
        "import edited_user\nfrom edited_helper import f\ndef through(): return edited_user.K().v()"
    )
    live.ok(f"%%ranks\nimport sys\nsys.dont_write_bytecode = True\nsys.path.insert(0, {str(tmp_path)!r})")
    assert shown(live, "%%ranks\nkept = edited_user.K(); kept.v(), f()") == "[0-2] (1, 1)"
    live.ok("%load_ext autoreload\n%autoreload 2")
    new = edit()
    assert shown(live, "%%ranks\nkept.v(), edited_user.K().v(), f()") == f"[0-2] ({new}, {new}, {new})"
    for call in (
        "session.run(f)",
        "session.run(through)",
        "nbaccel.notebook_launcher(through, session=session)",
    ):
        new = edit()
        assert live.ok(f"list({call})").result == f"[{new}, {new}, {new}]"
    helper.write_text("def f(: syntax")
    live.ok("%autoreload 0")
    live.ok("import importlib\ntry: importlib.reload(sys.modules['edited_helper'])\nexcept SyntaxError: pass")
    cell = live.ok("list(session.run(f))")
    assert "the ranks could not read a module again" in cell.stderr
    assert cell.result == f"[{new}, {new}, {new}]"


def test_a_ranks_own_name_stays_and_is_told_when_the_notebook_has_one_too(live: Kernel) -> None:
    live.ok("class device: pass")
    cell = live.ok("%%ranks\nprint(device)")
    assert speakers(cell) == {"cpu": {0, 1, 2}}
    assert "device is each rank's own in %%ranks cells" in cell.stderr
    assert live.ok("%%ranks\nprint(device)").stderr == ""
    live.ok("del device")


def test_completions_are_the_ranks_names_in_a_ranks_cell(live: Kernel) -> None:
    live.ok("%%ranks\nvery_long_name_of_rank = {'a': 1}")
    code = "%%ranks\nx = 1\nvery_long_na"
    assert "%%ranks\nx = 1\nvery_long_name_of_rank" in completed(live, code)
    assert "very_long_name_of_rank" not in completed(live, "very_long_na")


@pytest.mark.parametrize(
    ("line", "whole"),
    [
        ("text_of_rank.capi", "text_of_rank.capitalize"),
        ("x = text_of_rank.capi", "x = text_of_rank.capitalize"),
        ("print(text_of_rank.capi", "print(text_of_rank.capitalize"),
        ("keys_of_rank['al", "keys_of_rank['alpha"),
        ("text_of_both.capi", "text_of_both.capitalize"),
    ],
)
def test_completion_keeps_the_object_when_an_attribute_or_a_key_is_asked_for(
    live: Kernel, line: str, whole: str
) -> None:
    live.ok("%%ranks\ntext_of_rank, text_of_both, keys_of_rank = 'a', 'b', {'alpha': 1}")
    live.ok("text_of_both = 'c'")
    assert completed(live, "%%ranks\nx = 1\n" + line) == ["%%ranks\nx = 1\n" + whole]


def completed(kernel: Kernel, code: str) -> list[str]:
    """What the cell may become."""
    client = kernel._client
    reply = client.complete(code, len(code), reply=True, timeout=20)["content"]
    return [code[: reply["cursor_start"]] + text + code[reply["cursor_end"] :] for text in reply["matches"]]


# ── %nbaccel ──────────────────────────────────────────────────────────────────────────────────────────


def test_way_to_start_is_said_when_there_is_no_session(bare: Kernel) -> None:
    cell = bare.run("%%ranks\n1")
    assert "start one with  %nbaccel start -n 4" in cell.output
    assert "%nbaccel start -n 4 starts one" in bare.ok("%nbaccel status").stdout
    assert "there is auto, " in bare.run("%nbaccel frobnicate").output
    assert 'UsageError: %nbaccel "x: No closing quotation' in plain(bare.run('%nbaccel "x').output)


def test_start_says_that_it_ends_the_session_before(bare: Kernel) -> None:
    start = "%nbaccel start -n 1 --device cpu"
    assert "was ended" not in bare.ok(start, timeout=120).stdout
    assert (
        "the session before this one was ended: the variables of its ranks are gone" in bare.ok(start).stdout
    )
    bare.ok("%nbaccel stop")
    assert "was ended" not in bare.ok(start).stdout
    bare.ok("%nbaccel stop")


def test_session_goes_on_when_another_is_started_with_a_bad_option(live: Kernel) -> None:
    before = pids(live)
    assert "device (from the session) is 'nope'" in live.run("%nbaccel start -n 2 --device nope").output
    assert pids(live) == before


def test_cell_goes_on_when_it_asks_to_debug_a_rank_that_is_not_there(live: Kernel) -> None:
    assert "there is no rank 7: the ranks are 0 to 2" in live.run("%nbaccel debug 7", answers=[]).output
    assert shown(live, "%%ranks\n1 + 1") == "[0-2] 2"


@pytest.mark.parametrize("name", ["restart", "stop", "status", "interrupt", "stacks"])
def test_nothing_is_done_when_a_subcommand_for_all_ranks_is_given_one(live: Kernel, name: str) -> None:
    live.ok("%%ranks\nkept_here = 5")
    assert f"UsageError: %nbaccel {name} takes no argument" in plain(live.run(f"%nbaccel {name} 1").output)
    assert shown(live, "%%ranks\nkept_here") == "[0-2] 5"


def test_names_are_asked_for_when_nothing_is_pushed(live: Kernel) -> None:
    assert "push NAME…: write the names of what is to be sent" in live.run("%nbaccel push").output
    assert "push: there is no nowhere in the notebook" in live.run("%nbaccel push session nowhere").output


def test_vars_mark_what_differs_when_listed(live: Kernel) -> None:
    live.ok("%%ranks\nbig = torch.zeros(1000)\nmixed = rank // 2")
    table = live.ok("%nbaccel vars").stdout
    assert re.search(r"^big +0-2 +Tensor +\(1000\) +float32 +cpu +4,000 +[0-9a-f]{8}", table, re.M)
    assert re.search(r"^mixed +≠ +0-1 +int .* 0$", table, re.M)
    assert re.search(r"^mixed +≠ +2 +int .* 1$", table, re.M)
    assert live.ok("%nbaccel vars --sort size").stdout.splitlines()[1].startswith("big")


def test_status_lists_processes_when_asked(live: Kernel) -> None:
    table = live.ok("%nbaccel status").stdout
    assert all(str(pid) in table for pid in pids(live))
    assert re.search(r"^1 +idle +\d+ +\d+ MiB", table, re.M)


def test_cells_run_on_ranks_visibly_when_auto_is_on(live: Kernel) -> None:
    live.ok("%nbaccel auto on")
    cell = live.ok("mine = rank + 100\nmine")
    assert cell.stdout.startswith("▸ ranks 0-2")
    assert [data["text/plain"] for data in cell.displays] == ["[0] 100\n[1] 101\n[2] 102"]
    error = live.run("1/0")
    assert re.search(r"Cell In\[\d+\], line 1, in <module>", plain(error.traceback))
    live.ok("# all of it\n%nbaccel auto off")
    assert live.ok("'mine' in globals()").result == "False"


def test_definitions_reach_the_ranks_when_auto_is_on(live: Kernel) -> None:
    live.ok("def from_the_notebook(): return 'arrived'")
    live.ok("%nbaccel auto on")
    assert shown(live, "from_the_notebook()") == "[0-2] 'arrived'"
    live.ok("%nbaccel auto off")


@pytest.mark.parametrize("text", ["", "0-2", "[0,1,2]", " 0, 1-2 ", "0 1 2", "0  1 - 2", "[ 0 , 1 2 ]"])
def test_all_ranks_are_chosen_when_named_in_any_way(text: str) -> None:
    assert parse_ranks(text, 3) == (0, 1, 2)


@pytest.mark.parametrize("text", ["7", "0-7", "one", "0-", "-1", "0,,1", "2-0", "²", "0-9999999999"])
def test_selection_is_refused_when_it_makes_no_sense(text: str) -> None:
    with pytest.raises(Exception, match="%%ranks"):
        parse_ranks(text, 3)


# ── ■ ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_interrupt_says_where_ranks_were_and_keeps_them(live: Kernel) -> None:
    before = pids(live)
    cell = live.start(
        "%%ranks\ncount = 0\nif rank == 1:\n"
        "    while True: time.sleep(0.01); count += 1; count == 40 and print('counted', flush=True)\n"
        "dist.barrier()"
    )
    live.pump(lambda: "counted" in cell.stdout, 30, "the loop")
    live.interrupt()
    live.finish(cell, timeout=20)
    assert cell.error == "KeyboardInterrupt"
    text = plain(cell.traceback)
    assert re.search(r"ranks 0,2 waited in barrier, called from Cell In\[\d+\] line 5", text)
    assert re.search(r"rank 1 was at Cell In\[\d+\] line 4", text)
    assert "session.py" not in text
    assert pids(live) == before
    assert shown(live, "%%ranks 1\ncount > 5") == "[1] True"
    assert shown(live, "%%ranks\nt = torch.ones(1); dist.all_reduce(t); float(t)") == "[0-2] 3.0"


def test_cell_that_waits_says_so_and_is_one_line_when_interrupted(live: Kernel) -> None:
    live.ok("import time\nnap = session.submit(time.sleep, 60)")
    cell = live.start("%%ranks\nrank")
    live.pump(lambda: "the ranks are still busy" in cell.stderr, 20, "why nothing happens")
    live.interrupt()
    live.finish(cell, timeout=20)
    assert re.fullmatch("KeyboardInterrupt: interrupted before its turn came: .*", plain(cell.traceback))
    live.ok("%nbaccel interrupt")
    assert live.run("nap.result(timeout=20)").error == "KeyboardInterrupt"
    assert shown(live, "%%ranks\n1 + 1") == "[0-2] 2"


# ── the end ───────────────────────────────────────────────────────────────────────────────────────────


def test_no_process_stays_when_the_extension_or_the_kernel_ends(bare: Kernel) -> None:
    ranks = started(bare)
    bare.ok("%unload_ext nbaccel")
    wait_until(lambda: gone(ranks), 20, f"the end of {ranks} after %unload_ext")
    assert "not found" in bare.run("%nbaccel status").output
    bare.ok("%reload_ext nbaccel")
    ranks = started(bare)
    bare.kill()
    wait_until(lambda: gone(ranks), 20, f"the end of {ranks} after SIGKILL")


def started(kernel: Kernel) -> list[int]:
    """A new session's ranks, and a process that each of them started."""
    kernel.ok("%nbaccel start -n 2 --device cpu", timeout=120)
    kernel.ok("%%ranks\nimport subprocess\nsubprocess.Popen(['sleep', '600'], start_new_session=True);")
    found = [one.pid for one in kernel.processes() if name(one.pid).startswith(("nb-rank", "sleep"))]
    assert len(found) == 4
    return found


def name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return ""
