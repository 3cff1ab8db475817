"""Launches with everything a rank can show: in a kernel, and told again by the run folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from nbaccel import launch
from nbaccel.errors import WorkerError
from nbaccel.session.reopen import PastRun, runs
from tests.conftest import Kernel


def work(rank_that_fails: int = -1) -> int:
    import os
    import time

    from tqdm import tqdm

    from nbaccel.wire import events

    rank = int(os.environ["RANK"])
    for step in tqdm(range(3), desc="bar"):
        events.emit(events.Metric(values={"loss": 3.0 - step}, step=step))
        time.sleep(0.02)
    print(f"said by {rank}")
    display({"shown": rank})  # type: ignore[name-defined] # noqa: F821  # there as in a notebook
    if rank == rank_that_fails:
        raise ValueError("of all things")
    return rank


def ask() -> str:
    return input("name? ")


def test_run_folder_tells_the_whole_run_again(clean: None, tmp_path: Path) -> None:
    run = launch(work, 1, num_processes=2, folder=tmp_path)
    with pytest.raises(WorkerError):
        run.result()
    again = runs(tmp_path)[0]
    assert isinstance(again, PastRun)
    for told in (run.report(), again.report()):
        assert told.values["state"] == "failed"
        assert told.values["error"]["rank"] == 1
        assert told.values["error"]["ranks"] == [1]
        assert "ValueError: of all things" in told.values["error"]["lines"]
        assert told.values["error"]["lines"][-2].startswith(
            "rank 1 of 2 failed: ValueError: of all things (at "
        )
        assert told.values["metrics"] == {"loss": 1.0}
        assert [rank["total"] for rank in told.values["ranks"]] == [3, 3]
        assert told.values["again"].startswith("notebook_launcher(work, args=…, num_processes=2")
        assert len(told.text.splitlines()) <= 40
        assert "said by 1" in told.text or "said by 1" in run.logs(1)
        assert json.loads(told.to_json()) == dict(told.values)
    page = again.save_html(tmp_path / "run.html").read_text()
    assert "ValueError: of all things" in page.replace("</span>", "")
    assert "said by 1" in page
    assert again._repr_mimebundle_()["text/plain"].startswith("work · 2 ranks on cpu · failed")
    assert repr(runs(tmp_path)).split()[:2] == ["0", "failed"]


def test_display_is_text_and_bars_stay_where_nobody_paints(
    clean: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(work, num_processes=1, folder=False).result() == [0]
    shown = capsys.readouterr()
    assert shown.out == "said by 0\n{'shown': 0}\n"
    assert "bar: 100%" in shown.err


def test_question_without_anybody_to_ask_is_an_error_at_once(clean: None) -> None:
    with pytest.raises(WorkerError, match=r"EOFError: input\(\) on rank [01]: nobody can be asked here"):
        launch(ask, num_processes=2, folder=False).result()


PANEL = """
import os, time
def work(steps):
    from tqdm.auto import tqdm
    for _ in tqdm(range(steps), desc="bar"):
        time.sleep(0.05)
    display(f"by {os.environ['RANK']}")
    print("said")
notebook_launcher(work, (20,), num_processes=2, dashboard=True)
"""


@pytest.mark.kernel
def test_panel_ends_in_its_static_form(kernel: Kernel) -> None:
    cell = kernel.ok(PANEL)
    assert set(cell.stdout.split("\n")) <= {"[0-1] said", "[1] said", "said", ""}
    assert cell.stderr == ""
    widgets = [data for data in cell.displays if "application/vnd.jupyter.widget-view+json" in data]
    assert len(widgets) == 1
    static = [data for data in cell.displays if data not in widgets]
    header, middle, body = static[-3:]
    assert "done" in header["text/html"]
    assert header["text/plain"].startswith("work · 2 ranks on cpu · done")
    assert middle == {"text/html": "", "text/plain": ""}
    assert body["text/html"].count("20/20") == 2
    assert any("'by 1'" in data.get("text/plain", "") for data in cell.displays)


CAUGHT = """
def deep():
    raise ValueError("deep cause")
try:
    notebook_launcher(deep, num_processes=2, dashboard=True)
except Exception as error:
    print("caught", type(error).__name__)
"""


@pytest.mark.kernel
def test_traceback_of_a_failure_that_is_caught_is_folded_in_the_panel(kernel: Kernel) -> None:
    cell = kernel.ok(CAUGHT)
    assert "caught WorkerError" in cell.stdout
    shown = cell.displays[-2]["text/html"]
    headline, _, folded = shown.partition("<details style")
    assert "failed: ValueError: deep cause" in headline
    assert "Traceback" not in headline
    for words in ("Traceback", "in deep", "raise ValueError"):
        assert words in re.sub("<[^>]*>", "", folded)
    again = kernel.ok("import nbaccel\nnbaccel.last_run().show()").displays[-2][
        "text/html"
    ]  # no error follows it
    assert "Traceback" in again
    assert "<details" not in again


LEFT = """
run = nbaccel.launch(deep, num_processes=2, dashboard=True)
print("failed", type(run.exception()).__name__)
"""


@pytest.mark.kernel
def test_traceback_is_open_where_the_cell_that_launched_does_not_wait_for_the_values(kernel: Kernel) -> None:
    kernel.ok("import nbaccel\ndef deep():\n    raise ValueError('deep cause')")
    cell = kernel.ok(LEFT)
    assert "failed WorkerError" in cell.stdout
    shown = cell.displays[-2]["text/html"]
    assert "Traceback" in shown
    assert "<details" not in shown


INSIDE = """
import ipywidgets, nbaccel
def work():
    display("shown")
    print("said")
with ipywidgets.Output():
    notebook_launcher(work, num_processes=2, dashboard=True)
    nbaccel.last_run().show()
"""


@pytest.mark.kernel
def test_nothing_waits_to_be_replaced_inside_an_output_widget(kernel: Kernel) -> None:
    cell = kernel.ok(INSIDE, answers=[])
    assert "said" in cell.stdout
    *displays, panel = cell.displays
    assert sorted(data["text/plain"] for data in displays) == ["[0] 'shown'", "[1] 'shown'"]
    assert "done" in panel["text/html"]
    assert panel["text/plain"].startswith("work · 2 ranks on cpu · done")


@pytest.mark.kernel
def test_text_alone_where_nobody_looks_on(kernel: Kernel) -> None:
    cell = kernel.ok(PANEL.replace(", dashboard=True", ""))
    assert all("application/vnd.jupyter.widget-view+json" not in data for data in cell.displays)
    assert not any("done" in data.get("text/html", "") for data in cell.displays)
    assert "bar: 100%" in cell.stderr
