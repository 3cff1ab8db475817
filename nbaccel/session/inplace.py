"""A launch in this very process, a rank already or to be the only one: what was asked still holds."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from nbaccel.config import RUN_CONFIG_VARIABLE, RunConfig, combine

__all__ = ["asked_here", "only_rank"]


@contextmanager
def asked_here(config: RunConfig) -> Iterator[None]:
    """While entered, an Accelerator made in this process takes what `config` asks as its launch's.

    Raises:
        ConfigError: the launch that made this rank had asked for something else.
    """
    before = os.environ.get(RUN_CONFIG_VARIABLE)
    both = config if not before else combine(RunConfig.from_json(before), config)
    with _variables({RUN_CONFIG_VARIABLE: both.to_json()}):
        yield


@contextmanager
def only_rank() -> Iterator[None]:
    """While entered, this process is the one rank of a torchrun launch; a group it makes ends with it."""
    import torch.distributed as dist

    if "RANK" in os.environ:
        yield
        return
    listening = socket.create_server(("127.0.0.1", 0))  # torch's own store would listen on every interface
    port = listening.getsockname()[1]
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    )
    own = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "GROUP_RANK": 0}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    had_group = dist.is_initialized()
    with _variables({name: str(value) for name, value in {**own, **where}.items()}):
        try:
            yield
        finally:
            if dist.is_initialized() and not had_group:
                dist.destroy_process_group()
            del store


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
