"""Memory; `nbaccel` has the same."""

from __future__ import annotations

import gc
from typing import Any

import torch

from nbaccel import find_executable_batch_size
from nbaccel.core.memory import is_out_of_memory

__all__ = [
    "clear_device_cache",
    "find_executable_batch_size",
    "release_memory",
    "should_reduce_batch_size",
]

should_reduce_batch_size = is_out_of_memory


def clear_device_cache(garbage_collection: bool = False) -> None:
    """Gives the memory that torch keeps for later back to the device."""
    if garbage_collection:
        gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def release_memory(*objects: Any) -> list[None]:
    """A None for each object, to be put in its place: `model, opt = release_memory(model, opt)`."""
    clear_device_cache(garbage_collection=True)
    return [None] * len(objects)
