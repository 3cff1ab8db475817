"""What a server learns of the notebook's process."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from nbaccel.engines import forkserver
from nbaccel.engines.forkserver import ForkServer


class NotYetLoaded:
    """Stands for a module until something of it is used."""

    def __getattr__(self, name: str) -> Any:
        raise ImportError(f"{name} needs what is not installed")


def test_server_starts_when_paths_and_modules_are_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])
    monkeypatch.setitem(sys.modules, "not_yet_loaded", NotYetLoaded())
    server = ForkServer(os.environ, "spawn")
    try:
        server.preload()
        assert server.outdated(os.environ) is None
    finally:
        server.close()


def test_server_is_outdated_when_a_package_it_imports_was_installed_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nb_upgraded.py").write_text("version = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(forkserver, "_site_folders", lambda: (str(tmp_path) + os.sep,))
    import nb_upgraded  # type: ignore[import-not-found]

    assert nb_upgraded.version == 1
    server = ForkServer(os.environ, "fork")
    try:
        server.preload()
        assert server.outdated(os.environ) is None
        (tmp_path / "nb_upgraded.py").write_text("version = '1.1'")
        assert server.outdated(os.environ) == "nb_upgraded changed on disk"
    finally:
        server.close()
        sys.modules.pop("nb_upgraded")
