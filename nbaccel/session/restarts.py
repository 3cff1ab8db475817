"""A run that is started again after a failure, as often as it may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from nbaccel.errors import WorkerError
from nbaccel.session.resolve import Plan
from nbaccel.session.run import Run

__all__ = ["attempt", "name_attempt", "run_again"]

_COUNT, _LIMIT = "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"


def attempt(plan: Plan, number: int, limit: int) -> Plan:
    """The plan of the attempt of this number, from 0; its ranks are told as torchrun tells them. Without restarts
    they have its zeros already."""
    if limit == 0:
        return plan
    return replace(plan, variables={**plan.variables, _COUNT: str(number), _LIMIT: str(limit)})


def name_attempt(variables: Mapping[str, str]) -> str:
    """What a panel says of a plan's `variables`: "attempt 2 of 4"; nothing of the first."""
    number = int(variables.get(_COUNT, "0"))
    return f"attempt {number + 1} of {int(variables[_LIMIT]) + 1}" if number else ""


def run_again(
    start: Callable[[int], Run],
    wait: Callable[[Run], None],
    *,
    limit: int,
    resumes: bool,
    say: Callable[[str], None],
    report: Callable[[WorkerError], None],
    stopping: Callable[[], bool] = lambda: False,
) -> Run:
    """Start the run and wait for its end, and again after each failure of a rank while it may be.

    A failure that comes back in the same way at the same step is not tried again.

    Args:
        start: starts the attempt of a number, from 0.
        wait: waits for its end.
        limit: how many times it may be started again.
        resumes: whether it then goes on from its newest checkpoint.
        say: tells the person that it starts again, or why it does not.
        report: shows the failure that it starts again after.
        stopping: whether somebody asked for the end meanwhile.

    Returns:
        The last attempt, which has ended.
    """
    number, before = 0, None
    while True:
        run = start(number)
        wait(run)
        error = run.exception()
        if not isinstance(error, WorkerError) or number >= limit or stopping():
            return run
        where = _failed_at(run)
        if where is not None and where == before:
            kind, loop, _, step = where
            say(f"not started again: {kind} at step {step} of {loop}, as the time before; mend it first")
            return run
        report(error)
        number, before = number + 1, where
        goes_on = "from the newest checkpoint" if resumes else "from its beginning (no resume)"
        say(f"restart {number} of {limit}, {goes_on}")


def _failed_at(run: Run) -> tuple[str, str, int | None, float] | None:
    """How the run failed, in which loop, its epoch and step, by the first failure; None when no loop told."""
    failure = run.state.failure
    progress = () if failure is None else tuple(run.state.ranks[failure.rank].progress.values())
    if failure is None or not progress:
        return None
    last = progress[-1]
    kind = failure.info.type_name if failure.info is not None else f"exit code {failure.exitcode}"
    return kind, last.name, last.epoch, last.step
