"""A run that is started again after a failure, as often as it may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from nbaccel.errors import WorkerError
from nbaccel.session.request import Request
from nbaccel.session.run import Run

__all__ = ["attempt", "run_again"]


def attempt(request: Request, number: int) -> Request:
    """The request for the attempt of this number, from 0; its ranks are told as torchrun tells them."""
    limit = request.config.max_restarts or 0
    told = {"TORCHELASTIC_RESTART_COUNT": str(number), "TORCHELASTIC_MAX_RESTARTS": str(limit)}
    plan = request.plan
    return replace(request, plan=replace(plan, variables={**plan.variables, **told}))


def run_again(
    request: Request,
    start: Callable[[Request], Run],
    wait: Callable[[Run], None],
    *,
    say: Callable[[str], None],
    report: Callable[[WorkerError], None],
    stopping: Callable[[], bool] = lambda: False,
) -> Run:
    """Start the run and wait for its end, and again after each failure of a rank while it may be.

    Args:
        start: starts one attempt.
        wait: waits for its end.
        say: tells the person that it starts again.
        report: shows the failure that it starts again after.
        stopping: whether somebody asked for the end meanwhile.

    Returns:
        The last attempt, which has ended.
    """
    limit = request.config.max_restarts or 0
    number = 0
    while True:
        run = start(attempt(request, number))
        wait(run)
        error = run.exception()
        if not isinstance(error, WorkerError) or number >= limit or stopping():
            return run
        report(error)
        number += 1
        goes_on = (
            "from the newest checkpoint"
            if request.config.resume == "auto"
            else "from its beginning (no resume)"
        )
        say(f"restart {number} of {limit}, {goes_on}")
