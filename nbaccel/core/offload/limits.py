"""How much memory there is to place a model in, and what the user allows of it."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from nbaccel.core.save_model import byte_count
from nbaccel.errors import ConfigError

__all__ = ["accelerators", "free_memory", "memory_limits", "num_bytes", "own_limit", "place_name"]

_SHARE = 0.9  # of what is free; the rest is for activations


def memory_limits(given: Mapping[int | str, int | str] | None, root: Path = Path("/")) -> dict[str, int]:
    """Bytes by place, in order of preference: what is given, else nine tenths of what is free now.

    Raises:
        ConfigError: a size cannot be read, or a device is not here.
    """
    if given is None:
        limits = {name: int(_SHARE * torch.cuda.mem_get_info(name)[0]) for name in accelerators()}
        return {**limits, "cpu": int(_SHARE * free_memory(root))}
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"max_memory is {given!r}; write it by place, like {{'cuda:0': '20GB', 'cpu': '8GB'}}"
        )
    named = {place_name(key): value for key, value in given.items()}
    sizes = {place: num_bytes(value, of=f"max_memory[{place!r}]") for place, value in named.items()}
    order = [*(place for place in sizes if place not in ("cpu", "disk")), "cpu", "disk"]
    return {place: sizes[place] for place in order if place in sizes}


def num_bytes(given: int | str, *, of: str) -> int:
    """What `byte_count` reads, or 0.

    Raises:
        ConfigError: it is negative, or no size.
    """
    return 0 if type(given) is int and given == 0 else byte_count(given, of=of)


def accelerators() -> list[str]:
    """The devices here that compute and have memory of their own."""
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]


def place_name(key: int | str | torch.device) -> str:
    """ "cuda:0" for 0, "cuda" and "cuda:0"; "cpu" and "disk" for themselves.

    Raises:
        ConfigError: it is none of these, or the device is not here.
    """
    text = f"cuda:{key}" if isinstance(key, int) else str(key)
    if text in ("cpu", "disk"):
        return text
    name = "cuda:0" if text == "cuda" else text
    if not re.fullmatch(r"cuda:\d+", name):
        raise ConfigError(f"{key!r} is no place for weights: write 'cuda:0' (or 0), 'cpu' or 'disk'")
    if name not in accelerators():
        here = ", ".join(accelerators()) or "no accelerator"
        raise ConfigError(f"{name} is not here (found: {here})")
    return name


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that can still be had, within the limit of this control group."""
    text = _text(root / "proc/meminfo")
    found = re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE)
    free = int(found[1]) * 1024 if found else 8 << 30
    limit, used = _text(root / "sys/fs/cgroup/memory.max"), _text(root / "sys/fs/cgroup/memory.current")
    if limit.strip().isdigit() and used.strip().isdigit():
        free = min(free, int(limit) - int(used))
    return max(0, free)


def own_limit() -> int | None:
    """Bytes this process can still take under limits of its own (`ulimit -d`, `ulimit -v`); None: it has none."""
    if sys.platform == "win32":
        return None
    import resource

    status, left = _text(Path("/proc/self/status")), []
    for limit, key in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        most, _ = resource.getrlimit(limit)
        used = re.search(rf"^{key}:\s*(\d+) kB", status, re.MULTILINE)
        if most != resource.RLIM_INFINITY and used:
            left.append(max(0, most - int(used[1]) * 1024))
    return min(left, default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
