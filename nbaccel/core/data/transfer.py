"""Batches on their way to the device, ahead of the loop; on the CPU there is nothing to do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor

from nbaccel.core.data.plan import Share
from nbaccel.core.data.upload import Upload, ahead, move_tensors, uploaded_ahead
from nbaccel.core.nested import map_leaves

__all__ = ["Transfer"]

Read = tuple[Any, Share]


@final
class Transfer:
    """Moves what an iterator yields to `device`; on CUDA and XPU by a stream of its own, one batch ahead.

    `seconds` is the loop's time spent in it so far: pinning and queueing, or waiting for `upload`, not the copy itself.

    Args:
        upload: how tensors reach the device by a thread of its own; None where a stream or `.to` is right.
    """

    def __init__(self, device: torch.device, upload: Upload | None = None) -> None:
        self.seconds = 0.0
        self._device, self._upload = device, upload
        self._streams: Any = torch.get_device_module(device) if device.type in ("cuda", "xpu") else None
        self._stream: Any = self._streams.Stream(device) if self._streams is not None else None

    def moved(self, source: Iterator[Read]) -> Iterator[Read]:
        """The same batches on the device, ready for the current stream."""
        if self._device.type == "cpu":
            return source
        if self._upload is not None:
            return self._uploaded(source, self._upload)
        return self._streamed(source) if self._stream is not None else self._plain(source)

    def _uploaded(self, source: Iterator[Read], upload: Upload) -> Iterator[Read]:
        for coming in uploaded_ahead(source, lambda batch: move_tensors(batch, upload)):
            started = time.perf_counter()
            batch, share = coming.result()
            # the user's own kinds of leaves have a `.to` of theirs, which may compute: in the loop's thread
            moved = _map_movable(self._settle, batch)
            self.seconds += time.perf_counter() - started
            yield moved, share

    def _settle(self, leaf: Any) -> Any:
        there = isinstance(leaf, Tensor) and leaf.device.type == self._device.type
        return leaf if there else leaf.to(self._device)

    def _plain(self, source: Iterator[Read]) -> Iterator[Read]:
        for batch, share in source:
            started = time.perf_counter()
            moved = _map_movable(lambda leaf: leaf.to(self._device), batch)
            self.seconds += time.perf_counter() - started
            yield moved, share

    def _streamed(self, source: Iterator[Read]) -> Iterator[Read]:
        for batch, copied, share in ahead((self._launched(*read) for read in source), 1):
            yield self._arrive(batch, copied, share)

    def _launched(self, batch: Any, share: Share) -> tuple[Any, Any, Share]:
        started = time.perf_counter()
        # The copy waits for nothing on the loop's stream: its source is host memory, its target fresh.
        with self._streams.stream(self._stream):
            moved, copied = _map_movable(self._copy, batch), self._stream.record_event()
        self.seconds += time.perf_counter() - started
        return moved, copied, share

    def _copy(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            if leaf.device.type == "cpu" and not leaf.is_pinned():
                leaf = leaf.pin_memory()
            return leaf.to(self._device, non_blocking=True)
        return leaf.to(self._device)

    def _arrive(self, batch: Any, copied: Any, share: Share) -> Read:
        current = self._streams.current_stream(self._device)
        # An event per batch: waiting for the whole stream would wait for the batch after it as well.
        current.wait_event(copied)

        def own(leaf: Any) -> Any:
            # Its memory belongs to the copying stream: it must not be reused while the loop still reads it.
            if isinstance(leaf, Tensor) and leaf.device.type == self._device.type:
                leaf.record_stream(current)
            return leaf

        return _map_movable(own, batch), share


def _map_movable(fn: Any, batch: Any) -> Any:
    """`fn` on every tensor, and on every other leaf that knows how to move (`.to(device)`)."""

    def visit(leaf: Any) -> Any:
        return fn(leaf) if isinstance(leaf, Tensor) or callable(getattr(leaf, "to", None)) else leaf

    return map_leaves(visit, batch)
