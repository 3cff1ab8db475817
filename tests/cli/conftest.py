"""The command in this very process, so that its runs find the warm server; and scripts for it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest


@dataclass(frozen=True)
class Outcome:
    """What a command left."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]
Writer = Callable[..., str]


def said_by(output: str, words: str) -> set[int]:
    """The ranks that printed a line with these words, however the lines were folded."""
    found: set[int] = set()
    for line in output.splitlines():
        label = re.match(r"\[ranks? ([\d,-]+)\] ", line)
        if words in line and label:
            for part in label[1].split(","):
                first, _, last = part.partition("-")
                found.update(range(int(first), int(last or first) + 1))
    return found


@pytest.fixture
def nbaccel(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """`nbaccel("launch", …)` in an empty folder and an empty home, on the CPU."""
    from nbaccel.cli.main import main

    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(sys, "path", ["", *sys.path])

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(int(left.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def script(nbaccel: Command) -> Writer:
    """`script(text)` writes a script into the working folder; its name."""

    def write(text: str, name: str = "train.py") -> str:
        Path(name).write_text(dedent(text), encoding="utf-8")
        return name

    return write
