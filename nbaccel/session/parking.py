"""Ranks that failed and are kept for a look at their frames: at most one launch's at a time.

A parked rank holds its memory, on the device too. It ends at the next launch or session start, on request,
after `park_for`, or with this process.
"""

from __future__ import annotations

from typing import Protocol

__all__ = ["Parked", "note", "park", "parked", "release"]


class Parked(Protocol):
    """A group of ranks of which one is parked."""

    @property
    def parked(self) -> int | None:
        """Which rank; None when it has ended."""

    def close(self) -> None:
        """Ask for its end."""

    def join(self) -> None:
        """Wait for its end."""


_parked: list[Parked] = []


def park(group: Parked) -> None:
    """Remember this group; on its own thread."""
    _parked.append(group)


def parked() -> Parked | None:
    """The group with a parked rank; None when there is none."""
    return next((group for group in _parked if group.parked is not None), None)


def release() -> None:
    """End every parked rank and wait for its end: its memory is free then."""
    groups, _parked[:] = list(_parked), []
    for group in groups:
        group.close()
    for group in groups:
        group.join()


def note(rank: int, pid: int | None, park_for: float, device: str) -> str:
    """What the error's last line says of a parked rank."""
    memory = _memory(pid)
    held = f"{memory / 1e6:.0f} MB of memory" if memory is not None else "its memory"
    if device != "cpu":
        held += f" and what it has on its {device} device"
    minutes = f"{park_for / 60:.0f} min" if park_for >= 60 else f"{park_for:.0f} s"
    return (
        f"rank {rank} is kept with its frames for a look, and holds {held}: %nbaccel debug {rank}, or "
        f"nbaccel.last_run().debug({rank}). It ends at the next launch, with last_run().release(), or after "
        f"{minutes}"
    )


def _memory(pid: int | None) -> int | None:
    """Bytes only this process holds; None where that is not known."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return sum(int(line.split()[1]) << 10 for line in file if line.startswith("Private_"))
    except (OSError, ValueError, IndexError):
        return None
