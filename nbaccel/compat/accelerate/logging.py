"""Loggers that know which rank they are on."""

from __future__ import annotations

from nbaccel.core.logger import get_logger

__all__ = ["get_logger"]
