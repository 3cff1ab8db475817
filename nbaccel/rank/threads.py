"""Threads per rank, in every pool that is loaded: torch's, BLAS's, OpenMP's.

The pools read their variables when they were loaded, long before the rank began, so they are told
directly. Finding them walks every loaded library (10 ms); a rank inherits what its parent found.
"""

from __future__ import annotations

from typing import Any

__all__ = ["find_pools", "limit"]

_found: list[Any] = []


def find_pools() -> None:
    """Look for pools now, in a process ranks will be forked from."""
    import threadpoolctl

    _found[:] = [threadpoolctl.ThreadpoolController()]


def limit(threads: int) -> None:
    """Let every pool of this process compute with `threads` threads."""
    import torch

    torch.set_num_threads(threads)
    if not _found:
        find_pools()
    _found[0].limit(limits=threads)
