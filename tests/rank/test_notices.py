"""Loggers and warnings are in a rank what they are in the notebook."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from nbaccel.rank.notices import read_notices

SCRIPT = """
import logging, sys, warnings
from nbaccel import notebook_launcher

logging.basicConfig(level=logging.INFO, format="NB %(name)s %(message)s")
own = logging.getLogger("own")
own.setLevel(logging.DEBUG)
own.propagate = False
printer = logging.StreamHandler(sys.stdout)
printer.setFormatter(logging.Formatter("{levelname}|{message}", style="{"))
own.addHandler(printer)
odd = logging.getLogger("odd")
odd.propagate = False
odd.addHandler(logging.StreamHandler())
odd.handlers[0].setFormatter(logging.Formatter("%(place)s %(message)s"))
logging.getLogger("quiet").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=DeprecationWarning)
warnings.filterwarnings("ignore", "hush")
warnings.filterwarnings("error", "strict")

def train(size):
    logging.getLogger("__main__").info("epoch %d", len(size))
    logging.getLogger("__main__").debug("unseen")
    logging.getLogger("quiet").warning("unseen")
    own.debug("detail")
    odd.error("no place")
    warnings.warn("old", DeprecationWarning)
    for text in ("hush", "strict", "new"):
        warnings.warn(text)

if __name__ == "__main__":
    notebook_launcher(train, (b"",), num_processes=1, device="cpu", folder=False)
    notebook_launcher(train, (bytes(2_000_000),), num_processes=2, device="cpu", folder=False, output="rank0")
"""


def test_loggers_and_warning_filters_of_the_notebook_hold_in_ranks(tmp_path: Path) -> None:
    script = tmp_path / "logs.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path
    )
    said = done.stderr.splitlines()
    assert done.stdout.splitlines() == ["DEBUG|detail"] * 2
    # the second launch's arguments are opened before its ranks are forked
    for text in ("NB __main__ epoch 0", "NB __main__ epoch 2000000", "no place", "no place"):
        said.remove(text)
    assert [line.partition("UserWarning: ")[2] for line in said if "Warning" in line] == ["strict", "new"] * 2
    assert "unseen" not in done.stderr
    assert "Logging error" not in done.stderr


def test_what_cannot_be_printed_by_a_rank_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("of_a_file")
    monkeypatch.setattr(logger, "handlers", [logging.NullHandler(), logging.StreamHandler(io.StringIO())])
    monkeypatch.setattr(logger, "level", logging.DEBUG)
    sent = dict(read_notices().loggers)
    assert sent["of_a_file"].level == logging.DEBUG
    assert sent["of_a_file"].printers == ()
    assert "of_a_file" not in dict(read_notices(["OF_A_FILE_LOGS"]).loggers)
