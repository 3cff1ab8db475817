"""Environment variables, as scripts set and read them."""

from __future__ import annotations

from typing import Any

from nbaccel.compat.accelerate.names import look_up
from nbaccel.compat.accelerate.utils.other import patch_environment, str_to_bool

__all__ = ["patch_environment", "str_to_bool"]


def __getattr__(name: str) -> Any:
    return look_up(__name__, name)
