"""`%nbaccel stacks`, `%nbaccel debug 3` and `%nbaccel doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from nbaccel.errors import ConfigError
from nbaccel.notebook.doctor import doctor
from nbaccel.notebook.launcher import own_last_run
from nbaccel.session import parking
from nbaccel.session.looking import look_at
from nbaccel.session.relay import Relay
from nbaccel.session.stacks import StackReport

__all__ = ["debug", "show_doctor", "stacks"]


class _Session(Protocol):
    @property
    def relay(self) -> Relay: ...
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
    """Open pdb on a rank's kept frames: the parked one of a launch, else one of the session's.

    Raises:
        ConfigError: there is none.
    """
    if len(arguments) > 1 or (arguments and not arguments[0].isdigit()):
        raise ConfigError("%nbaccel debug 3: the number of one rank")
    rank = int(arguments[0]) if arguments else None
    run = own_last_run()
    if parking.parked() is not None and run is not None:
        run.debug(rank)
    elif session is None or session.closed:
        raise ConfigError("nothing is kept: a rank is parked when a launch fails in a live notebook")
    else:
        look_at(session.relay, rank, first=_failed(session.relay))


def _failed(relay: Relay) -> int | None:
    """The session's rank that failed first in its last call."""
    failure = relay.state.failure
    return failure.rank if failure is not None else None


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
