"""Hugging Face accelerate's names, done by nbaccel.

For scripts written for accelerate: write `nbaccel.compat.accelerate` for `accelerate` in their imports. What then
differs stands in docs/migration.md.
"""

from typing import Any

from nbaccel.compat.accelerate.names import HOMES, look_up

__all__ = list(HOMES)
__version__ = "1.15.0"  # of accelerate, whose names these are


def __getattr__(name: str) -> Any:
    return look_up(__name__, name)
