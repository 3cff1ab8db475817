"""Models cut for inference: `prepare_pippy` is refused, by name."""

from __future__ import annotations

from typing import Any

from nbaccel.compat.accelerate.names import look_up

__all__: list[str] = []


def __getattr__(name: str) -> Any:
    return look_up(__name__, name)
