"""What a run runs on, and how busy that is: told to trackers that do not look themselves."""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import torch

from nbaccel.core.world import World
from nbaccel.provenance import git_commit, package_versions

__all__ = ["Sampler", "facts", "sample"]

_EVERY = 10.0
_MOST_KEPT = 1000


def facts(world: World) -> dict[str, Any]:
    """Devices, versions, the git commit of the working folder, machine. Of this host; takes milliseconds."""
    kind = world.device.type
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "git_commit": git_commit(Path.cwd()),
        "num_processes": world.size,
        "backend": world.backend,
        "device": kind,
        "devices": _device_names(kind),
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
        "memory": _memory()[1],
        "versions": package_versions(),
    }


def _device_names(kind: str) -> list[str]:
    module = getattr(torch, kind, None)
    if kind not in ("cuda", "xpu") or module is None:
        return []
    return [module.get_device_name(index) for index in range(module.device_count())]


@final
class Sampler:
    """Measures in a thread of its own; whoever logs takes what there is, so trackers are used in one thread.

    Args:
        measure: gives values by name.
        every: seconds between two samples.
    """

    def __init__(self, measure: Callable[[], dict[str, float]], *, every: float = _EVERY) -> None:
        self._measure, self._every = measure, every
        self._samples: deque[tuple[float, dict[str, float]]] = deque(maxlen=_MOST_KEPT)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="nbaccel-system", daemon=True)
        self._thread.start()

    def take(self) -> list[tuple[float, dict[str, float]]]:
        """Samples since the last call, each with its time in seconds since the epoch."""
        found = []
        while self._samples:
            found.append(self._samples.popleft())
        return found

    def close(self) -> None:
        """Measure once more and end; may be called twice."""
        if not self._over.is_set():
            self._over.set()
            self._thread.join(5.0)

    def _work(self) -> None:
        while True:
            over = self._over.wait(self._every)
            self._samples.append((time.time(), self._measure()))
            if over:
                return


def sample(device: torch.device) -> Callable[[], dict[str, float]]:
    """A function that measures the host, this process and the accelerators of this host, under names that begin
    with "system/". Percentages are since its last call. What the platform does not tell is left out."""
    ticks = _cpu_ticks()
    since, used = time.monotonic(), time.process_time()

    def measure() -> dict[str, float]:
        nonlocal ticks, since, used
        found: dict[str, float] = {}
        now, process, current = time.monotonic(), time.process_time(), _cpu_ticks()
        if ticks and current and current[1] > ticks[1]:
            found["system/cpu_percent"] = 100 * (current[0] - ticks[0]) / (current[1] - ticks[1])
        if now > since:
            found["system/process_cpu_percent"] = 100 * (process - used) / (now - since)
        ticks, since, used = current, now, process
        free, whole = _memory()
        if whole:
            found["system/memory_percent"] = 100 * (whole - free) / whole
        if resident := _resident():
            found["system/process_memory_gb"] = resident / 1e9
        found.update(_devices(device))
        return {name: round(value, 3) for name, value in found.items()}

    return measure


def _cpu_ticks() -> tuple[float, float] | None:
    """Busy and all ticks of the host's CPUs since it started (proc(5), stat)."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            numbers = [float(word) for word in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    idle = numbers[3] + numbers[4]  # waiting for a disk is idle
    return sum(numbers) - idle, sum(numbers)


def _memory() -> tuple[int, int]:
    """Available and all bytes of the host's memory; zeros where it does not tell."""
    found = {}
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                name, _, rest = line.partition(":")
                if name in ("MemTotal", "MemAvailable"):
                    found[name] = int(rest.split()[0]) << 10
    except (OSError, ValueError):
        pass  # not this platform
    return found.get("MemAvailable", 0), found.get("MemTotal", 0)


def _resident() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def _devices(device: torch.device) -> dict[str, float]:
    """How busy each CUDA device of the host is, through NVML: nothing is opened on the devices for it."""
    if device.type != "cuda":
        return {}
    found: dict[str, float] = {}
    readings = {
        "percent": ("utilization", 1.0),
        "memory_gb": ("device_memory_used", 1e-9),
        "watts": ("power_draw", 1e-3),
        "celsius": ("temperature", 1.0),
    }
    for index in range(torch.cuda.device_count()):
        for name, (reading, scale) in readings.items():
            try:
                found[f"system/gpu{index}_{name}"] = getattr(torch.cuda, reading)(index) * scale
            except Exception:  # noqa: BLE001  # NVML's errors have a base of their own; it, or the reading, may be missing
                continue
    return found
