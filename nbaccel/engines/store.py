"""The run's store: a small process that serves one rendezvous store per process group, on loopback.

It outlives every rank, so a rank that returns early takes nobody's store with it.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys
from collections import Counter
from typing import Any, NoReturn

from nbaccel.rank.process import call_process, die_with_parent
from nbaccel.wire.channel import Channel, ChannelClosed

__all__ = ["listen", "main"]

Key = tuple[int, int, int]
"""World size of a group, how many of that size came before it, and the rank for a group of one."""


def listen() -> socket.socket:
    """A listening socket on a free port of 127.0.0.1."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.bind(("127.0.0.1", 0))
    sock.listen(1024)
    return sock


def main(boot: int) -> NoReturn:
    """Wait on this descriptor for the run's sockets, then serve."""
    channel = Channel.from_fd(boot)
    try:
        parent, fds = channel.recv()
    except ChannelClosed:
        os._exit(0)  # the run was not to be
    serve(socket.socket(fileno=fds[0]), fds[1:], parent, channel)


def serve(first: socket.socket, ranks: list[int], parent: int, boot: Channel) -> NoReturn:
    """Answer each rank's question for a group's port until the last rank is gone and none can come.

    Args:
        first: listens for the first group of all ranks; its port is the ranks' MASTER_PORT.
        ranks: descriptors, one per rank.
        boot: a rank that is made again is announced here, with its descriptor; its end means that none is.
    """
    die_with_parent(parent)
    call_process("nb-store")
    stores: dict[Key, Any] = {}
    ports: dict[Key, int] = {}
    asked: Counter[Key] = Counter()

    def open_store(key: Key, sock: socket.socket) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        ports[key] = sock.getsockname()[1]
        stores[key] = TCPStore(
            "127.0.0.1", ports[key], is_master=True, wait_for_workers=False, master_listen_fd=sock.detach()
        )

    try:
        open_store((len(ranks), 0, -1), first)
        channels = {fd: Channel.from_fd(fd) for fd in ranks}
        selector = selectors.DefaultSelector()
        channels[boot.fileno()] = boot
        for fd in channels:
            selector.register(fd, selectors.EVENT_READ, fd)
        while channels:
            for ready, _ in selector.select():
                fd = ready.data
                try:
                    key, fds = channels[fd].recv()
                    if channels[fd] is boot:
                        channels[fds[0]] = Channel.from_fd(fds[0])
                        selector.register(fds[0], selectors.EVENT_READ, fds[0])
                        continue
                    if key not in ports:
                        open_store(key, listen())
                    channels[fd].send(ports[key])
                except ChannelClosed:
                    selector.unregister(fd)
                    channels.pop(fd).close()
                    continue
                asked[key] += 1
                world, number, _ = key
                # all have left the groups before this one; at the first a launched notebook's ranks meet all along
                if asked[key] >= world:
                    for old in [old for old in stores if old[::2] == key[::2] and 0 < old[1] < number]:
                        del stores[old]
    except BaseException:  # noqa: BLE001  # the end of this process: its last words go to rank 0's stderr
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)
