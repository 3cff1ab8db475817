"""The lock of a compilation that was killed, and that of one that goes on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from nbaccel.core import async_io


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Those torch compiles in, with a lock in each."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    found = [async_io._built(name).parent for name in async_io._PARTS]
    for folder in found:
        (folder / "lock").touch()
    return found


def test_lock_when_its_compiler_was_killed_is_removed(
    folders: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    for folder in folders:
        (folder / "compiled-by").write_text(f"{platform.node()} {ended.pid}")
    async_io._remove_left_locks()
    assert [(folder / "lock").exists() for folder in folders] == [False, False]
    assert (folders[0] / "compiled-by").read_text() == f"{platform.node()} {os.getpid()}"
    assert "nobody compiles" in capsys.readouterr().out


@pytest.mark.parametrize(
    "note",
    [None, f"{platform.node()} {os.getpid()}", "elsewhere 99999999"],
    ids=["nobody noted", "this process", "another host"],
)
def test_lock_when_somebody_may_still_compile_stays(folders: list[Path], note: str | None) -> None:
    for folder in folders:
        if note is not None:
            (folder / "compiled-by").write_text(note)
    async_io._remove_left_locks()
    assert [(folder / "lock").exists() for folder in folders] == [True, True]
    for folder in folders:
        for file in folder.glob("*"):
            os.utime(file, (1, 1))
    async_io._remove_left_locks()
    assert [(folder / "lock").exists() for folder in folders] == [False, False]
