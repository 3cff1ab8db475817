"""A session's process group in one rank: made at the start, and again when a call has left it broken.

After an interrupt every rank still holds its groups, and wrappers built on them: each group then gets a new
connection inside the same object, so that they go on. When a rank was replaced, or user code destroyed the
group, all ranks make the default group anew.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib
import os
import pickle
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, final

from nbaccel.gloo import silent
from nbaccel.rank.spec import Join, RunSpec

__all__ = ["Membership", "num_called"]

# Our own detector names a hang; a timeout would end ranks whose peer sits in a debugger.
_FOR_EVER = timedelta(days=7)
# torch's own kinds of backend end below; a group keeps the first it was given of each kind.
_FIRST_KIND = 8


@final
class Membership:
    """This rank's part in the session's process group.

    Args:
        spec: the session.
        rank: this rank.
        renew: tells the rendezvous which generation of groups is counted from now on.
        here: whether the code that asks is this rank's, where several are threads of one process.
    """

    def __init__(
        self,
        spec: RunSpec,
        rank: int,
        renew: Callable[[int], None],
        *,
        here: Callable[[], bool] = lambda: True,
    ) -> None:
        self._spec, self._rank, self._renew, self._here = spec, rank, renew, here
        seconds = spec.collective_timeout
        self._timeout = _FOR_EVER if seconds is None else timedelta(seconds=seconds)
        self._swaps = 0
        self._group: Any = None
        self._claimed = False
        self._device: Any = None
        self._init = self._take_over_init()

    def join(self, generation: int) -> None:
        """Make the default group, with every other rank."""
        self._renew(generation)
        # the numbers are said because ranks that are threads of one process share its variables
        self._init(
            self._spec.backend,
            timeout=self._timeout,
            rank=self._rank,
            world_size=self._spec.num_processes,
        )
        self._group = _c10d().group.WORLD

    def rejoin(self, order: Join) -> dict[str, str]:
        """Make the group again; a checksum of each replica's parameters, by the name of the wrapper, where
        that says which it is."""
        wrappers = _wrappers()
        if not (order.keep_groups and self._swap(order.generation)):
            self._make_anew(order.generation, wrappers)
        for wrapper in wrappers:
            wrapper.reducer._reset_state()  # it may have been interrupted in the middle of a backward
        named: dict[str, list[Any]] = {}
        for wrapper in wrappers:
            named.setdefault(_name_of(wrapper), []).append(wrapper)
        # of several without a name of their own, other ranks may have fewer: some only wait for the garbage collector
        return {name: _checksum(found[0]) for name, found in named.items() if len(found) == 1}

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order; all of them call it, once after each `rejoin`.

        Through the group's store: its collectives are counted for the user's.
        """
        store = _c10d().PrefixStore("exchange", _c10d()._world.pg_map[self._group][1])
        store.set(str(self._rank), pickle.dumps(value))
        return [pickle.loads(store.get(str(rank))) for rank in range(self._spec.num_processes)]

    def begin_call(self) -> None:
        """A function that makes the default group, as one written for a launch does, gets the session's."""
        self._claimed = False

    def num_collectives(self) -> int:
        """How many collectives this rank has called in the session's group; -1 when that is no longer the
        default one."""
        c10d = _c10d()
        if self._group is None or c10d.group.WORLD is not self._group:
            return -1
        try:
            return num_called(self._group)
        except RuntimeError:
            return 0  # a backend that does not count

    def _make_anew(self, generation: int, wrappers: list[Any]) -> None:
        c10d = _c10d()
        old = c10d.group.WORLD if c10d.is_initialized() else None
        if old is not None:
            if "nccl" in self._spec.backend and hasattr(c10d, "_abort_process_group"):
                c10d._abort_process_group()  # it would wait for kernels that never end
            else:
                c10d.destroy_process_group()
        self.join(generation)
        for wrapper in wrappers:
            if wrapper.process_group in (None, old):
                wrapper._update_process_group(self._group)

    def _swap(self, generation: int) -> bool:
        """Give each group a new connection inside the same object; whether that could be done.

        Source: none of it is public; where a torch lacks a part, groups are made anew.
        """
        import torch

        c10d = _c10d()
        world = c10d._world
        groups = list(world.pg_map)  # in the order they were made, which is every rank's
        kinds = getattr(c10d.ProcessGroup, "BackendType", None)
        gloo = getattr(c10d, "ProcessGroupGloo", None)
        swappable = all(_is_gloo(group) for group in groups)
        if kinds is None or gloo is None or not swappable or not hasattr(self._group, "_register_backend"):
            return False
        self._renew(generation)
        rendezvous = importlib.import_module("torch.distributed.rendezvous")
        store = rendezvous._create_c10d_store(
            "127.0.0.1", 0, self._rank, self._spec.num_processes, self._timeout
        )
        self._swaps += 1
        options = self._options(gloo)
        for group in groups:
            name = world.pg_names[group]
            described = getattr(group, "group_desc", "")
            own = c10d.PrefixStore(f"nbaccel/{name}", store)
            with silent():
                backend = gloo(own, group.rank(), group.size(), options or self._timeout)
            backend._set_sequence_number_for_group()
            group._register_backend(torch.device("cpu"), kinds(_FIRST_KIND + self._swaps), backend)
            group._set_group_name(name)  # else the flight recorder shows none
            group._set_group_desc(described)
            # the store before ends: groups made from now on meet on this one
            world.pg_map[group] = (world.pg_map[group][0], c10d.PrefixStore(f"later/{name}", store))
        return True

    def _options(self, gloo: Any) -> Any:
        """All connections made later share one device: each of its own would keep a thread that wakes a
        hundred times a second, and the old ones cannot be ended. None where a torch has no such option."""
        try:
            options = gloo._Options()
            if self._device is None:
                interface = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
                self._device = (
                    gloo.create_device(interface=interface) if interface else gloo.create_default_device()
                )
            options._devices, options._timeout = [self._device], self._timeout
        except (AttributeError, TypeError):
            return None
        return options

    def _take_over_init(self) -> Callable[..., None]:
        """Let `init_process_group` find what it asks for already there; the original."""
        import torch.distributed as dist

        c10d = _c10d()
        original: Callable[..., None] = c10d.init_process_group

        def init_process_group(backend: str | None = None, *args: Any, **options: Any) -> None:
            ours = self._here() and self.num_collectives() >= 0 and not self._claimed
            if ours and (backend is None or str(backend).lower() in self._spec.backend):
                self._claimed = True
                return
            if ours:
                c10d.destroy_process_group()  # another backend is asked for
            original(backend, *args, **options)

        init_process_group.__doc__ = original.__doc__
        c10d.init_process_group = dist.init_process_group = init_process_group
        return original


def num_called(group: Any, device: str = "") -> int:
    """How many collectives this rank has called in a group by its present connection.

    Args:
        device: the kind of device whose connection is asked, as "cpu"; "" is the one the group stands for.

    Raises:
        RuntimeError: a backend that does not count, or no connection for such devices.
    """
    import torch

    if not device and _is_gloo(group):
        device = "cpu"  # the group's own count stays that of its first connection
    counting = group._get_backend(torch.device(device)) if device else group
    return int(counting._get_sequence_number_for_group())


def _is_gloo(group: Any) -> bool:
    """Whether gloo is all that a group has."""
    return str(_c10d()._world.pg_map.get(group, ("",))[0]) in ("gloo", "cpu:gloo")


@functools.cache
def _c10d() -> Any:
    return importlib.import_module("torch.distributed.distributed_c10d")


def _wrappers() -> list[Any]:
    """Every live DistributedDataParallel of this rank. Objects from before the fork are frozen and not
    looked at."""
    module = sys.modules.get("torch.nn.parallel.distributed")
    if module is None:
        return []
    kind = module.DistributedDataParallel
    return [one for one in gc.get_objects() if issubclass(type(one), kind) and hasattr(one, "reducer")]


def _name_of(wrapper: Any) -> str:
    for name, value in list(vars(sys.modules["__main__"]).items()):
        if value is wrapper and not name.startswith("_"):
            return name
    return type(wrapper.module).__name__


def _checksum(wrapper: Any) -> str:
    """Of the parameters' bytes."""
    digest = hashlib.blake2b(digest_size=8)
    for parameter in wrapper.module.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(_bytes()).numpy())
    return digest.hexdigest()


def _bytes() -> Any:
    return importlib.import_module("torch").uint8
