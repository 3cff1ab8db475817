"""How fast this machine computes and copies: measured once, then read from the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nbaccel.core.world import cache_folder

__all__ = ["Machine", "Speed", "measured"]

_COPIED = 64 << 20
_ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """One device."""

    flops: float
    """Floating-point operations per second in a matrix product, in float32."""
    memory: float
    """Bytes per second read from the device's own memory."""
    transfer: float
    """Bytes per second from the host's memory into the device's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a placement is weighed by."""

    devices: dict[str, Speed]
    """By name: "cpu", "cuda:0"."""
    disk: float
    """Bytes per second from the disk into the host's memory, page cache cold."""


def measured(accelerators: Sequence[str] = (), folder: Path | None = None) -> Machine:
    """The speeds of the CPU, of these accelerators, and of the disk `folder` is on.

    Takes about half a second, then is remembered by host name, devices, disk and torch version in this
    user's cache; delete `offload` there to measure again.
    """
    names = ["cpu", *accelerators]
    place = folder or Path(tempfile.gettempdir())
    while not place.is_dir():
        place = place.parent
    written = _cache_file(names, place)
    known = _read(written)
    if known is None:
        known = Machine(devices={name: _measure_device(name) for name in names}, disk=_measure_disk(place))
        _write(written, known)
    return known


def _cache_file(names: Sequence[str], folder: Path) -> Path:
    described = [platform.node(), torch.__version__, str(os.stat(folder).st_dev)]
    described += [torch.cuda.get_device_name(n) if n.startswith("cuda") else n for n in names]
    key = hashlib.sha256("\n".join([*described, *names]).encode()).hexdigest()[:16]
    return cache_folder() / "offload" / f"{key}.json"


def _read(path: Path) -> Machine | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Machine(
            devices={k: Speed(**v) for k, v in found["devices"].items()}, disk=float(found["disk"])
        )
    except (OSError, ValueError, KeyError, TypeError):  # not there, or of another version
        return None


def _write(path: Path, machine: Machine) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        beside.write_text(json.dumps(asdict(machine)), encoding="utf-8")
        beside.replace(path)
    except OSError:  # measured again next time
        return


def _measure_device(name: str) -> Speed:
    device = torch.device(name)
    size = 512 if device.type == "cpu" else 4096
    matrix = torch.ones(size, size, device=device)
    values = torch.ones(_COPIED // 4, device=device)
    host = torch.ones(_COPIED // 4, pin_memory=device.type == "cuda")
    compute = _fastest(lambda: matrix @ matrix, device)
    read = _fastest(lambda: values.sum(), device)
    transfer = _fastest(lambda: values.copy_(host, non_blocking=True), device)
    return Speed(flops=2 * size**3 / compute, memory=_COPIED / read, transfer=_COPIED / transfer)


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few runs, the first one left out."""
    times = []
    for _ in range(_ROUNDS + 1):
        _finish(device)
        start = time.perf_counter()
        run()
        _finish(device)
        times.append(time.perf_counter() - start)
    return max(min(times[1:]), 1e-9)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _measure_disk(folder: Path) -> float:
    """A file is written, dropped from the page cache and read; where that cannot be, 1 GB/s is assumed."""
    try:
        with tempfile.TemporaryFile(
            dir=folder if os.access(folder, os.W_OK) else None, buffering=0
        ) as handle:
            handle.write(os.urandom(1 << 20) * (_COPIED >> 20))
            os.fsync(handle.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            handle.seek(0)
            start = time.perf_counter()
            while handle.read(4 << 20):
                pass
            return _COPIED / (time.perf_counter() - start)
    except OSError:
        return 1e9
