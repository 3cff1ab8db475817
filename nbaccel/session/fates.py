"""What became of ranks, in words: why a process ended, how far each call came, why a start failed."""

from __future__ import annotations

import signal
from collections.abc import Collection, Iterable, Sequence

from nbaccel.engines.base import Exited, Failed
from nbaccel.errors import LaunchError
from nbaccel.session.report import CellLabel, explain_exit, render
from nbaccel.session.resources import oom_kills
from nbaccel.session.stacks import place, user_line
from nbaccel.session.state import RunState
from nbaccel.wire.events import Died, Raised
from nbaccel.wire.snapshot import Line

__all__ = [
    "cause_of_exit",
    "fates",
    "late_server",
    "late_start",
    "lost_parent",
    "opening_failure",
    "start_failure",
]


def cause_of_exit(exited: Exited, frames: Sequence[Line], oom_kills_before: int, label: CellLabel) -> str:
    """What is known about why a rank's process ended.

    Args:
        frames: its Python stack at a crash, the innermost first, as far as it could say.
        oom_kills_before: when the group started.
    """
    if exited.exitcode == -signal.SIGKILL and not exited.detail:
        kills, limit = oom_kills()
        if kills > oom_kills_before:
            return f"the kernel killed it because memory ran out ({limit}): use less, or fewer ranks"
    if exited.detail:
        return exited.detail
    line = user_line(frames) or (frames[0] if frames else None)
    return f"it was in {line.function}, {place(line, label)}" if line else ""


def fates(state: RunState, taken: Collection[int]) -> dict[int, str]:
    """How the call of each rank ended, of those whose call has; `taken`: the ranks that take part."""
    found = {}
    for known in state.ranks:
        if known.rank not in taken:
            found[known.rank] = "it has no part in this call"
        elif known.state == "done":
            found[known.rank] = "its function returned"
        elif known.state == "failed":
            kind = known.error.type_name if known.error else "an exception"
            found[known.rank] = f"it raised {kind}"
        elif known.exitcode is not None:
            found[known.rank] = f"it {explain_exit(known.exitcode)}"
    return found


def late_server(limit: float, log: str) -> LaunchError:
    """Nobody was there to make the ranks; `log`: the last words of those who should."""
    return LaunchError(f"the server that makes ranks was not ready in {limit:g} s.\n{log}")


def lost_parent(log: str, *, starting: bool) -> LaunchError:
    """Whoever made the ranks has ended, and they with it; `log`: its last words."""
    what = "there" if starting else "done: the session has ended"
    return LaunchError(f"the process that makes the ranks ended before they were {what}.\n{log}")


def opening_failure(failed: Failed, label: CellLabel) -> LaunchError:
    """The call could not be unpickled."""
    return _not_opened(render(failed.info, label, title="the ranks' parent", colour=False))


def _not_opened(lines: Iterable[str]) -> LaunchError:
    text = "\n".join(lines)
    return LaunchError(f"the function or its arguments could not be opened in the ranks.\n{text}")


def late_start(state: RunState, limit: float) -> LaunchError:
    """Not all ranks were ready in time."""
    states = "\n".join(f"  rank {known.rank}: {known.state} {known.detail}" for known in state.ranks)
    return LaunchError(
        f"not all ranks were ready in {limit:g} s (start_timeout):\n{states}\n"
        "Opening the arguments or setting up the device takes longer: give start_timeout=… more seconds."
    )


def start_failure(event: Raised | Died, state: RunState, label: CellLabel) -> LaunchError:
    """A rank failed while it was set up."""
    rank = event.rank
    if isinstance(event, Raised):
        lines = list(render(event.info, label, title=f"rank {rank}", colour=False))
        if not event.info.frames:  # it was pickle itself that raised
            return _not_opened(lines)
        return LaunchError("\n".join([f"rank {rank} could not be set up.", *lines]))
    words = "\n".join(state.ranks[rank].last_lines(20))
    return LaunchError(f"rank {rank} ended while it was set up, exit code {event.exitcode}.\n{words}")
