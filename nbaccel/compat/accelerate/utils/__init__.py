"""The names of `accelerate.utils`."""

from typing import Any

from nbaccel.compat.accelerate.names import HOMES, look_up

__all__ = list(HOMES)


def __getattr__(name: str) -> Any:
    return look_up(__name__, name)
