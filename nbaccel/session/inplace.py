"""A launch in a process that already is a rank: nothing is started, but what was asked still holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from nbaccel.config import RUN_CONFIG_VARIABLE, RunConfig, combine

__all__ = ["asked_here"]


@contextmanager
def asked_here(config: RunConfig) -> Iterator[None]:
    """While entered, an Accelerator made in this process takes what `config` asks as its launch's.

    Raises:
        ConfigError: the launch that made this rank had asked for something else.
    """
    before = os.environ.get(RUN_CONFIG_VARIABLE)
    both = config if not before else combine(RunConfig.from_json(before), config)
    os.environ[RUN_CONFIG_VARIABLE] = both.to_json()
    try:
        yield
    finally:
        if before is None:
            del os.environ[RUN_CONFIG_VARIABLE]
        else:
            os.environ[RUN_CONFIG_VARIABLE] = before
