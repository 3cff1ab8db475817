"""Batches moved to the device by a thread of their own while the loop's step runs.

    reading ── loop's thread ──▶ upload ── one thread ──▶ the loop
                                 at most DEPTH batches ahead, in order

Only the copy is in the thread: data sets, samplers, collectives and random states are touched where the loop runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from nbaccel.core.data.plan import Share
from nbaccel.core.nested import leaves, map_leaves

__all__ = ["DEPTH", "Upload", "ahead", "move_tensors", "uploaded_ahead"]

DEPTH = 2
"""Batches on their way, or waiting on the device, besides the one in hand."""

Upload = Callable[[list[Tensor]], list[Tensor]]
"""From CPU tensors to copies on the device, in any thread; touches nothing that the loop's thread computes with."""
Read = tuple[Any, Share]
Item = TypeVar("Item")


def ahead(items: Iterator[Item], depth: int) -> Iterator[Item]:
    """`items`, taken `depth` further than they are given out; an error of theirs comes after those before it."""
    waiting: deque[Item] = deque()
    try:
        for item in items:
            waiting.append(item)
            if len(waiting) > depth:
                yield waiting.popleft()
    except Exception:
        yield from waiting
        raise
    yield from waiting


def uploaded_ahead(source: Iterator[Read], move: Callable[[Any], Any]) -> Iterator[Future[Read]]:
    """What `source` yields, its batches moved by `move` in a thread that ends with this iterator.

    An error of reading or moving a batch is that batch's: those before it come first.
    """

    def moved(batch: Any, share: Share) -> Read:
        return move(batch), share

    # a thread that the interpreter joins at its end, if nobody ends the iterator before
    pool = ThreadPoolExecutor(1, thread_name_prefix="nbaccel-upload")
    try:
        yield from ahead((pool.submit(moved, batch, share) for batch, share in source), DEPTH)
    finally:
        # not waited for: whoever interrupts a loop does not want to wait for a device
        pool.shutdown(wait=False, cancel_futures=True)


def move_tensors(batch: Any, upload: Upload) -> Any:
    """`batch` with its plain CPU tensors on the device, in one transfer; every other leaf as it is."""
    there = iter(upload([leaf for _, leaf in leaves(batch) if _is_plain(leaf)]))
    return map_leaves(lambda leaf: next(there) if _is_plain(leaf) else leaf, batch)


def _is_plain(leaf: Any) -> bool:
    """Whether nothing but a copy of its values is wanted: no subclass's own `.to`, no gradient to go back."""
    plain = type(leaf) is Tensor and leaf.layout is torch.strided
    return plain and leaf.device.type == "cpu" and not leaf.requires_grad
