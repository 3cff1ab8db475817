"""Where logged values go: `Tracker` is the seam, `Trackers` speaks to several, `Logbook` is `acc.log`."""

from __future__ import annotations

from nbaccel.core.trackers.base import Tracker, Trackers, open_trackers
from nbaccel.core.trackers.logbook import Logbook
from nbaccel.core.trackers.metriclog import MetricLog

__all__ = ["Logbook", "MetricLog", "Tracker", "Trackers", "open_trackers"]
