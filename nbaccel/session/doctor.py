"""What on this machine breaks launches from notebooks, and what to do about it; one function a check.

Nothing is changed here. What could be ended (ranks of dead kernels) is ended only when asked, and exactly
those processes: each is looked at again first, by its start time.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, final

from nbaccel.errors import PayloadError
from nbaccel.session.accelerators import Accelerators
from nbaccel.wire import payload

__all__ = [
    "Check",
    "Idle",
    "Leftover",
    "Report",
    "check_accelerators",
    "check_front_end",
    "check_function",
    "check_leftovers",
    "check_nccl",
    "check_packages",
    "check_sessions",
    "check_shared_memory",
    "check_tpu_variables",
    "find_leftovers",
]

_MARKS = {"ok": "✓", "note": "·", "problem": "✗"}
_SMALL = 1 << 30
_LONG = 600.0
"""Seconds without a call after which a session that holds a device is worth a word."""
_TPU_VARIABLES = (
    "TPU_PROCESS_ADDRESSES",
    "CLOUD_TPU_TASK_ID",
    "XRT_TPU_CONFIG",
    "TPU_VISIBLE_CHIPS",
    "TPU_NAME",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: Literal["ok", "note", "problem"]
    text: str
    advice: str = ""
    """What to do; empty when there is nothing to do."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """A process of a kernel that is dead."""

    pid: int
    name: str
    started: int
    """Its start, in clock ticks since boot: with the pid it is one process and no other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Idle:
    """A session that has nothing to do."""

    name: str
    device: str
    seconds: float
    """Since its last call ended."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the doctor found; its `repr` is for a person."""

    checks: tuple[Check, ...]
    leftovers: tuple[Leftover, ...] = ()

    @property
    def problems(self) -> tuple[Check, ...]:
        """What needs something done."""
        return tuple(check for check in self.checks if check.status == "problem")

    def end_leftovers(self) -> int:
        """SIGKILL the processes in `leftovers` that are still the same ones; how many there were."""
        return sum(_end(one) for one in self.leftovers)

    def __repr__(self) -> str:
        lines = []
        for check in self.checks:
            lines.append(f"{_MARKS[check.status]} {check.name}: {check.text}")
            if check.advice:
                lines.append(f"    {check.advice}")
        return "\n".join(lines)


# ── accelerators ──────────────────────────────────────────────────────────────────────────────────────


def check_accelerators(
    found: Accelerators, torch_cuda: str | None, driver_cuda: tuple[int, int] | None
) -> Check:
    """Whether the installed torch can use what is here.

    Args:
        torch_cuda: the CUDA version torch was built for, as "12.6"; None when it is not known.
        driver_cuda: the newest CUDA the driver knows; None when it is not known.
    """
    name = "accelerators"
    here = f"{len(found.gpus)} GPU(s)" if found.gpus else "none (CPU)"
    if found.gpus and found.torch_build == "cpu":
        return Check(
            name=name,
            status="problem",
            text=f"{here}, but torch {found.torch_version} is a CPU build",
            advice="install a CUDA build of torch (pytorch.org/get-started), then restart the kernel",
        )
    if torch_cuda and driver_cuda and int(torch_cuda.split(".")[0]) > driver_cuda[0]:
        return Check(
            name=name,
            status="problem",
            text=f"torch was built for CUDA {torch_cuda}; the driver knows {driver_cuda[0]}.{driver_cuda[1]} at most",
            advice="install a torch built for an older CUDA, or a newer NVIDIA driver",
        )
    return Check(
        name=name, status="ok", text=f"{here}; torch {found.torch_version} ({found.torch_build} build)"
    )


def check_nccl(variables: Mapping[str, str], maps: str) -> Check:
    """Whether torch will load the NCCL it came with.

    Args:
        maps: /proc/self/maps.
    """
    name = "NCCL"
    loaded = sorted(set(re.findall(r"/\S*libnccl\S*", maps)))
    if len(loaded) > 1:
        return Check(
            name=name,
            status="problem",
            text=f"{len(loaded)} NCCL libraries are loaded: {', '.join(loaded)}",
            advice="remove one of them, most often the system's from LD_LIBRARY_PATH, and restart the kernel",
        )
    folders = variables.get("LD_LIBRARY_PATH", "").split(":")
    stray = [folder for folder in folders if folder and any(Path(folder).glob("libnccl.so*"))]
    preloaded = [part for part in variables.get("LD_PRELOAD", "").split(":") if "libnccl" in part]
    if stray or preloaded:
        where = f"LD_LIBRARY_PATH: {stray[0]}" if stray else f"LD_PRELOAD: {preloaded[0]}"
        return Check(
            name=name,
            status="note",
            text=f"another NCCL comes before torch's own ({where})",
            advice="if ranks fail in their first collective, take it out and restart the kernel",
        )
    return Check(
        name=name, status="ok", text=loaded[0] if loaded else "none loaded here; torch brings its own"
    )


def mapped_files() -> str:
    """What this process has mapped, for `check_nccl`; empty where /proc does not tell."""
    try:
        return Path("/proc/self/maps").read_text()
    except OSError:
        return ""


def check_tpu_variables(variables: Mapping[str, str], tpu_chips: int) -> Check:
    """Variables of a TPU runtime that is not there, which make libraries look for it."""
    name = "TPU variables"
    stale = [key for key in _TPU_VARIABLES if key in variables]
    if variables.get("PJRT_DEVICE", "").upper() == "TPU":
        stale.append("PJRT_DEVICE")
    if tpu_chips or not stale:
        return Check(name=name, status="ok", text=f"{tpu_chips} chips" if tpu_chips else "none set")
    return Check(
        name=name,
        status="problem",
        text=f"{', '.join(stale)} set, but there is no TPU here",
        advice="; ".join(f"del os.environ[{key!r}]" for key in stale),
    )


# ── this process ──────────────────────────────────────────────────────────────────────────────────────


def check_front_end(kernel: str) -> Check:
    """The versions of what shows us in a notebook."""
    name = "front end"
    versions = {package: _version(package) for package in ("ipykernel", "ipywidgets", "IPython")}
    told = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    old = [
        f"{package} {versions[package]} is too old: pip install -U {package}"
        for package, least in (("ipykernel", 6), ("ipywidgets", 8), ("IPython", 8))
        if versions[package] and int(re.match(r"\d+", str(versions[package]))[0]) < least  # type: ignore[index]
    ]
    if old:
        return Check(name=name, status="problem", text=told, advice="; ".join(old))
    return Check(name=name, status="ok", text=f"{kernel}: {told}")


def check_packages(modules: Mapping[str, ModuleType]) -> Check:
    """Packages that were installed again since this process imported them: ranks import the new ones."""
    name = "packages"
    changed = []
    for top, module in sorted(modules.items()):
        if "." in top or "-packages" not in (getattr(module, "__file__", None) or ""):
            continue
        have = vars(module).get("__version__")  # some warn when they are asked
        there = _version(top)
        if isinstance(have, str) and there and _plain(have) != _plain(there):
            changed.append(f"{top} ({have} in this kernel, {there} on disk)")
    if not changed:
        return Check(name=name, status="ok", text="as they are on disk")
    return Check(
        name=name,
        status="problem",
        text=f"changed on disk since they were imported here: {', '.join(changed)}",
        advice="restart the kernel: the ranks import what is on disk, this kernel has the old one",
    )


def check_function(function: Callable[..., Any]) -> Check:
    """Whether a function, with the globals it uses, can travel to ranks."""
    name = f"function {getattr(function, '__name__', type(function).__name__)}"
    try:
        parcel, fd = payload.pack((function, (), {}), outward=True)
    except PayloadError as error:
        return Check(name=name, status="problem", text=str(error))
    size = parcel.inline and len(parcel.inline)
    if fd is not None:
        size = os.fstat(fd).st_size
        os.close(fd)
    return Check(name=name, status="ok", text=f"can be sent to ranks ({(size or 0) / 1e3:.0f} kB)")


# ── the machine ───────────────────────────────────────────────────────────────────────────────────────


def check_shared_memory(free: int | None, total: int | None, folder: Path = Path("/dev/shm")) -> Check:
    """Room for DataLoader workers, and what dead processes left in it."""
    name = "shared memory"
    orphans = list(_orphans(folder))
    size = sum(count for _, count in orphans)
    if size > _SMALL // 8:
        names = " ".join(str(path) for path, _ in orphans[:4])
        return Check(
            name=name,
            status="problem",
            text=f"{size / 1e6:.0f} MB of {folder} belong to processes that are gone",
            advice=f"rm {names}{' …' if len(orphans) > 4 else ''}",
        )
    if free is not None and free < _SMALL:
        return Check(
            name=name,
            status="note",
            text=f"{free / 1e6:.0f} MB free in {folder}: DataLoader workers may end with a bus error",
            advice="num_workers=0, or give the container more (docker run --shm-size=1g)",
        )
    told = "" if free is None or total is None else f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    return Check(name=name, status="ok", text=told or "not on this platform")


def shared_memory_here() -> Check:
    """`check_shared_memory` of this machine."""
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return check_shared_memory(None, None)
    return check_shared_memory(usage.free, usage.total)


def _orphans(folder: Path) -> Iterator[tuple[Path, int]]:
    """Segments of this user whose maker is gone: torch writes its process id into the name."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    for path in entries:
        maker = re.match(r"torch_(\d+)_", path.name)
        try:
            status = path.stat()
        except OSError:
            continue
        if maker and status.st_uid == os.getuid() and not Path(f"/proc/{maker[1]}").exists():
            yield path, status.st_size


def check_sessions(idle: Sequence[Idle]) -> Check:
    """Sessions of this kernel that hold an accelerator and have had nothing to do for long."""
    name = "sessions"
    told = ", ".join(f"{one.name!r} on {one.device}, idle for {one.seconds / 60:.0f} min" for one in idle)
    if not any(one.device != "cpu" and one.seconds > _LONG for one in idle):
        return Check(name=name, status="ok", text=told or "none is idle")
    return Check(
        name=name,
        status="note",
        text=f"{told}: its ranks hold the device's memory",
        advice='%nbaccel stop or close() ends it; idle_stop="30min" does so by itself',
    )


def check_leftovers(leftovers: tuple[Leftover, ...], gpu_memory: Mapping[int, int]) -> Check:
    """Ranks that outlived their kernel.

    Args:
        gpu_memory: bytes by process, as far as the driver tells.
    """
    name = "leftover ranks"
    if not leftovers:
        return Check(name=name, status="ok", text="none")
    held = {one.pid: gpu_memory.get(one.pid, 0) for one in leftovers}
    told = ", ".join(
        f"{one.name} (pid {one.pid}{f', {held[one.pid] / 1e6:.0f} MB of a GPU' if held[one.pid] else ''})"
        for one in sorted(leftovers, key=lambda one: -held[one.pid])[:6]
    )
    return Check(
        name=name,
        status="problem",
        text=f"{len(leftovers)} processes of kernels that are gone: {told}",
        advice="nbaccel.doctor().end_leftovers() ends exactly these",
    )


def find_leftovers(proc: Path = Path("/proc")) -> tuple[Leftover, ...]:
    """This user's processes of ours whose kernel is gone. Normally the guardian has ended them."""
    table = {int(path.name): path for path in proc.iterdir() if path.name.isdigit()}
    names, parents = {}, {}
    for pid, path in table.items():
        try:
            if path.stat().st_uid != os.getuid():
                continue
            names[pid] = (path / "comm").read_text().strip()
            parents[pid] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue  # it ended while we looked
    found = []
    for pid, called in names.items():
        if called.startswith("nb-") and not _has_kernel(pid, names, parents, proc):
            started = _started(pid, proc)
            if started is not None:
                found.append(Leftover(pid, called, started))
    return tuple(found)


def _has_kernel(pid: int, names: Mapping[int, str], parents: Mapping[int, int], proc: Path) -> bool:
    """Whether the guardian above it lives, and the notebook's process that it guards for."""
    while pid > 1 and names.get(pid, "").startswith("nb-"):
        if names[pid] == "nb-guardian":
            return _notebook_of(pid, proc) in (None, *names)
        pid = parents.get(pid, 0)
    return False


def _notebook_of(guardian: int, proc: Path) -> int | None:
    """The process a guardian guards for, from its command line: main(control, lifeline, notebook, …)."""
    try:
        command = (proc / str(guardian) / "cmdline").read_text()
    except OSError:
        return None
    called = re.search(r"main\(\s*\w+\s*,\s*\w+\s*,\s*(\d+)", command)
    return int(called[1]) if called else None


def _started(pid: int, proc: Path = Path("/proc")) -> int | None:
    try:
        return int((proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _end(one: Leftover) -> bool:
    """Whether it was still that very process, and was killed."""
    try:
        handle = os.pidfd_open(one.pid)
    except (OSError, AttributeError):
        return False
    try:
        if _started(one.pid) != one.started:
            return False
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plain(version: str) -> str:
    """Without the local part: "2.6.0+cpu" and "2.6.0" are one."""
    return version.partition("+")[0]
