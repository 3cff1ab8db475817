"""The same panel in Notebook 7, which shows one notebook per page."""

from __future__ import annotations

from typing import Any

import pytest

from tests.browser.test_panel import CELLS, FAIL, RUN, SETUP, STOP, shot, wait_for

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(180)]


def test_launches_run_stop_and_fail_in_notebook_7(open_page: Any) -> None:
    page = open_page("classic.ipynb", SETUP, CELLS[RUN], CELLS[STOP], CELLS[FAIL], app="notebooks")
    page.run(0, timeout=75)
    assert page.page.locator("#notebook-container, .jp-NotebookPanel").count() == 1
    ran = page.output(RUN)
    page.start(RUN)
    wait_for(lambda: "/90" in ran.inner_text(), 10, "a bar")
    page.done(RUN)
    wait_for(lambda: "done" in ran.inner_text(), 5, "the last form")
    stopped = page.output(STOP)
    page.start(STOP)
    button = stopped.locator("button", has_text="Stop")
    button.wait_for(timeout=15_000)
    button.click()
    page.done(STOP, timeout=15)
    wait_for(lambda: "stopped" in stopped.inner_text(), 5, "the cell's own word")
    page.run(FAIL)
    wait_for(lambda: "no such" in page.output(FAIL).inner_text(), 5, "the error")
    shot(page, "notebook-7", FAIL)
