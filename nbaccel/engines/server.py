"""The server and its templates: clean, warm processes that fork on request.

The server imports torch and what the first training step needs, once. A template is forked from it and
imports the installed packages the notebook has imported; runs are forked from the template, so they
import nothing. A template that a package made unsafe to fork (a thread, an open device) names it and
refuses to serve; the server, still clean, makes another without it.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from nbaccel.engines import parent
from nbaccel.engines.base import Retry
from nbaccel.engines.children import Children
from nbaccel.rank.process import die_with_parent, unclean
from nbaccel.rank.spec import RunSpec
from nbaccel.wire.channel import Channel, ChannelClosed
from nbaccel.wire.payload import Parcel

__all__ = ["Launch", "Preload", "Preloaded", "Template", "serve"]

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
)


@dataclass(frozen=True, slots=True)
class Template:
    """To the server: fork a template that speaks over the descriptor beside this."""

    sys_path: tuple[str, ...]
    modules: tuple[str, ...]
    without: tuple[str, ...] = ()
    """Packages that made an earlier template unsafe."""


@dataclass(frozen=True, slots=True)
class Preload:
    """To a template: import these too."""

    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Preloaded:
    """From a template: packages that could not be imported there, with the reason."""

    failures: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Launch:
    """To a template: fork a run. Descriptors: control, payload if any, then three per rank."""

    spec: RunSpec
    parcel: Parcel
    open_in_ranks: bool
    has_payload: bool


@dataclass(slots=True)
class _Room:
    """A template's state."""

    channel: Channel
    without: tuple[str, ...]
    torch_state: Any
    culprit: Retry | None = None
    failures: dict[str, str] = field(default_factory=dict)
    children: Children = field(default_factory=Children)


def serve(control: int, *, guardian: int, start_method: str) -> NoReturn:
    """Be the server until the notebook closes the channel."""
    die_with_parent(guardian)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Channel.from_fd(control)
    if start_method == "fork":
        _warm_up()
    me = os.getpid()
    children = Children()
    try:
        while True:
            message, fds = _wait(channel, children)
            assert isinstance(message, Template)
            if os.fork() == 0:
                channel.close()
                children.forget()
                die_with_parent(me)
                _be_template(message, Channel.from_fd(fds[0]), start_method)
            os.close(fds[0])
    except ChannelClosed:
        os._exit(0)


def _warm_up() -> None:
    """Import what every run needs; single-threaded, no device touched."""
    # an import of NumPy starts BLAS threads, and a forked child inherits a pool without its threads
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in WARM_UP:
            try:
                importlib.import_module(name)
            except ImportError:
                traceback.print_exc()  # numpy is optional; torch missing shows in the first launch's error
    gc.collect()
    gc.freeze()


def _wait(channel: Channel, children: Children) -> tuple[Any, list[int]]:
    """The next message; meanwhile reap children that ended."""
    while True:
        for pid in children.ended():
            children.reap(pid)
        if children.wait(channel.fileno()):
            return channel.recv()


def _be_template(order: Template, channel: Channel, start_method: str) -> NoReturn:
    """Import what the notebook imported, then fork a run for each request."""
    torch = sys.modules.get("torch")
    room = _Room(channel, order.without, torch.default_generator.get_state() if torch else None)
    own_path = list(sys.path)
    sys.path[:] = [*order.sys_path, *(entry for entry in own_path if entry not in order.sys_path)]
    try:
        if start_method == "fork":
            _preload(room, order.modules)
        while True:
            message, fds = _wait(channel, room.children)
            if isinstance(message, Preload):
                _preload(room, message.modules)
            else:
                _fork_run(room, message, fds, start_method)
    except ChannelClosed:
        _outlive_runs()
        os._exit(0)


def _preload(room: _Room, modules: Sequence[str]) -> None:
    """Import module after module; stop at the first that makes this process unsafe to fork."""
    failures = {}
    for name in modules:
        package = name.partition(".")[0]
        if room.culprit or package in room.without or name in sys.modules or package in room.failures:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(name)
        except (KeyboardInterrupt, Exception) as error:  # noqa: BLE001  # any import may fail in any way
            if name == package:
                failures[package] = f"{type(error).__name__}: {error}"
        if reason := unclean():
            room.culprit = Retry(
                f"importing {package} makes a process unsafe to fork: {reason}", package=package
            )
    room.failures.update(failures)
    gc.collect()
    gc.freeze()
    if failures:
        room.channel.send(Preloaded(tuple(failures.items())))


def _fork_run(room: _Room, launch: Launch, fds: list[int], start_method: str) -> None:
    """Fork the run's own process and forget its descriptors."""
    if room.culprit is not None:
        try:
            with socket.socket(fileno=fds[0]) as sock:
                Channel(sock).send(room.culprit)
        except ChannelClosed:
            pass  # the notebook gave the launch up meanwhile
        fds = fds[1:]
    else:
        me = os.getpid()
        if os.fork() == 0:
            room.channel.close()
            room.children.forget()
            die_with_parent(me)
            if room.torch_state is not None:
                # an import may have drawn numbers: ranks start as a fresh process would
                sys.modules["torch"].default_generator.set_state(room.torch_state)
            payload = fds[1] if launch.has_payload else None
            ranks = fds[2 if launch.has_payload else 1 :]
            parent.run(
                launch.spec,
                launch.parcel,
                control=fds[0],
                payload=payload,
                ranks=[(ranks[i], ranks[i + 1], ranks[i + 2]) for i in range(0, len(ranks), 3)],
                open_in_ranks=launch.open_in_ranks,
                start_method=start_method,
            )
    for fd in fds:
        os.close(fd)


def _outlive_runs() -> None:
    """Runs die with the process that forked them, so stay until the last has ended."""
    try:
        while True:
            os.waitpid(-1, 0)
    except ChildProcessError:
        return
