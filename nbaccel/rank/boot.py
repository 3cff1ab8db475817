"""Where a rank begins that was made ahead of its run, or spawned: it waits for its place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import NoReturn

from nbaccel.rank import replicas, worker
from nbaccel.wire.channel import Channel, ChannelClosed

__all__ = ["main"]


def main(boot: int) -> NoReturn:
    """Wait on this descriptor for a place, or several in one process, then be that rank or those."""
    channel = Channel.from_fd(boot)
    try:
        (spec, places), fds = channel.recv()
    except ChannelClosed:
        os._exit(0)  # not needed after all
    channel.close()
    given: Iterator[int] = iter(fds)
    places = [replace(place, fds=tuple(next(given) for _ in place.fds)) for place in places]
    if spec.replicas == 1:
        worker.start(spec, places[0])
    replicas.start(spec, places)
