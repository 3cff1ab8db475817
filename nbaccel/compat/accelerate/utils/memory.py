"""Memory; `nbaccel` has the same."""

from __future__ import annotations

from nbaccel import find_executable_batch_size
from nbaccel.compat.accelerate.utils.other import release_memory

__all__ = ["find_executable_batch_size", "release_memory"]
