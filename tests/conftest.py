"""Fixtures of the tests on real processes: nothing may be left behind; a real Jupyter kernel."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from jupyter_client import KernelManager

ROOT = str(Path(__file__).resolve().parent.parent)
# Kernels and scripts the tests start find this checkout, installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [ROOT, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def needs(package: str) -> pytest.MarkDecorator:
    """Skips where `package` is not installed. Only looks for it: what the tests' process has imported, every
    server it starts imports too."""
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def wait_until(condition: Callable[[], Any], timeout: float, what: str) -> Any:
    """The first true value of `condition()`; fails after `timeout` seconds."""
    end = time.monotonic() + timeout
    while True:
        if value := condition():
            return value
        assert time.monotonic() < end, f"not in {timeout} s: {what}"
        time.sleep(0.02)


_LAST = ("core", "peers", "compat", "docs", "notebooks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What imports large packages into this process goes last: every server started later imports them too."""

    def turn(item: pytest.Item) -> int:
        folders = item.path.relative_to(ROOT).parts
        return next((place for place, name in enumerate(_LAST, 1) if name in folders[:2]), 0)

    items.sort(key=turn)


# ── processes ─────────────────────────────────────────────────────────────────────────────────────────


def run_processes(pid: int) -> list[psutil.Process]:
    """Processes below `pid` that belong to runs, or to a server that was replaced and has to go.

    Not: each guardian, its server, one template, and one process that waits for the next run.
    """
    found: list[psutil.Process] = []
    for guardian in guardians(pid):
        seen: set[str] = set()
        for process in _below(guardian.pid):
            name, above = _name(process.pid), _name(_parent(process))
            waits = name == "nb-waiting" and above in ("nb-template", "nb-waiting")
            kept = name in ("nb-server", "nb-template") or waits
            # of each one; what waits ahead of its run waits in several processes
            if not kept or (name in seen and above != "nb-waiting"):
                found.append(process)
            seen.add(name)
    return found


def guardians(pid: int) -> list[psutil.Process]:
    """The guardians of process `pid`, warm servers below them."""
    return [child for child in psutil.Process(pid).children() if _is_guardian(child)]


def named(pid: int, name: str) -> list[int]:
    """Processes of ours below `pid` by what they call themselves: "nb-server", "nb-rank-0", …"""
    return [process.pid for process in _below(pid) if _name(process.pid) == name]


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _parent(process: psutil.Process) -> int:
    try:
        return int(process.ppid())
    except psutil.Error:
        return 0


def _is_guardian(process: psutil.Process) -> bool:
    try:
        return "guardian.main" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def _below(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def describe(processes: list[psutil.Process]) -> list[str]:
    """Processes for a message."""
    found = []
    for process in processes:
        try:
            found.append(f"{process.pid} {_name(process.pid)} {process.status()} {process.cmdline()[:3]}")
        except psutil.Error:
            continue
    return found


def gone(pids: list[int]) -> bool:
    """Whether none of these processes runs any more."""
    for pid in pids:
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                return False
        except psutil.Error:
            continue
    return True


# ── nothing left behind ───────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Holdings:
    """What this process and those below it hold."""

    processes: list[str]
    guardians: int
    threads: set[str]
    files: int
    shared_memory: set[str]
    mappings: int
    handlers: dict[str, Any]
    wakeup: int
    environ: dict[str, str]
    cwd: str


_imported: set[str] = set()


def _collect_garbage() -> None:
    """What imports have made is looked through once: with torch it takes half a second each time."""
    gc.collect()
    if fresh := sys.modules.keys() - _imported:
        _imported.update(fresh)
        gc.freeze()


def _holdings() -> _Holdings:
    from nbaccel.engines import forkserver

    _collect_garbage()
    forkserver.close_ended()  # as the next launch would
    maps = Path("/proc/self/maps").read_text()
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    environ = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return _Holdings(
        processes=describe(run_processes(os.getpid())),
        guardians=len(guardians(os.getpid())),
        threads={thread.name for thread in threading.enumerate()},
        files=len(os.listdir("/proc/self/fd")),
        shared_memory={name for name in os.listdir("/dev/shm") if _is_orphan(name)},
        mappings=sum("memfd:nbaccel" in line for line in maps.splitlines()),
        handlers={number.name: signal.getsignal(number) for number in _SIGNALS},
        wakeup=wakeup,
        environ=environ,
        cwd=os.getcwd(),
    )


def _is_orphan(name: str) -> bool:
    """Whether a shared segment may be ours: torch puts its maker's id into the name, and others of this
    machine use the folder too."""
    if name.startswith("torch_"):
        return not Path("/proc", name.split("_")[1]).exists()
    return name.startswith(("nbaccel", "psm_"))


def _differences(before: _Holdings, after: _Holdings) -> list[str]:
    found = []
    if after.processes:
        found.append(f"processes: {after.processes}")
    if after.guardians > max(before.guardians, 2):
        found.append(f"{after.guardians} guardians")
    if extra := after.threads - before.threads:
        found.append(f"threads: {sorted(extra)}")
    if after.files > before.files:
        links = [f"{fd} {_link(fd)}" for fd in os.listdir("/proc/self/fd")]
        found.append(f"{after.files - before.files} descriptors more: {links}")
    if extra := after.shared_memory - before.shared_memory:
        found.append(f"/dev/shm: {sorted(extra)}")
    if after.mappings > before.mappings:
        found.append(f"{after.mappings - before.mappings} memory files mapped")
    for name in ("handlers", "wakeup", "environ", "cwd"):
        if getattr(after, name) != getattr(before, name):
            found.append(f"{name}: {getattr(before, name)} became {getattr(after, name)}")
    return found


def _link(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return "?"


@pytest.fixture(scope="session")
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run folders of the tests do not go to the user's state folder."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def warm(state_home: None) -> Iterator[None]:
    """The warm servers of this process, both start methods, ended when the session ends."""
    from nbaccel import notebook_launcher
    from nbaccel.engines import forkserver

    forkserver.server_for(os.environ, "spawn")
    notebook_launcher(int, num_processes=2)  # the server answers: it has imported everything
    yield
    pids = [process.pid for process in _below(os.getpid()) if _is_guardian(process)]
    pids += [below.pid for pid in pids for below in _below(pid)]
    forkserver.shut_down()
    wait_until(lambda: gone(pids), 30, f"the end of the warm servers: {pids}")


@pytest.fixture
def clean(warm: None) -> Iterator[None]:
    """Fails on a process, thread, descriptor, shared segment or signal handler that a launch left behind."""
    before = _holdings()
    yield
    end = time.monotonic() + 3  # a process that was sent SIGKILL takes a moment to leave
    while (differences := _differences(before, _holdings())) and time.monotonic() < end:
        time.sleep(0.05)
    assert not differences, "left behind:\n" + "\n".join(differences)


# ── a real kernel ─────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Cell:
    """What came of one executed cell."""

    id: str
    stdout: str = ""
    stderr: str = ""
    error: str | None = None
    """Name of the exception's class."""
    traceback: str = ""
    result: str | None = None
    """text/plain of what the cell displays as its value."""
    displays: list[dict[str, Any]] = field(default_factory=list)
    answers: list[str] | None = None
    """What a person would type, question after question; None is a front end without input."""
    asked: list[str] = field(default_factory=list)
    """The prompts it showed."""
    done: bool = False

    @property
    def output(self) -> str:
        """Everything, for a message."""
        return f"{self.stdout}\n{self.stderr}\n{self.traceback}"


class Kernel:
    """A real ipykernel in a process of its own.

    Args:
        cwd: its working folder.
        env: variables on top of this process's.
    """

    def __init__(self, cwd: Path, env: dict[str, str] | None = None) -> None:
        self._manager = KernelManager()
        spec = self._manager.kernel_spec
        assert spec is not None
        quiet = "--IPKernelApp.log_level=40"
        spec.argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", quiet]
        variables = {**os.environ, "IPYTHONDIR": str(cwd / ".ipython"), **(env or {})}
        self._manager.start_kernel(cwd=str(cwd), env=variables, stdout=-3, stderr=-3)
        self._client = self._manager.blocking_client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=60)
        self._cells: dict[str, Cell] = {}
        self.pid: int = self._manager.provisioner.pid  # type: ignore[union-attr,attr-defined]

    def start(self, code: str, answers: list[str] | None = None) -> Cell:
        """Send a cell; `finish` waits for it, and types `answers` where it asks."""
        cell = Cell(id=self._client.execute(code, allow_stdin=answers is not None), answers=answers)
        self._cells[cell.id] = cell
        return cell

    def finish(self, cell: Cell, timeout: float = 60) -> Cell:
        """Wait until a cell is done."""
        self.pump(lambda: cell.done, timeout, f"the cell to end; so far:\n{cell.output}")
        return cell

    def run(self, code: str, timeout: float = 60, answers: list[str] | None = None) -> Cell:
        """Execute a cell to its end, whatever that is."""
        return self.finish(self.start(code, answers), timeout)

    def ok(self, code: str, timeout: float = 60, answers: list[str] | None = None) -> Cell:
        """Execute a cell that must not raise."""
        cell = self.run(code, timeout, answers)
        assert cell.error is None, cell.output
        return cell

    def pump(self, condition: Callable[[], Any], timeout: float, what: str = "it") -> None:
        """Take messages in until `condition()` is true."""
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, f"not in {timeout} s: {what}"
            self._answer()
            try:
                message = self._client.get_iopub_msg(timeout=0.05)
            except Exception as error:  # jupyter_client raises queue.Empty, by way of asyncio
                if type(error).__name__ != "Empty":
                    raise
                continue
            cell = self._cells.get(message["parent_header"].get("msg_id", ""))
            if cell is not None:
                _take(cell, message["msg_type"], message["content"])

    def _answer(self) -> None:
        """Type the next answer if a cell asks."""
        if not any(cell.answers is not None and not cell.done for cell in self._cells.values()):
            return
        try:
            question = self._client.get_stdin_msg(timeout=0.01)
        except Exception as error:
            if type(error).__name__ != "Empty":
                raise
            return
        cell = self._cells[question["parent_header"]["msg_id"]]
        cell.asked.append(question["content"]["prompt"])
        if cell.answers:  # else the person thinks
            self._client.input(cell.answers.pop(0))

    def settle(self, seconds: float = 0.3) -> None:
        """Take in what comes during this time."""
        end = time.monotonic() + seconds
        self.pump(lambda: time.monotonic() > end, seconds + 5)

    def connect(self) -> Any:
        """Another client, as of a page that is loaded later; who has it stops its channels."""
        client = self._manager.blocking_client()
        client.start_channels()
        return client

    def interrupt(self) -> None:
        """What ■ does."""
        self._manager.interrupt_kernel()

    def kill(self) -> None:
        """SIGKILL the kernel's process."""
        os.kill(self.pid, signal.SIGKILL)

    def processes(self) -> list[psutil.Process]:
        """Everything below the kernel."""
        return _below(self.pid)

    def close(self) -> None:
        """End it, and check that nothing of it stays."""
        below = [process.pid for process in self.processes()]
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)
        self._manager.cleanup_resources()
        wait_until(lambda: gone(below), 30, f"the end of everything below the kernel: {below}")


def _take(cell: Cell, kind: str, content: dict[str, Any]) -> None:
    if kind == "stream":
        setattr(cell, content["name"], getattr(cell, content["name"]) + content["text"])
    elif kind == "error":
        cell.error = content["ename"]
        cell.traceback = "\n".join(content["traceback"])
    elif kind == "execute_result":
        cell.result = content["data"].get("text/plain")
    elif kind in ("display_data", "update_display_data"):
        cell.displays.append(content["data"])
    elif kind == "status" and content["execution_state"] == "idle":
        cell.done = True


@pytest.fixture
def new_kernel(tmp_path: Path, state_home: None) -> Iterator[Callable[..., Kernel]]:
    """Starts kernels: `new_kernel(env={...})`."""
    kernels: list[Kernel] = []

    def start(**options: Any) -> Kernel:
        folder = tmp_path / f"kernel-{len(kernels)}"
        folder.mkdir()
        kernels.append(Kernel(folder, **options))
        return kernels[-1]

    yield start
    for kernel in kernels:
        kernel.close()


def warm_kernel(folder: Path) -> Iterator[Kernel]:
    """A kernel, nbaccel's two functions imported and the server warm."""
    started = Kernel(folder)
    started.ok("from nbaccel import notebook_launcher, launch")
    started.ok("notebook_launcher(lambda: None, num_processes=2)", timeout=120)
    yield started
    started.close()


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory, state_home: None) -> Iterator[Kernel]:
    """One kernel for the tests of a module."""
    yield from warm_kernel(tmp_path_factory.mktemp("kernel"))
