"""How many ranks a host has room for: by cores for the default, by memory, processes and files at most."""

from __future__ import annotations

from collections.abc import Callable

from nbaccel.errors import ConfigError
from nbaccel.session.resources import Resources

__all__ = ["MAX_RANKS", "RANK_MEMORY", "default_ranks", "require_room", "room_notes"]

MB = 1_000_000

RANK_MEMORY = 300 * MB
"""Anonymous memory a rank is reckoned to take, when the number of ranks is ours to choose.

A forked rank starts with a few tens of MB of its own; a small model with its gradients, two Adam
moments and DDP's buckets, a batch or two and the allocator's arenas bring it to a few hundred."""

# Below these not even an idle rank fits: measured 21 to 55 MB of proportional memory for a forked
# rank, and 155 MB for one that imported torch itself.
_LEAST_MEMORY_FORKED = 24 * MB
_LEAST_MEMORY_SPAWNED = 150 * MB
# Main, reporter, gloo's loop and autograd's thread, beside the compute threads.
_TASKS_PER_RANK = 4
# In the process that reads the ranks: two pipes, a channel, the line to its reporter and its memory file. A
# rank itself holds a socket for every other one.
_FILES_PER_RANK = 5
_FILES_OTHERWISE = 64

MAX_RANKS = 1024
"""Ranks on one host whatever its size; more is a slip of the pen."""

_SMALL_SHARED_MEMORY = 256 * MB


def default_ranks(
    resources: Resources, *, threads: Callable[[int], int], spawned: bool = False
) -> tuple[int, str]:
    """How many ranks to start on the CPU when nobody said, and why.

    Args:
        resources: what this host lets us use.
        threads: compute threads of each rank, by the number of ranks.
        spawned: each rank imports torch for itself.
    """
    cores, memory = resources.cores, resources.memory
    by_memory = cores if memory is None else memory // RANK_MEMORY
    if by_memory < cores:
        most, by = by_memory, f"memory for {by_memory} ({_size(memory or 0)}, {resources.memory_by})"
    else:
        most, by = cores, resources.cores_by or "the cores of this machine"
    for number in range(min(most, MAX_RANKS), 1, -1):
        room, limit = _room(threads(number), resources, spawned=spawned)
        if number <= room:
            return number, f"ranks: {number}, for {cores} cores ({by})"
        by = limit
    return 1, f"ranks: 1, for {cores} cores ({by})"


def require_room(
    num_processes: int, threads: int, resources: Resources, *, spawned: bool, asked: str
) -> None:
    """Refuse a number of ranks that could never come up.

    Args:
        num_processes: ranks to start.
        threads: compute threads of each.
        resources: what this host lets us use.
        spawned: each rank imports torch for itself.
        asked: the request, for the message.

    Raises:
        ConfigError: names the resource that gives out first, and the number it allows.
    """
    most, by = _room(threads, resources, spawned=spawned)
    if num_processes <= most or num_processes == 1:  # one rank is always worth trying
        return
    usual = min(resources.cores, most if resources.memory is None else resources.memory // RANK_MEMORY)
    raise ConfigError(
        f"{asked} is more than this host has room for: {most} ranks, by {by}. Nothing was started. "
        f"Paste num_processes={max(1, min(usual, most))}."
    )


def _room(threads: int, resources: Resources, *, spawned: bool) -> tuple[int, str]:
    """The most ranks of so many threads that could come up, and the resource that gives out first."""
    limits = [(MAX_RANKS, f"nbaccel starts at most {MAX_RANKS} on one host")]
    if resources.memory is not None:
        least = _LEAST_MEMORY_SPAWNED if spawned else _LEAST_MEMORY_FORKED
        what = (
            f"{_size(resources.memory)} of memory ({resources.memory_by}) at {_size(least)} for an idle rank"
        )
        limits.append((resources.memory // least, what))
    if resources.tasks is not None:
        each = _TASKS_PER_RANK + threads
        what = f"{resources.tasks} more processes and threads ({resources.tasks_by}) at {each} for a rank"
        limits.append((resources.tasks // each, what))
    if resources.files is not None:
        what = f"{resources.files} open files per process (RLIMIT_NOFILE) at {_FILES_PER_RANK} for a rank"
        limits.append((max(0, resources.files - _FILES_OTHERWISE) // _FILES_PER_RANK, what))
    return min(limits)


def room_notes(num_processes: int, resources: Resources) -> tuple[str, ...]:
    """What may run short while the ranks work."""
    notes = []
    memory, shared = resources.memory, resources.shared_memory
    if memory is not None and num_processes * RANK_MEMORY > memory:
        notes.append(
            f"{num_processes} ranks share {_size(memory)} of memory ({resources.memory_by}): "
            f"less than {_size(RANK_MEMORY)} each."
        )
    if shared is not None and shared < _SMALL_SHARED_MEMORY:
        notes.append(
            f"/dev/shm has {_size(shared)} free: DataLoader workers may fail with a bus error. "
            "Use num_workers=0, or give the container more (docker run --shm-size=1g)."
        )
    return tuple(notes)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
