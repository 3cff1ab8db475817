"""What `prepare` makes of an optimizer."""

from __future__ import annotations

from nbaccel.core.loop.wrappers import PreparedOptimizer

__all__ = ["AcceleratedOptimizer"]

AcceleratedOptimizer = PreparedOptimizer
