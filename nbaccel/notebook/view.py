"""What a session's calls show: while one runs, while a person waits for its turn, and between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from nbaccel.config import RunConfig
from nbaccel.notebook.front import Dashboard, Front, build_front
from nbaccel.notebook.kernel import cell_label
from nbaccel.notebook.streams import Streams, say
from nbaccel.session.call import CallInFlight
from nbaccel.session.environment import Environment
from nbaccel.session.resolve import Plan
from nbaccel.session.run import Run
from nbaccel.session.sinks.text import Mode, TextSink

__all__ = ["SessionView", "Waiting"]

_PATIENCE = 2.0  # seconds until a person is told why nothing happens


@final
@dataclass(frozen=True, slots=True)
class SessionView:
    """How a session appears in this front end."""

    environment: Environment
    config: RunConfig
    output: Mode

    def between_calls(self, num_ranks: int) -> TextSink:
        """Prints what ranks print while nothing was asked of them."""
        in_kernel = self.environment.kernel == "ipykernel"
        return TextSink(
            Streams().write, num_ranks=num_ranks, mode=self.output, label="short" if in_kernel else "long"
        )

    def front(
        self, name: str, plan: Plan, *, folder: Path | None, dashboard: Dashboard, made: Sequence[Run]
    ) -> Front:
        """What is shown of the call that will be in `made`; arguments as `build_front`."""
        return build_front(
            self.environment,
            plan,
            name=name,
            precision=self.config.mixed_precision,
            folder=folder,
            write=Streams().write,
            mode=self.output,
            dashboard=dashboard,
            made=made,
            label=cell_label,
        )


@final
class Waiting:
    """For the thread that waits for a call: what is shown meanwhile, and a word when the call has to wait itself.

    Args:
        meanwhile: of the call's front.
    """

    def __init__(self, call: CallInFlight, meanwhile: Callable[[], None]) -> None:
        self._call, self._meanwhile = call, meanwhile
        self._tell_at: float | None = time.monotonic() + _PATIENCE

    def __call__(self) -> None:
        self._meanwhile()
        if self._tell_at is not None and time.monotonic() >= self._tell_at:
            self._tell_at = None
            if self._call.id < 0:
                say("the ranks are still busy with what was asked of them before; this comes next")
