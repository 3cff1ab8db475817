"""The panel in a real JupyterLab and a real Notebook 7, looked at with a real browser.

One server, one browser and, but for the pages that a saved notebook is looked at in, one kernel: a page costs ten
seconds of a processor to load.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import nbformat
import pytest

from tests.browser.cells import (
    AGAIN,
    ASK,
    BLOCKS,
    CELLS,
    COMPARE,
    DEAF,
    FAIL,
    KNOB,
    LATER,
    LISTED,
    MAP,
    RUN,
    SESSION,
    SETUP,
    SHOW,
    STEPS,
    STOP,
    WIDGET,
)
from tests.browser.conftest import PATIENCE, Lab, Page, wait_for

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(900)]

SHOTS = os.environ.get("NBACCEL_SHOTS")
"""A folder for screenshots; none are kept without it."""


@pytest.fixture(scope="module")
def book(lab: Lab, browser: Any) -> Iterator[Page]:
    """A notebook with everything set up and its server warm."""
    path = lab.notebook("panel.ipynb", SETUP, *CELLS.values())
    page = Page(lab, browser, path)
    page.run(0)
    yield page
    page.close()


def shot(page: Page, name: str, index: int) -> None:
    if SHOTS:
        page.shot(Path(SHOTS) / f"{name}.png", index)


def instead_of_state(page: Page, index: int) -> str:
    """What a rule of style writes over the state of a run that goes on."""
    return after(page.output(index).locator(".nbaccel-goes-on").first)


def after(element: Any, what: str = "content") -> str:
    """What a rule of style adds to an element, or another property of that."""
    return str(element.evaluate(f"node => getComputedStyle(node, '::after').{what}"))


def outputs(lab: Lab, name: str, index: int) -> list[Any]:
    return list(nbformat.read(lab.folder / "work" / name, as_version=4).cells[index].outputs)


def kinds_of(lab: Lab, name: str, index: int) -> set[str]:
    """The kinds of what a cell of a saved notebook shows."""
    return {mime for out in outputs(lab, name, index) for mime in out.get("data", {})}


@pytest.fixture(scope="module")
def saved(book: Page) -> Page:
    """The notebook with all that it has shown, on disk."""
    book.save()
    return book


def test_panel_appears_and_its_bars_move_while_the_cell_blocks(book: Page, lab: Lab) -> None:
    output = book.output(RUN)
    book.start(RUN)
    output.get_by_text("train", exact=True).first.wait_for()
    wait_for(lambda: output.inner_text().count("30/90") == 4, "the bars of ranks that wait there")
    output.locator("button", has_text="Stop").wait_for()
    num_widgets = output.locator(".jupyter-widgets").count()
    output.locator("select").select_option(label="rank 2")
    wait_for(lambda: "step 20 of rank 2" in output.inner_text(), "the output of rank 2")
    (lab.folder / "work" / "past-30").touch()
    wait_for(lambda: output.inner_text().count("60/90") == 4, "bars that move")
    wait_for(lambda: "step 60 of rank 2" in output.inner_text(), "more of that output")
    assert output.locator("select").input_value() == "rank 2"
    assert output.locator(".jupyter-widgets").count() == num_widgets
    shot(book, "running", RUN)
    (lab.folder / "work" / "past-60").touch()
    book.done(RUN)
    wait_for(lambda: "done" in output.inner_text(), "the last form")
    assert output.locator(".jupyter-widgets").count() == 0
    assert output.inner_text().count("90/90") == 4
    shot(book, "done", RUN)


def test_stop_ends_the_run_while_the_cell_blocks(book: Page) -> None:
    stop(book)
    assert "■" in book.output(STOP).inner_text()


def stop(book: Page) -> None:
    """Press Stop in a run, and read the cell's own word of it."""
    output = book.output(STOP)
    book.start(STOP)
    button = output.locator("button", has_text="Stop")
    button.wait_for()
    wait_for(lambda: f"/{STEPS}" in output.inner_text(), "a bar")
    button.click()
    book.done(STOP)
    wait_for(lambda: "stopped" in output.inner_text(), "the cell's own word")


def test_exception_opens_itself(book: Page) -> None:
    book.run(FAIL)
    output = book.output(FAIL)
    wait_for(lambda: "✗" in output.inner_text(), "the failed rank")
    text = output.inner_text()
    assert "ValueError: <b>no such</b>" in text
    assert "WorkerError: rank 1 of 2 failed" in text
    assert output.get_by_text("output of rank 1").count() == 1
    output.locator("summary", has_text="output of rank 1").click()
    assert "step 20 of rank 1" in output.inner_text()
    shot(book, "failed", FAIL)


def test_displays_of_ranks_appear_side_by_side_and_bars_leave_the_text(book: Page) -> None:
    book.run(SHOW)
    output = book.output(SHOW)
    wait_for(lambda: output.locator("img").count() == 4, "a figure and an image of each rank")
    wait_for(lambda: output.locator(".js-plotly-plot").count() == 2, "plotly's figure of each rank")
    text = output.inner_text()
    assert text.count("column of pandas") == 2
    for bar in ("of the hub", "of transformers"):
        assert f"bar {bar}: 100%" not in text
    assert "second of 0" in text
    assert "second of 1" in text
    assert "first" not in text
    assert "5/5" in text
    assert "bar of the rank: 100%" not in text
    shot(book, "displays", SHOW)
    book.write(SHOW, "pass")  # plotly's five megabytes would be loaded with every later page
    book.run(SHOW)


def test_questions_of_ranks_are_asked_one_after_the_other(book: Page) -> None:
    answers = {"name?": ["ada"], "secret?": ["hush"], "(Pdb)": ["p inner + 1", "c"]}
    answered = dict.fromkeys(answers, 0)
    book.start(ASK)
    output = book.output(ASK)
    prompts = output.locator(".jp-Stdin-prompt")

    def question() -> str | None:
        """The word that is asked for now: what was answered stays in the text."""
        asked, text = prompts.last.inner_text() if prompts.count() else "", output.inner_text()
        left = (word for word in answers if answered[word] < len(answers[word]))
        return next((word for word in left if word in asked and text.count(word) > answered[word]), None)

    for _ in range(4):
        word = wait_for(question, "a question")
        assert ("[rank 0]" if word == "secret?" else "[rank 1]") in prompts.last.inner_text()
        kind = output.locator("input.jp-Stdin-input").last.get_attribute("type")
        assert (kind == "password") == (word == "secret?")
        answer(book, ASK, answers[word][answered[word]])
        answered[word] += 1
    book.done(ASK)
    text = output.inner_text()
    assert "42" in text, "what pdb printed"
    assert "[1] 'ada'" in text
    assert text.count("hush") == 1, "only as the value that the function returned"


def answer(book: Page, index: int, text: str) -> None:
    book.page.wait_for_timeout(300)  # the box is given the focus a moment after it is there
    box = book.output(index).locator("input.jp-Stdin-input").last
    element = box.element_handle()
    box.fill(text)
    box.press("Enter")
    wait_for(lambda: not element.evaluate("box => box.isConnected"), "the box to go")


def test_widgets_of_a_rank_work_both_ways_while_the_cell_blocks(book: Page, lab: Lab) -> None:
    book.start(WIDGET)
    output = book.output(WIDGET)
    handle = output.locator(".noUi-handle")
    handle.wait_for()
    for level in (4, 5, 6):
        handle.press("ArrowRight")
        wait_for(lambda level=level: f"moved to {level} in 1" in output.inner_text(), "the rank's answer")
    shot(book, "widgets", WIDGET)
    output.locator("button", has_text="go on").click()
    book.done(WIDGET)
    wait_for(lambda: output.locator(".jupyter-widgets").count() == 0, "the last form")
    text = output.inner_text()
    assert "rank 1" in text
    assert "moved to 6 in 1" in text
    assert "'level 6'" in text
    book.save()
    assert kinds_of(lab, "panel.ipynb", WIDGET) == {"text/html", "text/plain"}


def test_stop_in_a_session_ends_all_ranks_at_the_same_step_each_time(book: Page) -> None:
    book.start(SESSION)
    output, said = book.output(SESSION), "both at the same step: True"
    for number in (1, 2):  # the second loop uses what was prepared, and stopped, before
        button = output.locator("button", has_text="Stop")
        button.wait_for()
        output.locator("button", has_text="Save now").wait_for()
        wait_for(lambda: "running" in output.inner_text() and f"/{STEPS}" in output.inner_text(), "a bar")
        button.click()
        wait_for(lambda number=number: output.inner_text().count(said) == number, "the ranks' own word")
    book.done(SESSION)
    assert "every rank’s full output: ~/state/nbaccel/runs/" in output.inner_text()
    shot(book, "stopped-twice", SESSION)


def test_stop_pressed_twice_kills_ranks_that_will_not_end(book: Page) -> None:
    output = book.output(DEAF)
    book.start(DEAF)
    button = output.locator("button", has_text="Stop")
    button.wait_for()
    wait_for(lambda: "running" in output.inner_text(), "ranks that run")
    button.click()
    wait_for(lambda: "not now" in output.inner_text(), "ranks that refuse")
    shot(book, "stop-refused", DEAF)
    button.click()
    book.done(DEAF)
    wait_for(lambda: "gone" in output.inner_text(), "the cell's own word")
    shot(book, "stop-twice", DEAF)


def test_knob_turns_on_all_ranks_at_the_same_step(book: Page) -> None:
    book.start(KNOB)
    handle = book.output(KNOB).locator(".noUi-handle")
    handle.wait_for()
    assert book.output(KNOB).locator("button", has_text="Save now").is_visible()
    shot(book, "knob", KNOB)
    handle.press("ArrowRight")
    book.done(KNOB)
    assert "[0-1] '4 at step" in book.output(KNOB).inner_text()


def test_sweep_has_a_row_per_trial_and_one_stop_and_runs_are_compared(book: Page) -> None:
    output = book.output(MAP)
    book.start(MAP)
    output.locator("button", has_text="Stop").wait_for()
    wait_for(
        lambda: "2 done" in output.inner_text() and "2 running" in output.inner_text(), "two trials done"
    )
    wait_for(lambda: output.inner_text().count("loss") >= 4, "a metric of each")
    shot(book, "sweep-running", MAP)
    output.locator("button", has_text="Stop").click()
    book.done(MAP)
    wait_for(lambda: "[None, None, True, True," in output.inner_text(), "the cell's own word")
    text = output.inner_text()
    assert "6 trials:" in text
    assert "ValueError: diverged" in text
    assert output.locator("button").count() == 0
    shot(book, "sweep", MAP)
    book.run(COMPARE)
    shown = book.output(COMPARE)
    wait_for(lambda: "what differs" in shown.inner_text(), "the comparison")
    assert {"argument.lr", "0.1", "0.2"} <= set(shown.inner_text().split())
    shot(book, "compare", COMPARE)


def test_page_closed_in_mid_run_finds_the_run_again_in_notebook_7(book: Page) -> None:
    book.run(LATER)
    wait_for(lambda: f"/{STEPS}" in book.output(LATER).inner_text(), "a bar")
    move(book, "notebooks")
    assert book.page.locator("#notebook-container, .jp-NotebookPanel").count() == 1
    book.run(AGAIN)
    output = book.output(AGAIN)
    first = wait_for(
        lambda: f"/{STEPS}" in output.inner_text() and output.inner_text(), "the run, shown again"
    )
    wait_for(lambda: output.inner_text() != first, "and it goes on")
    book.run(LISTED)
    wait_for(lambda: "■ stopped" in output.inner_text(), "its end")
    text = book.output(LISTED).inner_text()
    assert text.startswith("train")
    assert "2 ranks on cpu · stopped" in text


def test_launches_stop_and_fail_in_notebook_7(book: Page) -> None:
    if book.app != "notebooks":
        move(book, "notebooks")
    stop(book)
    book.run(FAIL)
    wait_for(lambda: "no such" in book.output(FAIL).inner_text(), "the error")
    shot(book, "notebook-7", FAIL)


def move(book: Page, app: Literal["doc/tree", "notebooks"], *, start_kernel: bool = True) -> None:
    """Save the notebook, leave its page and load it afresh; without waiting for a kernel that is busy."""
    book.save()
    book.page.goto("about:blank")
    book.app, book.start_kernel = app, start_kernel
    book.reopen()
    book.start_kernel = True


def test_page_loaded_again_while_the_cell_blocks_goes_on_with_its_panel(
    book: Page, lab: Lab, open_page: Any
) -> None:
    book.start(BLOCKS)
    output = book.output(BLOCKS)
    button = output.locator("button", has_text="Stop")
    button.wait_for()
    wait_for(lambda: f"/{STEPS}" in output.inner_text(), "a bar")
    move(book, "doc/tree", start_kernel=False)
    saved = book.path.read_text()
    (lab.folder / "work" / "half-way.ipynb").write_text(saved)
    (lab.folder / "work" / "elsewhere.ipynb").write_text(saved)
    book.cell(BLOCKS).scroll_into_view_if_needed()
    button.wait_for()
    wait_for(lambda: output.inner_text().count("running") == 3, "one panel: what was saved is hidden")
    first = output.inner_text()
    wait_for(lambda: output.inner_text() != first, "and it goes on")
    shot(book, "loaded-again", BLOCKS)
    lab.theme("JupyterLab Dark")
    try:
        elsewhere = open_page("elsewhere.ipynb", start_kernel=False, width=600)
    finally:
        lab.theme("JupyterLab Light")
    look_at_saved(elsewhere, "trusted")
    look_in_the_dark(elsewhere)
    elsewhere.ready()
    elsewhere.write(AGAIN, "import nbaccel; nbaccel.runs()[0].show()")
    elsewhere.run(AGAIN)
    shown = elsewhere.output(AGAIN)
    first = wait_for(lambda: f"/{STEPS}" in shown.inner_text() and shown.inner_text(), "the run, shown again")
    wait_for(lambda: shown.inner_text() != first, "and it goes on")
    button.click()
    wait_for(lambda: "every rank’s full output" in output.inner_text(), "its last form")
    assert output.inner_text().count("■ stopped") == 3
    assert "running" not in output.inner_text()
    wait_for(lambda: "■ stopped" in shown.inner_text(), "its end, seen from elsewhere")
    shot(book, "loaded-again-ended", BLOCKS)
    book.ready()


def look_at_saved(page: Page, name: str) -> None:
    """What a saved notebook shows without the kernel it ran in: of runs that ended, and of one that went on."""
    from playwright.sync_api import expect

    for index, words in ((RUN, "90/90"), (FAIL, "ValueError: <b>no such</b>"), (BLOCKS, f"/{STEPS}")):
        page.cell(index).scroll_into_view_if_needed()
        # painted when it is in view
        expect(page.output(index)).to_contain_text(words, timeout=PATIENCE * 1000)
        shot(page, f"reopened-{name}-{index}", index)
    bar = page.output(RUN).locator('div[style*="background-color"]').nth(1)
    assert bar.evaluate("node => getComputedStyle(node).backgroundColor") not in ("rgba(0, 0, 0, 0)", "")
    columns = page.output(RUN).locator("i")
    assert columns.count() > 50
    tops = {columns.nth(at).bounding_box()["y"] for at in (2, 25, 50)}
    assert len(tops) == 3, "the curve is flat"
    text = page.output(BLOCKS).inner_text()
    assert all(word in text for word in ("train", "running", "loss")), text
    assert "widget" not in text, text
    for words in ("Loading widget", "Error displaying widget"):
        assert page.page.get_by_text(words).locator("visible=true").count() == 0


def look_in_the_dark(page: Page) -> None:
    """Letters are light, and what is narrow is as wide as its cell."""
    page.cell(RUN).scroll_into_view_if_needed()
    cell = page.output(RUN)
    colour = cell.locator("b").first.evaluate("node => getComputedStyle(node).color")
    assert min(map(int, colour.removeprefix("rgb(").rstrip(")").split(", ")[:3])) > 150
    assert cell.locator("div").first.bounding_box()["width"] <= cell.bounding_box()["width"] + 1
    shot(page, "dark-narrow", RUN)


def test_saved_notebook_shows_the_last_panel_without_widgets_where_it_is_not_trusted(
    book: Page, lab: Lab, open_page: Any
) -> None:
    content = json.loads((lab.folder / "work" / "half-way.ipynb").read_text())
    content["metadata"]["copied"] = "so that its signature is another"
    (lab.folder / "work" / "copied.ipynb").write_text(json.dumps(content))
    assert kinds_of(lab, "copied.ipynb", RUN) == {"text/html", "text/plain"}
    assert kinds_of(lab, "copied.ipynb", BLOCKS) >= {
        "application/vnd.jupyter.widget-view+json",
        "text/html",
        "text/plain",
    }
    look_at_saved(open_page("copied.ipynb", start_kernel=False), "untrusted")


@pytest.mark.parametrize("template", ["lab", "basic"])
def test_exported_page_shows_the_panel_without_jupyter(
    saved: Page, browser: Any, tmp_path: Path, template: str
) -> None:
    from nbconvert import HTMLExporter

    text, _ = HTMLExporter(template_name=template).from_filename(str(saved.path))
    (tmp_path / "page.html").write_text(text)
    page = browser.new_page(viewport={"width": 1000, "height": 900}, java_script_enabled=False)
    page.goto(f"file://{tmp_path / 'page.html'}")
    panels = page.locator(".nbaccel-panel")
    words = " ".join(panels.all_inner_texts())
    for fact in ("✓ done", "90/90", "✗ failed", "ValueError: <b>no such</b>", "each step:", "rank 1 of 2"):
        assert fact in words
    body = page.locator(".nbaccel-panel", has_text="90/90").first
    columns = body.locator("i")
    assert len({columns.nth(at).bounding_box()["y"] for at in (2, 25, 50)}) == 3, "the curve is flat"
    fills = body.locator('div[style*="background-color"]').nth(1)
    assert fills.evaluate("node => getComputedStyle(node).backgroundColor") == "rgb(0, 158, 115)"
    if SHOTS:
        body.screenshot(path=str(Path(SHOTS) / f"exported-{template}.png"))
    page.close()


def test_words_alone_tell_the_whole_run(saved: Page, lab: Lab) -> None:
    header = next(out for out in outputs(lab, "panel.ipynb", FAIL) if "data" in out)
    lines = [re.sub(r"\d+(\.\d+)?(e-\d+)?", "N", line) for line in header.data["text/plain"].splitlines()]
    assert lines[0] == "train · N ranks on cpu · failed N s · N batch/s"
    assert lines[1].split()[:2] in (["N", "stopped"], ["N", "done"])
    assert re.match(r"  N  failed +█+░+  train N/N epoch N +N batch/s", lines[2]), lines[2]
    assert lines[3].startswith("  loss ")
    assert lines[4] == "  Traceback on rank N (most recent call last):"
    assert "  rank N of N failed: ValueError: <b>no such</b> shape (at Cell In[N] line N)" in lines
    assert lines[-1].startswith("  logs: ~/state/nbaccel/runs/")


def test_panel_of_a_kernel_that_is_restarted_has_no_broken_widgets_and_says_it_is_cut_off(book: Page) -> None:
    book.start(BLOCKS)
    output = book.output(BLOCKS)
    output.locator("button", has_text="Stop").wait_for()
    assert "cut off" not in instead_of_state(book, BLOCKS)
    book.page.locator('[data-command="notebook:restart-kernel"], jp-button[title*="Restart"]').first.click()
    book.page.locator(".jp-Dialog .jp-mod-warn, .jp-Dialog .jp-mod-accept").last.click()
    wait_for(lambda: "cut off here" in instead_of_state(book, BLOCKS), "the word")
    assert output.locator("button", has_text="Stop").locator("visible=true").count() == 0
    shot(book, "restarted", BLOCKS)
    book.ready()
    book.save()
    book.reopen()
    book.cell(BLOCKS).scroll_into_view_if_needed()
    middle = output.locator(".jp-OutputArea-output.lm-Panel").first
    wait_for(lambda: "cut off here" in after(middle) and after(middle, "visibility") == "visible", "the word")
    size = middle.evaluate("node => getComputedStyle(node).fontSize")
    assert size == "0px", "JupyterLab's own word shows"
    shot(book, "restarted-and-loaded-again", BLOCKS)
    book.write(AGAIN, "import nbaccel; nbaccel.last_run().show()")
    book.run(AGAIN)
    wait_for(lambda: "■ stopped" in book.output(AGAIN).inner_text(), "how it ended")
    assert "~/state/nbaccel/runs/" in book.output(AGAIN).inner_text()
