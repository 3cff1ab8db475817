"""A real JupyterLab and a real Chromium: what a person sees."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)

PATIENCE = 180.0
"""Seconds; a bound on what hangs, for a machine that does much else."""


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of `condition()`."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, f"not in {PATIENCE} s: {what}"
        time.sleep(0.2)  # the page, the browser and its driver work for each look
    return value


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [
        name
        for name, there in (("Chromium", CHROMIUM), ("playwright", importlib.util.find_spec("playwright")))
        if not there
    ]
    if missing:
        mark = pytest.mark.skip(
            reason=f"no {' nor '.join(missing)} on this machine: make test-browser installs them"
        )
        for item in items:
            if Path(item.path).parent == Path(__file__).parent:
                item.add_marker(mark)


class Lab:
    """A JupyterLab server of its own, trusting nothing but what is said here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.token = secrets.token_hex(8)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        settings = folder / "settings"
        plugins = {
            "apputils-extension/themes": {"theme": "JupyterLab Light"},
            "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
            "docmanager-extension/plugin": {"autosave": False},
        }
        for name, values in plugins.items():
            path = settings / "@jupyterlab" / f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values))
        env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
            "HOME": str(folder),
            "IPYTHONDIR": str(folder / ".ipython"),
            "XDG_STATE_HOME": str(folder / "state"),
            "JUPYTERLAB_SETTINGS_DIR": str(settings),
            "JUPYTER_CONFIG_DIR": str(folder / "config"),
            "JUPYTER_DATA_DIR": str(folder / "data"),
            "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
            "JUPYTER_PREFER_ENV_PATH": "1",
            # another ipykernel than this environment's may stand first: make test-ipykernel6
            "PYTHONPATH": os.pathsep.join(
                filter(None, [os.environ.get("NBACCEL_KERNEL"), os.environ.get("NBACCEL_TREE", str(ROOT))])
            ),
        }
        command = [
            sys.executable,
            "-m",
            "jupyter",
            "lab",
            "--no-browser",
            "--allow-root",
            f"--port={self.port}",
        ]
        options = [f"--IdentityProvider.token={self.token}", f"--ServerApp.root_dir={folder / 'work'}"]
        (folder / "work").mkdir()
        self.log = (folder / "lab.log").open("wb")
        self.process = subprocess.Popen(
            [*command, *options], env=env, stdout=self.log, stderr=self.log, cwd=folder
        )
        self.url = f"http://127.0.0.1:{self.port}"
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/api?token={self.token}", timeout=5):
                    return
            except OSError:
                assert self.process.poll() is None, (self.folder / "lab.log").read_text()
                assert time.monotonic() < end, f"JupyterLab did not answer in {PATIENCE} s"
                time.sleep(0.2)

    def notebook(self, name: str, *cells: str) -> Path:
        """A notebook with these cells, in the server's folder."""
        kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
        book = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata={"kernelspec": kernel}
        )
        path = self.folder / "work" / name
        nbformat.write(book, path)
        return path

    def theme(self, name: str) -> None:
        """The theme of pages that are loaded from now on."""
        path = self.folder / "settings" / "@jupyterlab" / "apputils-extension" / "themes.jupyterlab-settings"
        path.write_text(json.dumps({"theme": name}))

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


# Of a module, not of the session: the browser's driver keeps an event loop running, and the server's kernels
# have launches of their own.


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One server for a module's tests."""
    server = Lab(tmp_path_factory.mktemp("lab"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


class Page:
    """A notebook open in the browser; `app`: in JupyterLab ("doc/tree") or Notebook 7 ("notebooks")."""

    def __init__(
        self,
        lab: Lab,
        browser: Any,
        path: Path,
        *,
        app: Literal["doc/tree", "notebooks"] = "doc/tree",
        start_kernel: bool = True,
        width: int = 1100,
        height: int = 900,
    ) -> None:
        self.lab, self.path, self.app, self.start_kernel = lab, path, app, start_kernel
        self.page = browser.new_page(viewport={"width": width, "height": height})
        self.page.set_default_timeout(PATIENCE * 1000)
        self.reopen()

    def reopen(self) -> None:
        """Load the notebook afresh; its kernel goes on."""
        self.page.goto(f"{self.lab.url}/{self.app}/{self.path.name}?reset&token={self.lab.token}")
        self.loaded()

    def loaded(self) -> None:
        """Wait for the notebook, and its kernel if it is to be used."""
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        if self.start_kernel:
            self.ready()

    def ready(self) -> None:
        """Wait for the kernel: a cell that is run before is not run at all."""
        # attached: a narrow page has no room for it
        self.page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', state="attached")

    def cell(self, index: int) -> Any:
        return self.page.locator(".jp-CodeCell").nth(index)

    def output(self, index: int) -> Any:
        return self.cell(index).locator(".jp-OutputArea")

    def start(self, index: int) -> None:
        """Run a cell; do not wait. A page that is still loading takes no keys: they are pressed again."""
        cell = self.cell(index)
        prompt, before = cell.locator(".jp-InputPrompt"), cell.locator(".jp-InputPrompt").inner_text()
        for _ in range(20):
            self.answer()
            cell.locator(".cm-content").click(position={"x": 5, "y": 5})
            self.page.keyboard.press("Control+Enter")
            for _ in range(60):  # keys that only come late are not pressed twice
                if prompt.inner_text() != before:
                    return
                self.page.wait_for_timeout(50)
        raise AssertionError(f"cell {index} does not start")

    def answer(self) -> None:
        """Take what a dialog of JupyterLab's own proposes: on a slow machine it asks about its server or a kernel."""
        dialog = self.page.locator(".jp-Dialog")
        while dialog.count():
            print("JupyterLab asks:", dialog.first.inner_text())
            dialog.first.locator(".jp-mod-accept").click()
            self.page.wait_for_timeout(200)

    def write(self, index: int, code: str) -> None:
        """Type a cell's code instead of what it holds."""
        self.cell(index).locator(".cm-content").click()
        self.page.keyboard.press("Control+a")
        self.page.keyboard.type(code)

    def run(self, index: int) -> None:
        """Run a cell and wait for its number."""
        self.start(index)
        self.done(index)

    def done(self, index: int) -> None:
        """Wait until a cell that was started has its number."""
        end = time.monotonic() + PATIENCE
        prompt = self.cell(index).locator(".jp-InputPrompt")
        while True:
            text = prompt.inner_text()
            if text.strip("[]: ").isdigit():
                return
            if text.strip("[]: ") == "":  # the page was still connecting, and has forgotten it
                self.page.wait_for_timeout(1000)
                self.start(index)
            assert time.monotonic() < end, (
                f"cell {index} did not end: {text!r}\n{self.output(index).inner_text()}"
            )
            time.sleep(0.2)

    def save(self) -> None:
        """Save the notebook, and wait until it is written, or is found to be as it was."""
        before, end = self.path.stat().st_mtime_ns, time.monotonic() + 20
        self.page.keyboard.press("Escape")
        self.page.keyboard.press("Control+s")
        while self.path.stat().st_mtime_ns == before and time.monotonic() < end:
            self.page.wait_for_timeout(50)
        while not self._is_whole():
            assert time.monotonic() < end + PATIENCE, "the notebook is not written"
            self.page.wait_for_timeout(50)

    def _is_whole(self) -> bool:
        try:
            return bool(json.loads(self.path.read_text()))
        except ValueError:
            return False  # it is being written

    def shot(self, path: Path | str, index: int | None = None) -> None:
        target = self.page if index is None else self.cell(index)
        target.screenshot(path=str(path))

    def close(self) -> None:
        self.page.close()


@pytest.fixture
def open_page(lab: Lab, browser: Any) -> Iterator[Any]:
    """Opens notebooks: `open_page("name.ipynb", cell, …)`, or one that is there already."""
    pages: list[Page] = []

    def open_(name: str, *cells: str, **options: Any) -> Page:
        path = lab.notebook(name, *cells) if cells else lab.folder / "work" / name
        pages.append(Page(lab, browser, path, **options))
        return pages[-1]

    yield open_
    for page in pages:
        page.close()
