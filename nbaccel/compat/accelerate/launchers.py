"""Launching from a notebook."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nbaccel.notebook.launcher import notebook_launcher

__all__ = ["debug_launcher", "notebook_launcher"]


def debug_launcher(function: Callable[..., Any], args: Sequence[Any] = (), num_processes: int = 2) -> Any:
    """Runs `function` on ranks that compute on the CPU; returns their values."""
    return notebook_launcher(function, args, num_processes, device="cpu")
