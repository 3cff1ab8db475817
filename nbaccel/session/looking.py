"""pdb on a rank's kept frames, from the cell that asks for it."""

from __future__ import annotations

import sys
from typing import Any, final

from nbaccel.errors import ConfigError, LaunchError, WorkerError
from nbaccel.rank import debugger
from nbaccel.session.call import CallInFlight, Delivery
from nbaccel.session.ending import Limits
from nbaccel.session.environment import probe
from nbaccel.session.interrupts import Presses
from nbaccel.session.prompts import Prompts
from nbaccel.session.relay import Relay
from nbaccel.session.run import Run
from nbaccel.session.state import RunState
from nbaccel.wire import payload
from nbaccel.wire.events import Event, Output

__all__ = ["look_at"]


def look_at(relay: Relay, rank: int | None, *, first: int | None = None) -> None:
    """Open pdb on this rank and return when the person leaves it.

    Args:
        rank: None is the parked one, else `first`.
        first: the rank that failed first.

    Raises:
        ConfigError: there is no such rank, no failure of it is kept, or nobody can be asked here.
    """
    parked, num_ranks = relay.parked, len(relay.state.ranks)
    if rank is not None and rank not in range(num_ranks):
        raise ConfigError(f"there is no rank {rank}: the ranks are 0 to {num_ranks - 1}")
    chosen = next((one for one in (rank, parked, first) if one is not None), None)
    if relay.over or (parked is not None and chosen != parked):
        kept = "nothing is kept any more" if relay.over else f"only rank {parked} is kept"
        raise ConfigError(f"{kept}: launch again, or look at the error's traceback")
    if chosen is None:
        raise ConfigError("no rank has failed: there is nothing to look at")
    run: list[Run] = []

    def reply(rank: int, id: str, answer: Any) -> None:
        run[0].reply(rank, id, answer)

    environment = probe()
    asks = environment.allow_stdin if environment.kernel == "ipykernel" else sys.stdin.isatty()
    if not asks:
        raise ConfigError("this front end takes no input: open the notebook in a live one to debug")
    prompts = Prompts(reply, interrupt=lambda: None, can_ask=True, num_ranks=num_ranks, say=lambda _: None)
    parcel, fd = payload.pack((debugger.post_mortem, (), {}), outward=True)
    call = CallInFlight(
        Delivery(parcel=parcel, fd=fd, returns="none"),
        [_Plain(), prompts],
        num_ranks=num_ranks,
        ranks=[chosen],
        limits=Limits(stall=0),
        say=lambda _: None,
        keep=True,
    )
    run.append(Run(relay, call, name=f"debug {chosen}", folder=None, meanwhile=prompts.meanwhile))
    relay.submit(call)
    with Presses() as presses:
        run[0].wait_done(presses)
    error = run[0].exception()
    if isinstance(error, WorkerError) and isinstance(error.__cause__, ConfigError):
        raise error.__cause__
    if error is not None and not isinstance(error, (KeyboardInterrupt, LaunchError)):
        raise error


@final
class _Plain:
    """Prints what the one rank says, as it comes: a prompt must not wait for the end of its line."""

    def __init__(self) -> None:
        self._streams = {"stdout": sys.stdout, "stderr": sys.stderr}

    def handle(self, event: Event, state: RunState) -> None:
        if isinstance(event, Output):
            self._streams[event.stream].write(event.data.decode(errors="replace"))

    def tick(self, now: float) -> None:
        pass

    def close(self, state: RunState) -> None:
        for stream in self._streams.values():
            stream.flush()
