"""What a rank is told before it starts: the values a run's ranks have in common."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nbaccel.config import RUN_CONFIG_VARIABLE
from nbaccel.rank.notices import Notices
from nbaccel.wire.payload import Parcel

__all__ = ["Call", "Exit", "Free", "HostPlace", "Interrupt", "Join", "Place", "RunSpec", "rank_environ"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPlace:
    """A host's place in a run of several."""

    index: int
    count: int
    """Hosts of the run."""
    first_rank: int
    """The rank of this host's first process."""
    world_size: int
    """Ranks of all hosts."""
    address: str
    port: int
    """Where the store is that the ranks meet at."""
    interface: str
    """The network interface the ranks talk through."""
    meeting: int
    """How many times the hosts have met before: ranks of one meeting never meet those of another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """One run on one host."""

    run_id: str
    num_processes: int
    device: str
    """Kind of device: "cpu", "cuda", "xpu", "mps" or "tpu"; a rank's index is its local rank."""
    runtime: str | None = None
    """What drives TPU chips: "torch_xla" or "torch_tpu"; None elsewhere."""
    replicas: int = 1
    """Ranks in each process. More than one are threads of it, as torch_xla's runtime has them."""
    threads: int
    """Threads each rank computes with."""
    environ: Mapping[str, str]
    """The notebook's environment at the launch; the server that serves it must have been started with
    the same values of what libraries read when they load."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """What the launch adds to it in the ranks."""
    cwd: str
    sys_path: tuple[str, ...]
    argv: tuple[str, ...]
    notices: Notices = field(default_factory=Notices)
    """What its loggers and warnings are set to."""
    config: str
    """The RunConfig as JSON."""
    collective_timeout: float | None = None
    """Seconds; None is torch's own default."""
    backend: str = "gloo"
    """Of the process group a session's ranks have ready."""
    panel: bool = False
    """Whether bars are painted by the notebook, and need not be written to stdout and stderr."""
    park: bool = False
    """Whether a rank that failed waits with its frames until it is told to leave."""
    host: HostPlace | None = None
    """Where this host stands when there are several."""
    keep: bool = False
    """Whether the ranks stay after a call, for the next: a session's do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A rank's place in its run."""

    rank: int
    parent: int
    """The process that ends it and reports its end."""
    port: int
    """Port of the first process group's store on 127.0.0.1."""
    parcel: Parcel
    """The call."""
    fds: tuple[int, ...]
    """Channel, stdout, stderr, the store's, and the call's content when it has any."""
    generation: int = 0
    """How many times the session's process group has been made before."""


class Call(NamedTuple):
    """Run a function. A named tuple for its quick pickle: one goes to every rank for every call."""

    id: int
    returns: bool
    """Whether the value is wanted back."""
    parcel: Parcel | None = None
    """(function, args, kwargs), its content in the descriptor beside it; None is what was delivered at the
    start."""


@dataclass(frozen=True, slots=True)
class Join:
    """Between calls: make the session's process group again, in this generation."""

    generation: int
    keep_groups: bool
    """Whether every rank still has its groups, so that what was built on them can go on."""


@dataclass(frozen=True, slots=True)
class Interrupt:
    """Told just before SIGINT is sent for a call: a rank that has not begun it then ignores the signal."""

    call: int


@dataclass(frozen=True, slots=True)
class Free:
    """To a rank's reporter: let go of the collective this rank waits in, by closing its connections to the
    other ranks."""

    pids: tuple[int, ...]
    """Processes of the other ranks."""


@dataclass(frozen=True, slots=True)
class Exit:
    """End well: run exit handlers and leave."""


def rank_environ(spec: RunSpec, rank: int, port: int) -> dict[str, str]:
    """The variables torchrun would set for this rank (torch.distributed.run's documentation lists them)."""
    size = str(spec.num_processes)
    variables: dict[str, Any] = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "GROUP_RANK": 0,
        "GROUP_WORLD_SIZE": 1,
        "ROLE_NAME": "default",
        "ROLE_RANK": rank,
        "ROLE_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": spec.run_id,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        RUN_CONFIG_VARIABLE: spec.config,
        **spec.variables,
        **_among_hosts(spec.host, rank),
    }
    # With an odd hostname gloo would listen on whatever it resolves to; NCCL bootstraps on the first interface.
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if name not in spec.environ:
            variables[name] = loopback if spec.host is None else spec.host.interface
    return {name: str(value) for name, value in variables.items()}


def _among_hosts(host: HostPlace | None, local_rank: int) -> dict[str, Any]:
    """What is otherwise when the run has several hosts."""
    if host is None:
        return {}
    rank = host.first_rank + local_rank
    return {
        "RANK": rank,
        "WORLD_SIZE": host.world_size,
        "GROUP_RANK": host.index,
        "GROUP_WORLD_SIZE": host.count,
        "ROLE_RANK": rank,
        "ROLE_WORLD_SIZE": host.world_size,
        "MASTER_ADDR": host.address,
        "MASTER_PORT": host.port,
        # torch keeps the ranks of one attempt apart from those of the next by this number
        "TORCHELASTIC_RESTART_COUNT": host.meeting,
    }
