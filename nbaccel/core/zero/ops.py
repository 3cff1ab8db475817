"""What of DeepSpeed has to be compiled: nothing, unless tensors are to be swapped to a disk."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbaccel.core.collectives import broadcast_object_list
from nbaccel.core.world import World
from nbaccel.errors import ConfigError

__all__ = ["async_io", "is_compiled", "load_ops"]

_PARTS = ("pin_memory", "async_io")
"""The second is linked with the first."""
_ABANDONED = 600.0
"""Seconds without a new file after which nobody is compiling any more."""


def load_ops(config: Mapping[str, Any], world: World) -> None:
    """Compiles, once per machine, what this configuration needs, and says so. Called by all ranks together.

    Raises:
        ConfigError: it cannot be compiled here; on every rank.
    """
    zero = config["zero_optimization"]
    places = [(zero.get(name) or {}).get("device") for name in ("offload_optimizer", "offload_param")]
    if "nvme" not in places:
        return
    problem = _problem() if world.local_rank == 0 else None  # each machine has a cache of its own
    problems = [broadcast_object_list([problem], world=world)[0]] if world.size > 1 else [problem]
    if problems[0] is None and world.local_rank:
        problems.append(_problem())
    found = next((one for one in (problem, *problems) if one is not None), None)
    if found is not None:
        raise ConfigError(found)


def async_io() -> Any:
    """DeepSpeed's module of that name, compiled now if it was not before.

    Raises:
        ConfigError: libaio, a compiler or DeepSpeed is missing.
    """
    problem = _problem()
    if problem is not None:
        raise ConfigError(problem)
    return _builder().load(verbose=False)


def is_compiled() -> bool:
    """Whether loading takes no compiler."""
    from deepspeed.git_version_info import installed_ops

    return bool(installed_ops.get("async_io")) or all(_built(name).is_file() for name in _PARTS)


def _problem() -> str | None:
    """Compiles or loads it; says why it cannot be done."""
    try:
        builder = _builder()
    except ImportError as error:
        return f"reading NVMe through DeepSpeed needs pip install 'nbaccel[deepspeed]' ({error})"
    quick = is_compiled()
    if not quick and not builder.is_compatible(verbose=False):
        return (
            "DeepSpeed's NVMe offload needs libaio and a compiler: apt-get install libaio-dev g++ ninja-build"
        )
    if not quick:
        _remove_left_locks()
        print(f"deepspeed: compiling {' and '.join(_PARTS)} for NVMe, once (a minute or two) …", flush=True)
    start = time.monotonic()
    try:
        builder.load(verbose=False)
    except (RuntimeError, OSError, ImportError) as error:
        return f"DeepSpeed's async_io cannot be compiled here: {str(error)[-2000:]}"
    if not quick:
        print(f"deepspeed: compiled in {time.monotonic() - start:.0f} s", flush=True)
    return None


def _remove_left_locks() -> None:
    """A process that is killed while it compiles leaves a lock, for which torch would wait for ever."""
    for lock in (_built(name).with_name("lock") for name in _PARTS):
        newest = max((file.stat().st_mtime for file in lock.parent.glob("*")), default=0.0)
        if lock.exists() and time.time() - newest > _ABANDONED:
            print(f"deepspeed: nobody compiles in {lock.parent} any more; its lock is removed", flush=True)
            lock.unlink(missing_ok=True)


def _builder() -> Any:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return AsyncIOBuilder()


def _built(name: str) -> Path:
    """Where torch keeps a compiled extension."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(name, False)) / f"{name}.so"
