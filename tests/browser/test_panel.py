"""The panel in a real JupyterLab, looked at with a real browser."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.browser.conftest import Lab, Page

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(300)]

SHOTS = os.environ.get("NBACCEL_SHOTS")
"""A folder for screenshots; none are kept without it."""

SETUP = """
import math, os, time
from nbaccel import last_run, launch, notebook_launcher, runs
from nbaccel.wire import events

def train(steps, fail=False):
    rank = int(os.environ["RANK"])
    for step in range(1, steps + 1):
        time.sleep(0.05)
        if step % 20 == 0:
            print(f"step {step} of rank {rank}", flush=True)
        times = {"data": 0.01, "forward": 0.015, "backward": 0.02, "optimizer": 0.004}
        events.emit(events.Progress(name="train", step=step, total=steps, epoch=0, unit="batch", times=times))
        events.emit(events.Metric(values={"loss": math.exp(-step / 40) + 0.02 * rank}, step=step))
        if fail and rank == 1 and step == steps // 2:
            raise ValueError("<b>no such</b> \\x1b[31mshape")
    return rank

notebook_launcher(int, num_processes=2)
"""
RUN, STOP, FAIL, SHOW, ASK, LATER, AGAIN, LISTED, KNOB, WIDGET, SESSION, DEAF, BLOCKS = range(1, 14)
CELLS = {
    RUN: "notebook_launcher(train, (90,), num_processes=4)",
    STOP: """
try:
    notebook_launcher(train, (2000,), num_processes=2)
except KeyboardInterrupt:
    print("stopped")
""",
    FAIL: "notebook_launcher(train, (40, True), num_processes=2)",
    SHOW: """
def show():
    from IPython.display import HTML, Markdown, clear_output
    import matplotlib.pyplot as plt, pandas, PIL.Image, plotly.graph_objects as go
    from huggingface_hub.utils import tqdm as hub_tqdm
    from tqdm.auto import tqdm
    from transformers.utils.logging import tqdm as transformers_tqdm
    rank = int(os.environ["RANK"])
    for kind, name in ((tqdm, "of the rank"), (hub_tqdm, "of the hub"), (transformers_tqdm, "of transformers")):
        for _ in kind(range(5), desc="bar " + name):
            time.sleep(0.05)
    plt.figure(figsize=(2, 1)); plt.plot([1, 3, rank]); plt.show()
    handle = display(HTML("<b>first</b>"), display_id=True)
    handle.update(HTML(f"<b>second of {rank}</b>"))
    display(PIL.Image.new("RGB", (30, 20), (200, 40 * rank, 0)))
    display(pandas.DataFrame({"column of pandas": [rank]}))
    go.Figure(go.Scatter(y=[1, 3, rank])).show()
    if rank == 1:
        display(Markdown("*only* one"))
notebook_launcher(show, num_processes=2)
""",
    ASK: """
def asked():
    import getpass
    rank = int(os.environ["RANK"])
    word = input("name? ") if rank else getpass.getpass("secret? ")
    if rank:
        inner = 41
        breakpoint()
    return word
notebook_launcher(asked, num_processes=2)
""",
    LATER: "run = launch(train, 2000, num_processes=2)",
    AGAIN: "last_run().show()",
    LISTED: "run.kill(); run.exception(); print(runs()[0].name); print(run.report())",
    KNOB: """
def tuned():
    import torch
    from nbaccel import Accelerator
    accelerator = Accelerator()
    model = torch.nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    for step in range(1500):
        width = accelerator.knob("width", 3, low=1, high=9)
        if width != 3:
            return f"{width} at step {step}"
        accelerator.backward(model(torch.ones(4, 2)).sum())
        optimizer.step()
        time.sleep(0.02)
notebook_launcher(tuned, num_processes=2)
""",
    WIDGET: """
def widgets_of():
    import ipywidgets as widgets
    rank = int(os.environ["RANK"])
    if rank == 0:
        time.sleep(1)
        return
    slider = widgets.IntSlider(value=3, max=9, description="level")
    label, button, pressed = widgets.Label("untouched"), widgets.Button(description="go on"), []
    def moved(change):
        label.value = f"moved to {change['new']} in {os.environ['RANK']}"
    slider.observe(moved, "value")
    button.on_click(lambda _: pressed.append(1))
    display(widgets.VBox([slider, label, button]))
    end = time.time() + 30
    while not pressed and time.time() < end:
        time.sleep(0.05)
    return f"level {slider.value}"
notebook_launcher(widgets_of, num_processes=2)
""",
    SESSION: """
from nbaccel import Session
def prepare():
    import __main__, torch
    from nbaccel import Accelerator
    __main__.accelerator = Accelerator()
    model = torch.nn.Linear(2, 1)
    data = [(torch.ones(2),) for _ in range(4000)]
    __main__.prepared = __main__.accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.01), torch.utils.data.DataLoader(data)
    )
def stopped():
    import __main__
    model, optimizer, loader = __main__.prepared
    steps = 0
    for (batch,) in loader:
        __main__.accelerator.backward(model(batch).sum())
        optimizer.step()
        steps += 1
        time.sleep(0.01)
    return steps
with Session(num_processes=2) as session:
    session.run(prepare)
    for _ in range(2):
        steps = notebook_launcher(stopped, session=session)
        print("both at the same step:", 0 < steps[0] == steps[1] < 2000)
""",
    DEAF: """
def deaf():
    end = time.time() + 90
    while time.time() < end:
        try:
            time.sleep(1)
        except KeyboardInterrupt:
            print("not now", flush=True)
try:
    notebook_launcher(deaf, num_processes=2)
except KeyboardInterrupt:
    print("gone")
""",
    BLOCKS: "notebook_launcher(train, (2000,), num_processes=2)",
}


@pytest.fixture(scope="module")
def book(lab: Lab, browser: Any) -> Iterator[Page]:
    """A notebook with everything set up and its server warm."""
    path = lab.notebook("panel.ipynb", SETUP, *CELLS.values())
    page = Page(lab, browser, path)
    page.run(0, timeout=75)
    yield page
    page.close()


def shot(page: Page, name: str, index: int) -> None:
    if SHOTS:
        page.shot(Path(SHOTS) / f"{name}.png", index)


def wait_for(condition: Any, timeout: float, what: str) -> Any:
    end = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < end, f"not in {timeout} s: {what}"
        time.sleep(0.05)
    return value


def instead_of_state(page: Page, index: int) -> str:
    """What a rule of style writes over the state of a run that goes on."""
    return after(page.output(index).locator(".nbaccel-goes-on").first)


def after(element: Any, what: str = "content") -> str:
    """What a rule of style adds to an element, or another property of that."""
    return str(element.evaluate(f"node => getComputedStyle(node, '::after').{what}"))


def outputs(lab: Lab, name: str, index: int) -> list[Any]:
    return list(nbformat.read(lab.folder / "work" / name, as_version=4).cells[index].outputs)


def test_panel_appears_and_its_bars_move_while_the_cell_blocks(book: Page) -> None:
    output = book.output(RUN)
    book.start(RUN)
    output.get_by_text("train", exact=True).first.wait_for(timeout=5_000)
    first = wait_for(lambda: "/90" in output.inner_text() and output.inner_text(), 20, "a bar")
    wait_for(lambda: output.inner_text() != first, 20, "a bar that moves")
    output.locator("button", has_text="Stop").wait_for(timeout=5_000)
    num_widgets = output.locator(".jupyter-widgets").count()
    output.locator("select").select_option(label="rank 2")
    wait_for(lambda: "step 20 of rank 2" in output.inner_text(), 20, "the output of rank 2")
    before = output.inner_text()
    wait_for(lambda: output.inner_text() != before, 20, "a repaint")
    assert output.locator("select").input_value() == "rank 2"
    assert output.locator(".jupyter-widgets").count() == num_widgets
    shot(book, "running", RUN)
    book.done(RUN)
    wait_for(lambda: "done" in output.inner_text(), 20, "the last form")
    assert output.locator(".jupyter-widgets").count() == 0
    assert output.inner_text().count("90/90") == 4
    shot(book, "done", RUN)


def test_stop_ends_the_run_while_the_cell_blocks(book: Page) -> None:
    output = book.output(STOP)
    book.start(STOP)
    button = output.locator("button", has_text="Stop")
    button.wait_for(timeout=15_000)
    wait_for(lambda: "/2000" in output.inner_text(), 20, "a bar")
    book.save()
    button.click()
    book.done(STOP, timeout=15)
    wait_for(lambda: "stopped" in output.inner_text(), 20, "the cell's own word")
    assert "■" in output.inner_text()
    kept = (book.lab.folder / "work" / "panel.ipynb").read_text()
    (book.lab.folder / "work" / "half-way.ipynb").write_text(kept)


@pytest.mark.parametrize("trusted", [True, False])
def test_notebook_saved_half_way_shows_the_whole_panel_without_its_kernel(
    book: Page, lab: Lab, open_page: Any, trusted: bool
) -> None:
    content = json.loads((lab.folder / "work" / "half-way.ipynb").read_text())
    kinds = [set(out.get("data", {})) for out in content["cells"][STOP]["outputs"]]
    assert {"application/vnd.jupyter.widget-view+json", "text/html", "text/plain"} in kinds
    name = f"half-way-{trusted}.ipynb"
    content["metadata"] |= {} if trusted else {"copied": "so that its signature is another"}
    (lab.folder / "work" / name).write_text(json.dumps(content))
    page = open_page(name, start_kernel=False)
    page.cell(STOP).scroll_into_view_if_needed()
    page.page.wait_for_timeout(500)
    text = page.output(STOP).inner_text()
    assert "train" in text
    assert "running" in text
    assert "/2000" in text
    assert "loss" in text
    assert "widget" not in text, text
    shot(page, f"half-way-{'trusted' if trusted else 'untrusted'}", STOP)


def test_exception_opens_itself(book: Page) -> None:
    book.run(FAIL)
    output = book.output(FAIL)
    wait_for(lambda: "✗" in output.inner_text(), 20, "the failed rank")
    text = output.inner_text()
    assert "ValueError: <b>no such</b>" in text
    assert "WorkerError: rank 1 of 2 failed" in text
    assert output.get_by_text("output of rank 1").count() == 1
    output.locator("summary", has_text="output of rank 1").click()
    assert "step 20 of rank 1" in output.inner_text()
    shot(book, "failed", FAIL)


def test_displays_of_ranks_appear_side_by_side_and_bars_leave_the_text(book: Page) -> None:
    book.run(SHOW, timeout=150)
    output = book.output(SHOW)
    wait_for(lambda: output.locator("img").count() == 4, 20, "a figure and an image of each rank")
    wait_for(lambda: output.locator(".js-plotly-plot").count() == 2, 20, "plotly's figure of each rank")
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
        word = wait_for(question, 30, "a question")
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
    wait_for(lambda: not element.evaluate("box => box.isConnected"), 20, "the box to go")


def test_widgets_of_a_rank_work_both_ways_while_the_cell_blocks(book: Page, lab: Lab) -> None:
    book.start(WIDGET)
    output = book.output(WIDGET)
    handle = output.locator(".noUi-handle")
    handle.wait_for(timeout=20_000)
    for level in (4, 5, 6):
        handle.press("ArrowRight")
        wait_for(lambda level=level: f"moved to {level} in 1" in output.inner_text(), 20, "the rank's answer")
    shot(book, "widgets", WIDGET)
    output.locator("button", has_text="go on").click()
    book.done(WIDGET, timeout=15)
    wait_for(lambda: output.locator(".jupyter-widgets").count() == 0, 20, "the last form")
    text = output.inner_text()
    assert "rank 1" in text
    assert "moved to 6 in 1" in text
    assert "'level 6'" in text
    book.save()
    kinds = {mime for out in outputs(lab, "panel.ipynb", WIDGET) for mime in out.get("data", {})}
    assert kinds == {"text/html", "text/plain"}


def test_stop_in_a_session_ends_all_ranks_at_the_same_step_each_time(book: Page) -> None:
    book.start(SESSION)
    output, said = book.output(SESSION), "both at the same step: True"
    for number in (1, 2):  # the second loop uses what was prepared, and stopped, before
        button = output.locator("button", has_text="Stop")
        button.wait_for(timeout=30_000)
        output.locator("button", has_text="Save now").wait_for(timeout=10_000)
        wait_for(lambda: "running" in output.inner_text() and "/2000" in output.inner_text(), 20, "a bar")
        button.click()
        wait_for(lambda number=number: output.inner_text().count(said) == number, 20, "the ranks' own word")
    book.done(SESSION, timeout=20)
    assert "every rank’s full output: ~/state/nbaccel/runs/" in output.inner_text()
    shot(book, "stopped-twice", SESSION)


def test_stop_pressed_twice_kills_ranks_that_will_not_end(book: Page) -> None:
    output = book.output(DEAF)
    book.start(DEAF)
    button = output.locator("button", has_text="Stop")
    button.wait_for(timeout=15_000)
    wait_for(lambda: "running" in output.inner_text(), 20, "ranks that run")
    button.click()
    wait_for(lambda: "not now" in output.inner_text(), 20, "ranks that refuse")
    shot(book, "stop-refused", DEAF)
    button.click()
    book.done(DEAF, timeout=15)
    wait_for(lambda: "gone" in output.inner_text(), 10, "the cell's own word")
    shot(book, "stop-twice", DEAF)


def test_knob_turns_on_all_ranks_at_the_same_step(book: Page) -> None:
    book.start(KNOB)
    handle = book.output(KNOB).locator(".noUi-handle")
    handle.wait_for(timeout=20_000)
    assert book.output(KNOB).locator("button", has_text="Save now").is_visible()
    shot(book, "knob", KNOB)
    handle.press("ArrowRight")
    book.done(KNOB, timeout=20)
    assert "[0-1] '4 at step" in book.output(KNOB).inner_text()


def test_page_closed_in_mid_run_finds_the_run_again(book: Page, lab: Lab, open_page: Any) -> None:
    book.run(LATER)
    wait_for(lambda: "/2000" in book.output(LATER).inner_text(), 20, "a bar")
    book.save()
    book.page.goto("about:blank")
    time.sleep(1)
    book.reopen()
    book.run(AGAIN)
    output = book.output(AGAIN)
    first = wait_for(
        lambda: "/2000" in output.inner_text() and output.inner_text(), 20, "the run, shown again"
    )
    wait_for(lambda: output.inner_text() != first, 20, "and it goes on")
    book.run(LISTED)
    wait_for(lambda: "■ stopped" in output.inner_text(), 20, "its end")
    text = book.output(LISTED).inner_text()
    assert text.startswith("train")
    assert "2 ranks on cpu · stopped" in text


def test_page_loaded_again_while_the_cell_blocks_goes_on_with_its_panel(book: Page, open_page: Any) -> None:
    book.start(BLOCKS)
    output = book.output(BLOCKS)
    button = output.locator("button", has_text="Stop")
    button.wait_for(timeout=20_000)
    wait_for(lambda: "/2000" in output.inner_text(), 20, "a bar")
    book.save()
    book.page.goto("about:blank")
    book.start_kernel = False  # it is busy
    book.reopen()
    book.cell(BLOCKS).scroll_into_view_if_needed()
    button.wait_for(timeout=20_000)
    wait_for(lambda: output.inner_text().count("running") == 3, 20, "one panel: what was saved is hidden")
    first = output.inner_text()
    wait_for(lambda: output.inner_text() != first, 20, "and it goes on")
    shot(book, "loaded-again", BLOCKS)
    elsewhere = open_page("elsewhere.ipynb", "import nbaccel; nbaccel.runs()[0].show()")
    elsewhere.run(0)
    shown = elsewhere.output(0)
    first = wait_for(lambda: "/2000" in shown.inner_text() and shown.inner_text(), 20, "the run, shown again")
    wait_for(lambda: shown.inner_text() != first, 20, "and it goes on")
    button.click()
    wait_for(lambda: "every rank’s full output" in output.inner_text(), 30, "its last form")
    assert output.inner_text().count("■ stopped") == 3
    assert "running" not in output.inner_text()
    wait_for(lambda: "■ stopped" in shown.inner_text(), 30, "its end, seen from elsewhere")
    shot(book, "loaded-again-ended", BLOCKS)
    book.ready()
    book.start_kernel = True


@pytest.mark.parametrize("trusted", [True, False])
def test_saved_notebook_shows_the_last_panel_without_widgets(
    book: Page, lab: Lab, open_page: Any, trusted: bool
) -> None:
    from playwright.sync_api import expect

    book.save()
    name = "panel.ipynb"
    if not trusted:
        content = json.loads((lab.folder / "work" / name).read_text())
        content["metadata"]["copied"] = "so that its signature is another"
        name = "copied.ipynb"
        (lab.folder / "work" / name).write_text(json.dumps(content))
    kinds = {mime for out in outputs(lab, name, RUN) for mime in out.get("data", {})}
    assert kinds == {"text/html", "text/plain"}
    page = open_page(name, start_kernel=False)
    for index, words in ((RUN, "90/90"), (FAIL, "ValueError: <b>no such</b>")):
        page.cell(index).scroll_into_view_if_needed()
        expect(page.output(index)).to_contain_text(words, timeout=30_000)  # painted when it is in view
        shot(page, f"reopened-{'trusted' if trusted else 'untrusted'}-{index}", index)
    bar = page.output(RUN).locator('div[style*="background-color"]').nth(1)
    assert bar.evaluate("node => getComputedStyle(node).backgroundColor") not in ("rgba(0, 0, 0, 0)", "")
    columns = page.output(RUN).locator("i")
    assert columns.count() > 50
    tops = {columns.nth(at).bounding_box()["y"] for at in (2, 25, 50)}
    assert len(tops) == 3, "the curve is flat"
    for words in ("Loading widget", "Error displaying widget"):
        assert page.page.get_by_text(words).locator("visible=true").count() == 0


@pytest.mark.parametrize("template", ["lab", "basic"])
def test_exported_page_shows_the_panel_without_jupyter(
    book: Page, lab: Lab, browser: Any, tmp_path: Path, template: str
) -> None:
    from nbconvert import HTMLExporter

    book.save()
    text, _ = HTMLExporter(template_name=template).from_filename(str(lab.folder / "work" / "panel.ipynb"))
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


def test_words_alone_tell_the_whole_run(book: Page, lab: Lab) -> None:
    book.save()
    header = next(out for out in outputs(lab, "panel.ipynb", FAIL) if "data" in out)
    lines = [re.sub(r"\d+(\.\d+)?(e-\d+)?", "N", line) for line in header.data["text/plain"].splitlines()]
    assert lines[0] == "train · N ranks on cpu · failed N s · N batch/s"
    assert lines[1].split()[:2] in (["N", "stopped"], ["N", "done"])
    assert re.match(r"  N  failed +█+░+  train N/N epoch N +N batch/s", lines[2]), lines[2]
    assert lines[3].startswith("  loss ")
    assert lines[4] == "  Traceback on rank N (most recent call last):"
    assert "  rank N of N failed: ValueError: <b>no such</b> shape (at Cell In[N] line N)" in lines
    assert lines[-1].startswith("  logs: ~/state/nbaccel/runs/")


def test_panel_is_readable_on_a_dark_page_and_a_narrow_one(lab: Lab, open_page: Any) -> None:
    page = open_page("panel.ipynb", start_kernel=False, width=600)
    page.page.evaluate("document.body.dataset.jpThemeLight = 'false'")
    lab.theme("JupyterLab Dark")
    try:
        page.page.reload()
        page.loaded()
        cell = page.output(RUN)
        colour = cell.locator("b").first.evaluate("node => getComputedStyle(node).color")
        assert min(map(int, colour.removeprefix("rgb(").rstrip(")").split(", ")[:3])) > 150
        box = cell.bounding_box()
        inner = cell.locator("div").first.bounding_box()
        assert inner["width"] <= box["width"] + 1
        shot(page, "dark-narrow", RUN)
    finally:
        lab.theme("JupyterLab Light")


def test_panel_of_a_kernel_that_is_restarted_has_no_broken_widgets_and_says_it_is_cut_off(book: Page) -> None:
    book.start(BLOCKS)
    output = book.output(BLOCKS)
    output.locator("button", has_text="Stop").wait_for(timeout=30_000)
    assert "cut off" not in instead_of_state(book, BLOCKS)
    book.page.locator('[data-command="notebook:restart-kernel"], jp-button[title*="Restart"]').first.click()
    book.page.locator(".jp-Dialog .jp-mod-warn, .jp-Dialog .jp-mod-accept").last.click()
    wait_for(lambda: "cut off here" in instead_of_state(book, BLOCKS), 20, "the word")
    assert output.locator("button", has_text="Stop").locator("visible=true").count() == 0
    shot(book, "restarted", BLOCKS)
    book.ready()
    book.save()
    book.reopen()
    book.cell(BLOCKS).scroll_into_view_if_needed()
    middle = output.locator(".jp-OutputArea-output.lm-Panel").first
    wait_for(
        lambda: "cut off here" in after(middle) and after(middle, "visibility") == "visible", 20, "the word"
    )
    size = middle.evaluate("node => getComputedStyle(node).fontSize")
    assert size == "0px", "JupyterLab's own word shows"
    shot(book, "restarted-and-loaded-again", BLOCKS)
    text = book.page.locator(".jp-CodeCell").nth(AGAIN).locator(".cm-content")
    text.click()
    book.page.keyboard.press("Control+a")
    book.page.keyboard.type("import nbaccel; nbaccel.last_run().show()")
    book.run(AGAIN)
    wait_for(lambda: "■ stopped" in book.output(AGAIN).inner_text(), 20, "how it ended")
    assert "~/state/nbaccel/runs/" in book.output(AGAIN).inner_text()
