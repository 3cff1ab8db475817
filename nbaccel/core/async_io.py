"""DeepSpeed's module for reading and writing a disk asynchronously: the one part of it that has to be compiled here.

ZeRO's offload to NVMe needs it; weights that are streamed from a disk use it where it is there already.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nbaccel.core.comm.collectives import gather_object
from nbaccel.core.world import World
from nbaccel.errors import ConfigError

__all__ = ["async_io", "compile_together", "first_problem", "is_compiled", "obstacle"]

_PARTS = ("pin_memory", "async_io")
"""The second is linked with the first."""
_ABANDONED = 600.0
"""Seconds without a new file after which nobody is compiling any more, where nothing says who it was."""
_NOTE = "compiled-by"
"""Beside torch's lock, which does not say whose it is: a host and a process."""
_NEEDED = "DeepSpeed's NVMe offload needs libaio and a compiler: apt-get install libaio-dev g++ ninja-build"


def async_io() -> Any:
    """DeepSpeed's module of that name, compiled now if it was not before, which a line says.

    Raises:
        ConfigError: libaio, a compiler or DeepSpeed is missing.
    """
    problem = _load()
    if problem is not None:
        raise ConfigError(problem)
    return _builder().load(verbose=False)


def is_compiled() -> bool:
    """Whether loading takes no compiler. Does not import DeepSpeed, which takes seconds."""
    package = importlib.util.find_spec("deepspeed")
    if package is None or package.origin is None:
        return False
    home = Path(package.origin).parent
    return _came_with(home) or all(_is_built(name, home) for name in _PARTS)


def obstacle() -> str | None:
    """Why it can be neither loaded nor compiled here; None if it can. Compiles nothing of it."""
    try:
        builder = _builder()
    except ImportError as error:
        return _not_installed(error)
    return None if _usable(builder) else _NEEDED


def compile_together(world: World) -> None:
    """Compiles it once on each machine, while its other ranks wait. Called by all ranks together.

    Raises:
        ConfigError: it cannot be compiled somewhere; on every rank.
    """
    first_problem(lambda: None if world.local_rank else _load(), world)
    first_problem(_load, world)


def first_problem(look: Callable[[], str | None], world: World) -> None:
    """Raises on every rank if `look` finds a problem on any; says it once.

    Raises:
        ConfigError: the problem of the lowest rank that has one.
    """
    found = [problem for problem in gather_object(look(), world=world) if problem is not None]
    if found:
        raise ConfigError(found[0])


def _load() -> str | None:
    """Compiles it, or loads it; why it cannot be done."""
    try:
        builder = _builder()
    except ImportError as error:
        return _not_installed(error)
    if not _usable(builder):
        return _NEEDED
    there = is_compiled()
    if not there:
        _remove_left_locks()
        print(
            f"deepspeed: compiling {' and '.join(_PARTS)} for NVMe, once (some minutes on few cores) …",
            flush=True,
        )
    start = time.monotonic()
    try:
        builder.load(verbose=False)
    except (RuntimeError, OSError, ImportError) as error:
        return f"DeepSpeed's async_io cannot be compiled here: {str(error)[-2000:]}"
    if not there:
        where = _built(_PARTS[-1]).parent
        print(f"deepspeed: compiled in {time.monotonic() - start:.0f} s, kept in {where}", flush=True)
    return None


def _usable(builder: Any) -> bool:
    """Whether it came compiled, or a program that calls libaio compiles and links, and ninja is there.

    DeepSpeed and torch want the latter to load what they have compiled, too.
    """
    import deepspeed
    from torch.utils.cpp_extension import is_ninja_available

    if _came_with(Path(deepspeed.__file__).parent):
        return True
    return bool(builder.is_compatible(verbose=False)) and is_ninja_available()


def _not_installed(error: ImportError) -> str:
    return f"NVMe through DeepSpeed needs pip install 'nbaccel[deepspeed]' ({error})"


def _remove_left_locks() -> None:
    """A process that is killed while it compiles leaves a lock, for which torch would wait for ever."""
    for folder in (_built(name).parent for name in _PARTS):
        lock, note = folder / "lock", folder / _NOTE
        newest = max((file.stat().st_mtime for file in folder.glob("*")), default=0.0)
        ended = note.is_file() and _has_ended(note.read_text(encoding="utf-8"))
        if lock.exists() and (ended or time.time() - newest > _ABANDONED):
            print(f"deepspeed: nobody compiles in {folder} any more; its lock is removed", flush=True)
            lock.unlink(missing_ok=True)
        if not lock.exists():
            note.write_text(f"{platform.node()} {os.getpid()}", encoding="utf-8")


def _has_ended(compiler: str) -> bool:
    """Whether the process that wrote this note ran on this machine and does not any more."""
    host, _, pid = compiler.partition(" ")
    return host == platform.node() and pid.isdigit() and not Path("/proc", pid).exists()


def _builder() -> Any:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return AsyncIOBuilder()


def _built(name: str) -> Path:
    """Where torch keeps a compiled extension."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(name, False)) / f"{name}.so"


def _came_with(home: Path) -> bool:
    """Whether DeepSpeed, in this folder, was installed with it (DS_BUILD_AIO)."""
    return any((home / "ops" / "aio").glob("async_io_op*.so"))


def _is_built(name: str, home: Path) -> bool:
    """Whether it was compiled from this installation's sources; torch compiles another one's again."""
    rules = _built(name).parent / "build.ninja"
    return (
        _built(name).is_file() and rules.is_file() and f"{home}{os.sep}" in rules.read_text(encoding="utf-8")
    )
