"""Where logged values go: `Tracker` is the seam, `Trackers` speaks to several, `MetricLog` is `acc.log`."""

from __future__ import annotations

from nbaccel.core.trackers.base import Tracker, Trackers, open_trackers
from nbaccel.core.trackers.metriclog import MetricLog

__all__ = ["MetricLog", "Tracker", "Trackers", "open_trackers"]
