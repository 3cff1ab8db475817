"""Where logged values go: `Tracker` is the seam, `Trackers` speaks to several, `Logbook` is `acc.log`."""

from __future__ import annotations

from nbaccel.core.trackers.base import FullTracker, Tracker, Trackers
from nbaccel.core.trackers.logbook import Logbook
from nbaccel.core.trackers.metriclog import MetricLog
from nbaccel.core.trackers.opening import open_trackers
from nbaccel.core.trackers.timings import Block, Timings, Tracked

__all__ = [
    "Block",
    "FullTracker",
    "Logbook",
    "MetricLog",
    "Timings",
    "Tracked",
    "Tracker",
    "Trackers",
    "open_trackers",
]
