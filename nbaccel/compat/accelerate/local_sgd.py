"""Averages every so many steps; `nbaccel` has the same."""

from __future__ import annotations

from nbaccel import LocalSGD

__all__ = ["LocalSGD"]
