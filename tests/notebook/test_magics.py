"""%nbaccel and %%ranks in a real kernel."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from nbaccel.notebook.definitions import Definitions
from nbaccel.notebook.magics import parse_ranks
from tests.conftest import Kernel, gone, wait_until

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, state_home: None) -> Iterator[Kernel]:
    """A kernel with a session of three ranks."""
    kernel = Kernel(tmp_path_factory.mktemp("live"))
    kernel.ok("%load_ext nbaccel")
    kernel.ok("%nbaccel start -n 3 --device cpu --grace 2", timeout=120)
    kernel.ok("%%ranks\nimport torch, time, os\ntorch.set_num_threads(1)")
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


def test_rich_value_is_shown_as_such_when_it_has_html(live: Kernel) -> None:
    cell = live.ok("%%ranks\nclass Rich:\n    def _repr_html_(self): return '<b>rich</b>'\nRich()")
    assert [data["text/html"] for data in cell.displays] == ["<b>rich</b>"]


def test_output_appears_in_the_cell_that_ran_it(live: Kernel) -> None:
    first = live.ok("%%ranks\nprint('one', rank // 2)")
    second = live.ok("%%ranks\nprint('two')")
    assert sorted(first.stdout.splitlines()) == ["[0-1] one 0", "[2] one 1"]
    assert second.stdout == "[0-2] two\n"


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
    began = time.monotonic()
    cell = live.run("%%ranks\nif rank == 1:\n    invert(0)\ndist.barrier()")
    assert time.monotonic() - began < 1.5 + 1.5  # what a busy machine adds
    text = plain(cell.traceback)
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


def test_needed_definitions_are_those_not_yet_sent() -> None:
    def first() -> None: ...

    def second() -> None: ...

    known, notebook = Definitions(), {"f": first, "x": 1}
    assert known.needed("f(x)", notebook) == {"f": first}
    known.note_run("f(x)", {"f": first}, notebook)
    assert known.needed("f(x)", notebook) == {}
    notebook["f"] = second
    assert known.needed("f(x)", notebook) == {"f": second}
    known.note_run("def f(): pass", {}, notebook)
    assert known.needed("f()", notebook) == {}, "the ranks' own until the notebook defines it anew"
    assert known.needed("not python (", notebook) == {}


def test_completions_are_the_ranks_names_in_a_ranks_cell(live: Kernel) -> None:
    live.ok("%%ranks\nvery_long_name_of_rank = {'a': 1}")
    code = "%%ranks\nx = 1\nvery_long_na"
    assert "very_long_name_of_rank" in complete(live, code)
    assert "very_long_name_of_rank" not in complete(live, "very_long_na")


def complete(kernel: Kernel, code: str) -> list[str]:
    client = kernel._client
    reply = client.complete(code, len(code), reply=True, timeout=20)
    return list(reply["content"]["matches"])


# ── %nbaccel ──────────────────────────────────────────────────────────────────────────────────────────


def test_way_to_start_is_said_when_there_is_no_session(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel()
    kernel.ok("%load_ext nbaccel")
    cell = kernel.run("%%ranks\n1")
    assert "start one with  %nbaccel start -n 4" in cell.output
    assert "%nbaccel start -n 4 starts one" in kernel.ok("%nbaccel status").stdout
    assert "there is auto, " in kernel.run("%nbaccel frobnicate").output


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
    live.ok("%nbaccel auto off")
    assert live.ok("'mine' in globals()").result == "False"


@pytest.mark.parametrize("text", ["", "0-2", "[0,1,2]", " 0, 1-2 "])
def test_all_ranks_are_chosen_when_named_in_any_way(text: str) -> None:
    assert parse_ranks(text, 3) == (0, 1, 2)


@pytest.mark.parametrize("text", ["7", "0-7", "one", "0-", "-1", "0,,1"])
def test_selection_is_refused_when_it_makes_no_sense(text: str) -> None:
    with pytest.raises(Exception, match="%%ranks"):
        parse_ranks(text, 3)


# ── ■ ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_interrupt_says_where_ranks_were_and_keeps_them(live: Kernel) -> None:
    before = pids(live)
    cell = live.start(
        "%%ranks\ncount = 0\nif rank == 1:\n    while True: time.sleep(0.01); count += 1\ndist.barrier()"
    )
    live.settle(0.7)
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


# ── the end ───────────────────────────────────────────────────────────────────────────────────────────


def test_no_process_stays_when_the_extension_or_the_kernel_ends(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel()
    kernel.ok("%load_ext nbaccel")
    ranks = started(kernel)
    kernel.ok("%unload_ext nbaccel")
    wait_until(lambda: gone(ranks), 10, f"the end of {ranks} after %unload_ext")
    assert "not found" in kernel.run("%nbaccel status").output
    kernel.ok("%reload_ext nbaccel")
    ranks = started(kernel)
    os.kill(kernel.pid, signal.SIGKILL)
    wait_until(lambda: gone(ranks), 10, f"the end of {ranks} after SIGKILL")


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
