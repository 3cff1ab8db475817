"""The live table in a terminal of its own."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import ROOT

SCRIPT = """
import time
from nbaccel import notebook_launcher

def work():
    from tqdm import tqdm
    for step in tqdm(range(60), desc="train"):
        if step % 20 == 0:
            print("at", step, flush=True)
        time.sleep(0.03)

notebook_launcher(work, num_processes=2)
print("after")
"""


def test_table_is_painted_below_the_lines_and_ends_as_text(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    main, terminal = pty.openpty()
    env = {
        **os.environ,
        "XDG_STATE_HOME": str(tmp_path),
        "PYTHONPATH": ROOT,
        "TERM": "xterm",
        "COLUMNS": "100",
    }
    process = subprocess.Popen(
        [sys.executable, str(script)], stdin=terminal, stdout=terminal, stderr=terminal, env=env
    )
    os.close(terminal)
    shown, end = b"", time.monotonic() + 100
    while time.monotonic() < end:
        if select.select([main], [], [], 1)[0]:
            try:
                shown += os.read(main, 1 << 16)
            except OSError:  # the terminal's last user has gone
                break
    os.close(main)
    assert process.wait(timeout=30) == 0, shown
    text = shown.decode()
    assert "work · 2 ranks on cpu · running" in text
    assert "[ranks 0-1] at 40" in text or "[rank 0] at 40" in text
    ending = text[text.rfind("\x1b[") :].replace("\r", "")
    assert "work · 2 ranks on cpu · done" in ending
    assert "train 60/60" in ending
    assert ending.endswith("after\n")
