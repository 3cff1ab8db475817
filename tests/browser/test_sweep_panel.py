"""`nbaccel.map` and `nbaccel.compare` in a real JupyterLab."""

from __future__ import annotations

from typing import Any

import pytest

from tests.browser.test_panel import shot, wait_for

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(240)]

SETUP = """
import time, nbaccel, torch
def train(lr, width):
    acc = nbaccel.Accelerator(cpu=True)
    if lr == 0.3:
        raise ValueError("diverged")
    model = torch.nn.Linear(1, width)
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=lr / 10))
    for step in range(3000):
        loss = (model(torch.ones(1, 1)) - 1).square().mean()
        acc.step(loss, optimizer)
        acc.log({"loss": loss}, step=step)
        time.sleep(0.02)
        if acc.should_stop or (lr == 0.1 and step == 60):
            break
    return {"steps": step + 1}
nbaccel.notebook_launcher(int, num_processes=2, device="cpu")
"""
MAP = """
results = nbaccel.map(train, {"lr": [0.3, 0.1, 0.2], "width": [1, 2]}, parallel=2, device="cpu")
print([value and value["steps"] < 2000 for value in results], [trial.state for trial in results.trials])
"""
COMPARE = "nbaccel.compare(results.trials[2].run, results.trials[4].run)"


def test_sweep_has_a_row_per_trial_and_one_stop_and_runs_are_compared(open_page: Any) -> None:
    page = open_page("sweep.ipynb", SETUP, MAP, COMPARE)
    page.run(0, timeout=90)
    output = page.output(1)
    page.start(1)
    output.locator("button", has_text="Stop").wait_for(timeout=20_000)
    wait_for(
        lambda: "2 done" in output.inner_text() and "2 running" in output.inner_text(), 90, "two trials done"
    )
    wait_for(lambda: output.inner_text().count("loss") >= 4, 20, "a metric of each")
    shot(page, "sweep-running", 1)
    output.locator("button", has_text="Stop").click()
    page.done(1, timeout=60)
    wait_for(lambda: "[None, None, True, True," in output.inner_text(), 20, "the cell's own word")
    text = output.inner_text()
    assert "6 trials:" in text
    assert "ValueError: diverged" in text
    assert output.locator("button").count() == 0
    shot(page, "sweep", 1)
    page.run(2, timeout=30)
    shown = page.output(2)
    wait_for(lambda: "what differs" in shown.inner_text(), 20, "the comparison")
    assert {"argument.lr", "0.1", "0.2"} <= set(shown.inner_text().split())
    shot(page, "compare", 2)
