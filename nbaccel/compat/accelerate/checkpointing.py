"""None of accelerate's functions: the Accelerator saves and loads; what asks for one is told how."""

from __future__ import annotations

from typing import Any

from nbaccel.compat.accelerate.names import look_up

__all__: list[str] = []


def __getattr__(name: str) -> Any:
    return look_up(__name__, name)
