"""Where am I: rank, size, device and process group, read once from the environment torchrun also sets."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from nbaccel import gloo
from nbaccel.config import RUN_CONFIG_VARIABLE, RunConfig, combine
from nbaccel.core import tpu
from nbaccel.errors import ConfigError
from nbaccel.wire import events

__all__ = ["Environment", "World", "cache_folder", "join", "read_environment", "single"]

_RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")
_LAUNCHED_TIMEOUT = timedelta(days=7)
"""Under our launch a hang is found and named by the session, never by a collective's timeout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The place of this process among the ranks. `backend` is None where no process group exists."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device
    """The device this rank computes on."""
    backend: str | None
    """The process group's backend ("gloo", "cpu:gloo,cuda:nccl"…); None without a process group."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0 of all."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Whether this is rank 0 of its machine."""
        return self.local_rank == 0

    @property
    def control_device(self) -> torch.device:
        """Where small control messages live: the CPU wherever the group can carry it, so no device waits."""
        if self.backend is None or "gloo" in self.backend or "mpi" in self.backend:
            return torch.device("cpu")
        return self.device


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What the environment variables say: torchrun's, and the RunConfig of our launch."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1
    rendezvous: bool = False
    """Whether the variables a process group needs are all there."""
    config: RunConfig = field(default_factory=RunConfig)


def read_environment(variables: Mapping[str, str] | None = None) -> Environment:
    """What torchrun's variables and our RunConfig variable say (`variables`: instead of `os.environ`).

    Raises:
        ConfigError: more than one process is announced but the variables are incomplete or make no sense.
    """
    env = os.environ if variables is None else variables
    config = RunConfig.from_json(env[RUN_CONFIG_VARIABLE]) if env.get(RUN_CONFIG_VARIABLE) else RunConfig()
    missing = [name for name in _RENDEZVOUS if not env.get(name)]
    size = _number(env, "WORLD_SIZE", 1)
    rank = _number(env, "RANK", 0)
    if missing and (size > 1 or rank > 0 or (env.get("RANK") and not env.get("WORLD_SIZE"))):
        present = ", ".join(f"{name}={env[name]}" for name in _RENDEZVOUS if env.get(name))
        raise ConfigError(
            f"the environment announces a distributed run ({present}) but lacks {', '.join(missing)}. "
            "Start the ranks with notebook_launcher, `nbaccel launch` or torchrun, which set all of them, "
            "or unset these variables to run in one process."
        )
    if missing:
        return Environment(config=config)
    local_rank = _number(env, "LOCAL_RANK", 0)
    local_size = _number(env, "LOCAL_WORLD_SIZE", size)
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise ConfigError(
            f"RANK={rank} of WORLD_SIZE={size} and LOCAL_RANK={local_rank} of LOCAL_WORLD_SIZE={local_size} "
            "cannot be: each rank must be at least 0 and below its size."
        )
    found = Environment(
        rank=rank, local_rank=local_rank, size=size, local_size=local_size, rendezvous=True, config=config
    )
    return tpu.as_this_replica(found) if variables is None else found


def cache_folder() -> Path:
    """Where this user's caches of ours are: `nbaccel` in XDG_CACHE_HOME, or in ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "nbaccel"


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name)
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"the environment variable {name} is {text!r}, which is not a number") from None


def single(device: torch.device | str = "cpu") -> World:
    """The world of one process without a process group."""
    return World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device(device), backend=None)


def join(config: RunConfig | None = None, environment: Environment | None = None) -> World:
    """The world this process belongs to; makes the default process group if there is none yet.

    A group that exists already (made by the user's own `init_process_group`) is used as it is.

    Raises:
        ConfigError: the environment is incomplete, the device is not there, or an existing process
            group contradicts the environment.
    """
    environment = read_environment() if environment is None else environment
    config = environment.config if config is None else combine(environment.config, config)
    device = choose_device(config, environment.local_rank, environment.size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_available() and dist.is_initialized():
        _check_existing_group(environment)
    elif environment.rendezvous:
        _make_group(environment, device, config)
    else:
        return single(device)
    return World(
        rank=dist.get_rank(),
        local_rank=environment.local_rank,
        size=dist.get_world_size(),
        local_size=environment.local_size if environment.rendezvous else dist.get_world_size(),
        device=device,
        backend=_backend_string(device),
    )


def _check_existing_group(environment: Environment) -> None:
    """Refuse to run on a process group that is not the one the environment describes."""
    found = (dist.get_rank(), dist.get_world_size())
    if environment.rendezvous and found != (environment.rank, environment.size):
        raise ConfigError(
            f"the process group that exists says rank {found[0]} of {found[1]}, the environment says rank "
            f"{environment.rank} of {environment.size}. Let Accelerator make the group, or make it from the "
            "same variables."
        )


def _make_group(environment: Environment, device: torch.device, config: RunConfig) -> None:
    if config.collective_timeout is not None:
        timeout: timedelta | None = timedelta(seconds=config.collective_timeout)
    else:
        timeout = _LAUNCHED_TIMEOUT if events.active() else None
    gloo.keep_groups()
    try:
        # the numbers are said because ranks that are threads of one process share its variables
        dist.init_process_group(
            _backend_for(device), timeout=timeout, rank=environment.rank, world_size=environment.size
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"rank {environment.rank} of {environment.size} could not join the process group "
            f"({_backend_for(device)}): {error}"
        ) from error
    atexit.register(gloo.settle)


def _backend_for(device: torch.device) -> str:
    if device.type == "cuda":
        return "cpu:gloo,cuda:nccl"
    if device.type == "xpu":
        return "cpu:gloo,xpu:xccl"
    if device.type == "tpu":
        return "cpu:gloo,tpu:tpu_dist"
    return "gloo"


def _backend_string(device: torch.device) -> str:
    """The backends of the default group as "cpu:gloo,cuda:nccl", or one name when it serves the CPU alone."""
    config = dist.get_backend_config()
    pairs = dict(pair.split(":", 1) for pair in config.split(",") if ":" in pair)
    wanted = {kind: name for kind, name in pairs.items() if kind in ("cpu", device.type)}
    if not wanted:
        return config
    if set(wanted.values()) == {"gloo"}:
        return "gloo"
    return ",".join(f"{kind}:{name}" for kind, name in wanted.items())


def choose_device(config: RunConfig, local_rank: int, size: int) -> torch.device:
    """The device of a local rank: what was asked, else the accelerator that is there, else the CPU.

    Raises:
        ConfigError: the kind asked for is not present, or this machine has fewer of them than ranks.
    """
    kind: str | None = config.device
    if kind in (None, "auto"):
        kind = _present_kind(size)
    if kind == "cpu":
        return torch.device("cpu")
    if kind == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError("device 'mps' was asked for, but this machine has none; use device='cpu'")
        return torch.device("mps")
    if kind == "tpu":
        return tpu.device()
    if kind not in ("cuda", "xpu"):
        raise ConfigError(f"device {kind!r} cannot be used by this rank; use 'cpu' or 'cuda'")
    count = torch.cuda.device_count() if kind == "cuda" else torch.xpu.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"local rank {local_rank} was to use {kind}:{local_rank}, but torch sees {count} such device(s). "
            "Ask for at most as many processes as devices, or for device='cpu'."
        )
    return torch.device(kind, local_rank)


def _present_kind(size: int) -> str:
    if tpu.is_present():
        return "tpu"
    if torch.cuda.is_available():
        return "cuda"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return "xpu"
    # One Apple GPU cannot be shared by ranks, and no process group serves it.
    return "mps" if size == 1 and torch.backends.mps.is_available() else "cpu"
