"""The server: a clean, warm process that forks templates on request.

It imports torch and what the first training step needs, once, and nothing of the notebook's. Templates
(`engines.template`) are forked from it.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import traceback
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from nbaccel.engines import hugepages, template
from nbaccel.engines.children import Children
from nbaccel.rank import threads
from nbaccel.rank.process import call_process, die_with_parent
from nbaccel.wire.channel import Channel, ChannelClosed

__all__ = ["WARM_UP", "Hurry", "Template", "serve"]

# What the first DistributedDataParallel step and a compiled one import: 820 modules, 1.5 s in a cold rank.
WARM_UP = (
    "numpy",
    "torch",
    "torch.distributed",
    "torch.nn.parallel",
    "torch.utils.data",
    "torch._dynamo",
    "torch._inductor",
    "cloudpickle",
    "threadpoolctl",
    "nbaccel.rank.worker",
    "nbaccel.core",
    "torch.distributed.checkpoint.default_planner",  # with what FSDP2 is made of
)
# What a run of a script on one or two ranks imports sooner by itself than it would wait for here.
_LATER = ("torch._dynamo", "torch._inductor", *WARM_UP[-2:])


@dataclass(frozen=True, slots=True)
class Template:
    """To the server: fork a template that speaks over the descriptor beside this."""

    sys_path: tuple[str, ...]
    modules: tuple[str, ...]
    without: tuple[str, ...] = ()
    """Packages that made an earlier template unsafe."""


@dataclass(frozen=True, slots=True)
class Hurry:
    """To the server: a launch waits already, so fork the template before anything else."""


def serve(control: int, *, guardian: int, start_method: str, lean: bool = False) -> NoReturn:
    """Be the server until the notebook closes the channel."""
    die_with_parent(guardian)
    call_process("nb-server")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Channel.from_fd(control)
    orders: deque[tuple[Template | Hurry, list[int]]] = deque()
    if start_method == "fork":
        _warm_up([name for name in WARM_UP if not lean or name not in _LATER])
        orders += _settle(channel)
    me = os.getpid()
    children = Children()
    try:
        while True:
            order, fds = orders.popleft() if orders else children.next_message(channel)
            if isinstance(order, Hurry):
                continue
            if os.fork() == 0:
                channel.close()
                children.forget()
                die_with_parent(me)
                template.serve(
                    Channel.from_fd(fds[0]),
                    start_method=start_method,
                    sys_path=order.sys_path,
                    modules=order.modules,
                    without=order.without,
                )
            os.close(fds[0])
    except ChannelClosed:
        template.outlive_children()  # runs die with the processes above them
        os._exit(0)


def _settle(channel: Channel) -> list[tuple[Template | Hurry, list[int]]]:
    """Make this process quick to fork unless somebody is in a hurry; the orders that came meanwhile."""
    orders: list[tuple[Template | Hurry, list[int]]] = []
    for address in hugepages.own_ranges():
        orders += channel.drain()
        if any(isinstance(order, Hurry) for order, _ in orders) or not hugepages.collapse(address):
            break
    return orders


def _warm_up(names: Sequence[str]) -> None:
    """Import what every run needs; single-threaded, no device touched."""
    # an import of NumPy starts BLAS threads, and a forked child inherits a pool without its threads
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # pandas brings pyarrow, whose allocator keeps a thread unless told
    os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")
    gc.disable()  # modules stay: looking through them again and again takes a seventh of the time
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            try:
                importlib.import_module(name)
            except ImportError:
                traceback.print_exc()  # numpy is optional; torch missing shows in the first launch's error
    gc.enable()
    threads.find_pools()
    gc.collect()
    gc.freeze()
