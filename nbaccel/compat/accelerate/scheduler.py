"""What `prepare` makes of a scheduler."""

from __future__ import annotations

from nbaccel.core.loop.wrappers import PreparedScheduler

__all__ = ["AcceleratedScheduler"]

AcceleratedScheduler = PreparedScheduler
