"""The disk that ZeRO-3 swaps to: everything that would go wrong in silence later is looked for before training.

DeepSpeed's asynchronous writes are not checked for their result, and memory that cannot be locked ends the process.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbaccel.core.async_io import compile_together, first_problem
from nbaccel.core.plan.size import Size
from nbaccel.core.world import World

__all__ = ["claim_folder", "places"]

_STATE = 4
"""Numbers in float32 that an optimizer with two moments swaps for each parameter: it, its gradient, the moments."""
_FOLDER = "zero_stage_3"
"""What DeepSpeed calls its own folder in `nvme_path`."""
_MAY_LOCK = 14
"""CAP_IPC_LOCK, the bit of Linux's capabilities that lifts the limit on locked memory."""


def places(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What a DeepSpeed configuration offloads to NVMe, and how: "offload_optimizer", "offload_param"."""
    zero = config["zero_optimization"]
    asked = {name: zero.get(name) or {} for name in ("offload_optimizer", "offload_param")}
    return {name: place for name, place in asked.items() if place.get("device") == "nvme"}


def claim_folder(config: Mapping[str, Any], size: Size, world: World) -> None:
    """Makes the folder of the swap files this run's alone until the process ends, and compiles what writes them.

    Files of an earlier run in it are removed. Called by all ranks together.

    Raises:
        ConfigError: the disk or this process cannot do it, or another run uses the folder; on every rank.
    """
    asked = places(config)
    on_disk, locked = _bytes(asked, config, size, world)
    first_problem(lambda: _limit_on_locked(locked), world)
    compile_together(world)
    folders = {str(place.get("nvme_path")) for place in asked.values()}
    first_problem(lambda: None if world.local_rank else _claim(folders, on_disk), world)


def _claim(folders: set[str], on_disk: int) -> str | None:
    """Takes the folder for the ranks of this machine; why that cannot be."""
    if len(folders) > 1 or folders == {"None"}:
        return f"offload to 'nvme' needs one nvme_path for all of it, and has {' and '.join(sorted(folders))}"
    folder = Path(folders.pop())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not _take(folder / "in-use"):
            return (
                f"another run swaps to {folder}, and the files of both have the same names: give this one a folder "
                "of its own as nvme_path"
            )
        shutil.rmtree(folder / _FOLDER, ignore_errors=True)
        free = shutil.disk_usage(folder).free
        if free < on_disk:
            return (
                f"the swap files of this model take about {on_disk / 1e9:.1f} GB, and {folder} has "
                f"{free / 1e9:.1f} GB free; DeepSpeed would not notice a full disk"
            )
        return _without_direct_io(folder)
    except OSError as error:
        return f"nvme_path {folder} cannot be used: {error}"


def _take(path: Path) -> bool:
    """Whether no other process holds this file; this one holds it to its end."""
    import fcntl

    # Never closed: that would give the lock up. An engine made anew in the same process takes it once more.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows either
        os.close(descriptor)
        return False
    return True


def _bytes(
    asked: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any], size: Size, world: World
) -> tuple[int, int]:
    """What the swap files of this machine's ranks take, and what a rank locks in memory for its buffers."""
    on_disk = locked = 0.0
    if place := asked.get("offload_optimizer"):
        on_disk += 4 * _STATE * size.trainable / world.size
        sub_group = config["zero_optimization"].get("sub_group_size", size.parameters)
        locked += 4 * place.get("buffer_count", _STATE) * min(sub_group, size.trainable / world.size)
    if place := asked.get("offload_param"):
        on_disk += size.element_bytes * size.parameters / world.size
        locked += size.element_bytes * place.get("buffer_count", 5) * place.get("buffer_size", 1e8)
    return int(on_disk * world.local_size), int(locked)


def _limit_on_locked(num_bytes: int) -> str | None:
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY or limit >= num_bytes or _may_lock():
        return None
    return (
        f"NVMe offload locks about {num_bytes / 1e6:.0f} MB of buffers in memory, and this process may lock "
        f"{limit / 1e6:.0f} MB: raise `ulimit -l` (in containers --ulimit memlock=-1) before the kernel starts"
    )


def _may_lock() -> bool:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    effective = next((line.split()[1] for line in lines if line.startswith("CapEff:")), "0")
    return bool(int(effective, 16) >> _MAY_LOCK & 1)


def _without_direct_io(folder: Path) -> str | None:
    """DeepSpeed opens its files so that they pass by the page cache, which filesystems in memory do not know."""
    probe = folder / f"probe-{os.getpid()}"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600))
    except OSError as error:
        return f"nvme_path {folder} is on a filesystem without direct I/O ({error.strerror}): name a folder on a disk"
    finally:
        probe.unlink(missing_ok=True)
    return None
