"""A page that is loaded while a cell blocks the kernel: it is told of the panel through its widgets."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.conftest import Kernel

pytestmark = pytest.mark.kernel

WORK = """
import time
from nbaccel import notebook_launcher
def work():
    from tqdm import tqdm
    for _ in tqdm(range(1200), desc="bar"):
        time.sleep(0.05)
"""
VIEW = "application/vnd.jupyter.widget-view+json"


def test_page_loaded_while_a_cell_blocks_is_answered_and_told_the_whole_panel(kernel: Kernel) -> None:
    kernel.ok(WORK)
    cell = kernel.start("notebook_launcher(work, num_processes=2, dashboard=True)")
    kernel.pump(lambda: any(VIEW in data for data in cell.displays), 30, "the controls")
    kernel.pump(lambda: "/1200" in cell.displays[-1].get("text/html", ""), 30, "a bar")
    box = next(data[VIEW]["model_id"] for data in cell.displays if VIEW in data)
    page = kernel.connect()
    try:
        page.kernel_info()
        assert page.get_shell_msg(timeout=20)["msg_type"] == "kernel_info_reply"
        states = asked_for(page)
        inside = states[box]["state"]["children"]
        above, below = (states[inside[at].removeprefix("IPY_MODEL_")]["state"]["value"] for at in (0, -1))
        assert "● running" in above
        assert below.count("/1200") == 2
        later = page.execute("'after it'")
    finally:
        kernel.interrupt()
        kernel.finish(cell, 30)
    assert cell.error == "KeyboardInterrupt"
    reply = page.get_shell_msg(timeout=20)
    while reply["msg_type"] != "execute_reply":
        reply = page.get_shell_msg(timeout=20)
    assert reply["parent_header"]["msg_id"] == later, "what is not ours waited its turn"
    states = asked_for(page)
    (header, _) = states[box]["state"]["children"]
    assert "■ stopped" in states[header.removeprefix("IPY_MODEL_")]["state"]["value"], "its last form stays"
    page.stop_channels()


def asked_for(page: Any) -> dict[str, Any]:
    """What the kernel's widgets are, asked as ipywidgets' front end asks."""
    comm = f"control-{time.monotonic()}"
    content: dict[str, Any] = {"comm_id": comm, "target_name": "jupyter.widget.control", "data": {}}
    version = {"version": "1.0.0"}
    page.shell_channel.send(page.session.msg("comm_open", content, metadata=version))
    asked = {"comm_id": comm, "data": {"method": "request_states"}}
    page.shell_channel.send(page.session.msg("comm_msg", asked))
    while True:
        message = page.get_iopub_msg(timeout=20)
        if message["msg_type"] == "comm_msg" and message["content"]["comm_id"] == comm:
            return dict(message["content"]["data"]["states"])
