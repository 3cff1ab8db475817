"""`nbaccel launch --nnodes`: this host's part of a run on several, from meeting to meeting."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

from nbaccel.cli.foreground import exit_code, report, say, start, terminations
from nbaccel.cli.target import Target
from nbaccel.config import duration_seconds
from nbaccel.errors import ConfigError, WorkerError
from nbaccel.rank.spec import HostPlace
from nbaccel.session.hosts import Hosts, Meeting, Trouble
from nbaccel.session.interrupts import Presses
from nbaccel.session.request import Request
from nbaccel.session.restarts import attempt
from nbaccel.session.results import rank_ranges
from nbaccel.session.run import Run

__all__ = ["make_meeting", "run_among_hosts"]

_TO_STOP = 60.0
_CONF = {"join_timeout": "join_timeout", "last_call_timeout": "last_call", "silence": "silence"}


def make_meeting(
    nnodes: str, endpoint: str | None, run_id: str | None, interface: str | None, conf: dict[str, str]
) -> Meeting | None:
    """Where the hosts meet; None when one host is all there is.

    Raises:
        ConfigError: something in it is wrong or missing.
    """
    low, _, high = nnodes.partition(":")
    if not low.isdigit() or not (high or low).isdigit() or int(low) < 1:
        raise ConfigError(f"--nnodes is {nnodes!r}: write N or MIN:MAX, from 1")
    if endpoint is None:
        if int(high or low) != 1:
            raise ConfigError(f"--nnodes {nnodes} needs --rdzv-endpoint host:port, the same on every host")
        useless = {"--rdzv-id": run_id, "--rdzv-conf": conf, "--interface": interface}
        if asked := [option for option, value in useless.items() if value]:
            raise ConfigError(
                f"{asked[0]} is for hosts that meet, and without --rdzv-endpoint there is this one only: leave it out, "
                "or give --rdzv-endpoint host:port"
            )
        return None
    given: dict[str, Any] = {"run_id": run_id} if run_id else {}
    for key, text in conf.items():
        if key not in _CONF:
            raise ConfigError(f"--rdzv-conf has no {key!r}; it may be {', '.join(_CONF)}")
        given[_CONF[key]] = duration_seconds(text, what=f"--rdzv-conf {key}")
    return Meeting(
        endpoint=endpoint,
        min_hosts=int(low),
        max_hosts=int(high or low),
        interface=interface,
        **given,
    )


@dataclass(frozen=True, slots=True)
class _Round:
    """How a run between two meetings ended."""

    error: BaseException | None
    trouble: tuple[Trouble, str] | None


def run_among_hosts(request: Request, target: Target, meeting: Meeting, *, stop_grace: str) -> int:
    """Meet, run, and meet again while it must be; the exit code."""
    seconds = duration_seconds(stop_grace, what="--stop-grace")
    for note in (*request.plan.notes, *target.notes):
        say(note)
    limit = request.config.max_restarts or 0
    restarts = 0
    hosts = Hosts(meeting, say)
    try:
        with terminations(seconds) as ending:
            while True:
                with ending.at_once():  # nothing runs yet: Ctrl-C and SIGTERM just end this
                    place = hosts.meet(request.plan.num_processes)
                say(
                    f"host {place.index} of {place.count}: rank(s) {_mine(place, request)} of {place.world_size}"
                )
                with Presses() as presses:
                    again = replace(request, plan=attempt(request.plan, restarts, limit))
                    between = _Between(hosts, again, target, place)
                    ending.watch(between.run)
                    found = between.wait(presses, lambda: ending.overdue or presses.pressed)
                if ending.received or (found.trouble is None and not isinstance(found.error, WorkerError)):
                    code = 128 + ending.received[0] if ending.received else exit_code(found.error)
                    # ranks that stop at a step do so on every host; those that were interrupted are missed there
                    if found.error is not None or ending.overdue:
                        hosts.tell_stopped(code)
                    report(found.error)
                    return code
                _tell(hosts, place, request, found)
                if hosts.stopped_with:
                    return hosts.stopped_with
                if found.trouble is None or found.trouble[0] != "joining":
                    restarts += 1
                    if restarts > limit:
                        return exit_code(found.error) if found.trouble is None else 1
                    say(f"restart {restarts} of {limit}")
    finally:
        hosts.close()


def _mine(place: HostPlace, request: Request) -> str:
    """The ranks of this host, for a person."""
    return rank_ranges(range(place.first_rank, place.first_rank + request.plan.num_processes))


def _tell(hosts: Hosts, place: HostPlace, request: Request, found: _Round) -> None:
    """Say why the run ended here: to the person, and to the other hosts if it is news to them."""
    if found.trouble is not None:
        say(found.trouble[1])
        return
    assert isinstance(found.error, WorkerError)
    hosts.tell_failure(rank_ranges([place.first_rank + rank for rank in found.error.ranks]))
    last = request.plan.num_processes - 1
    say(f"on this host, whose local ranks 0 to {last} are rank(s) {_mine(place, request)}:")
    report(found.error)


@final
class _Between:
    """The run between two meetings."""

    def __init__(self, hosts: Hosts, request: Request, target: Target, place: HostPlace) -> None:
        self.run: Run = start(request, target, place)
        self._hosts = hosts
        self._trouble: list[tuple[Trouble, str]] = []

    def wait(self, presses: Presses, enough: Callable[[], bool]) -> _Round:
        """Wait for its end here, and, when it went well, on the other hosts.

        Args:
            enough: whether the others are waited for no longer.
        """
        with self._hosts.watching(self._on_trouble):
            self.run.wait_done(presses)
        error = self.run.exception()
        if not self._trouble and error is None and (late := self._hosts.wait_all_done(enough)):
            self._trouble.append(late)
        return _Round(error, self._trouble[0] if self._trouble else None)

    def _on_trouble(self, kind: Trouble, why: str) -> None:
        """End the run: at a step, saved, if nothing is broken and somebody listens; at once otherwise."""
        self._trouble.append((kind, why))
        if kind != "joining" or not self.run.state.options:
            self.run.kill()
            return
        self.run.stop()
        timer = threading.Timer(_TO_STOP, self.run.kill)
        timer.daemon = True
        timer.start()
