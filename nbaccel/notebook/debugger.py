"""`%nbaccel stacks`, `%nbaccel debug 3` and `%nbaccel doctor`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

from nbaccel.errors import ConfigError
from nbaccel.notebook.doctor import doctor
from nbaccel.notebook.launcher import own_last_run
from nbaccel.session import parking
from nbaccel.session.looking import look_at
from nbaccel.session.parking import Parked
from nbaccel.session.relay import Relay
from nbaccel.session.run import Run
from nbaccel.session.stacks import StackReport
from nbaccel.session.state import RunState

__all__ = ["debug", "show_doctor", "stacks"]


class _Session(Protocol):
    @property
    def relay(self) -> Relay: ...
    @property
    def latest(self) -> RunState: ...
    @property
    def closed(self) -> bool: ...


def stacks(session: _Session | None) -> StackReport:
    """What every rank is doing: of the launch that runs, else of the session.

    Raises:
        ConfigError: there are no ranks.
    """
    run = own_last_run()
    if run is not None and not run.done():
        return run.stacks()
    if session is None or session.closed:
        raise ConfigError("no ranks: start a session with  %nbaccel start -n 4, or launch a function")
    return session.relay.look()


def debug(session: _Session | None, arguments: Sequence[str]) -> None:
    """Open pdb on a rank's kept frames: the parked one of a launch, or one of the session's.

    Raises:
        ConfigError: there is none.
    """
    if len(arguments) > 1 or (arguments and not re.fullmatch("[0-9]+", arguments[0])):
        raise ConfigError("%nbaccel debug 3: the number of one rank")
    rank = int(arguments[0]) if arguments else None
    run, parked = own_last_run(), parking.parked()
    own = None if session is None or session.closed else session.latest
    if run is not None and parked is not None and (own is None or not _is_meant(own, rank, run, parked)):
        run.debug(rank)
    elif session is None or own is None:
        raise ConfigError("nothing is kept: a rank is parked when a launch fails in a live notebook")
    else:
        look_at(session.relay, rank, first=None if own.failure is None else own.failure.rank)


def _is_meant(own: RunState, rank: int | None, run: Run, parked: Parked) -> bool:
    """Whether the session's failure is to be looked at rather than the parked rank: it has the rank that is
    asked for, or where that tells nothing it is the later one."""
    failure, before = own.failure, run.state.failure
    if failure is None:
        return False
    in_session = rank in own.failed_ranks
    if rank is not None and in_session != (rank == parked.parked):
        return in_session
    return before is None or failure.time > before.time


def show_doctor(names: dict[str, Any], arguments: Sequence[str]) -> Any:
    """The doctor's report; with a name, also on that function of the notebook.

    Raises:
        ConfigError: there is no such function.
    """
    if not arguments:
        return doctor()
    if arguments[0] not in names:
        raise ConfigError(f"%nbaccel doctor {arguments[0]}: there is no such name in the notebook")
    return doctor(names[arguments[0]])
