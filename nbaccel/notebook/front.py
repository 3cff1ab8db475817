"""What a launch shows and where: sinks chosen by the front end."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

from nbaccel.notebook.cell import Cell
from nbaccel.notebook.controls import Actions, Stopped
from nbaccel.notebook.dashboard import Panel, show
from nbaccel.notebook.displays import Displays
from nbaccel.notebook.widgets import RankWidgets
from nbaccel.session.environment import Environment
from nbaccel.session.panel.reading import Heading
from nbaccel.session.prompts import Prompts
from nbaccel.session.report import CellLabel
from nbaccel.session.resolve import Plan
from nbaccel.session.restarts import name_attempt
from nbaccel.session.run import Run
from nbaccel.session.sinks.base import Sink
from nbaccel.session.sinks.limit import Limit
from nbaccel.session.sinks.terminal import TerminalPanel
from nbaccel.session.sinks.text import Mode, TextSink, Write
from nbaccel.session.state import new_state
from nbaccel.wire.events import Request

__all__ = ["Dashboard", "Front", "LateFront", "build_front", "running_kernel", "with_tilde"]

Dashboard = Literal["auto"] | bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """Everything a person sees of a run."""

    sinks: tuple[Sink, ...]
    meanwhile: Callable[[], None]
    """For the thread that waits for the run, ten times a second or more."""
    panel: bool
    """Whether bars are painted, so that ranks need not write them."""
    heading: Heading
    show: Callable[[Run], None] | None
    """Paints the run below another cell."""
    say: Callable[[str], None]
    """One sentence of nbaccel's to the person, above a table that is being painted."""


@final
class LateFront:
    """What is shown of a call that a cell waits for, built when there is something to show.

    Args:
        build: makes it.
    """

    def __init__(self, build: Callable[[], Front]) -> None:
        self._build = build
        self._front: Front | None = None

    def sinks(self) -> tuple[Sink, ...]:
        """Its sinks, made now; called once."""
        self._front = self._build()
        return self._front.sinks

    def meanwhile(self) -> None:
        """For the thread that waits for the run."""
        if self._front is not None:
            self._front.meanwhile()


def build_front(
    environment: Environment,
    plan: Plan,
    *,
    name: str,
    precision: str | None,
    folder: Path | None,
    write: Write,
    mode: Mode,
    dashboard: Dashboard,
    made: Sequence[Run],
    label: CellLabel,
) -> Front:
    """The sinks for the front end this process has. Called from the cell that launches, or while it waits.

    Args:
        name, precision, folder: of the run, for the panel's header.
        write: prints text in the cell or the terminal.
        dashboard: "auto" is a panel where somebody looks on: a live notebook, a terminal.
        made: where the run will be: it is started with what is built here.
    """
    num_ranks = plan.num_processes
    shown_folder = with_tilde(folder) if folder else None
    heading = Heading(
        name=name,
        device=plan.device,
        precision=precision,
        folder=shown_folder,
        attempt=name_attempt(plan.variables),
    )
    actions, tell = _controls(made)
    kernel = running_kernel() if environment.kernel == "ipykernel" else None
    cell = Cell(kernel) if kernel is not None else None
    wanted = mode != "none" if dashboard == "auto" else dashboard
    # a console takes input too, and cannot repaint
    live = (environment.live and environment.front_end != "none") or dashboard is True
    if cell is not None and cell.captured:
        live = False
    panel: Panel | TerminalPanel | None = None
    aside: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    limit: Limit | None = None
    if wanted and cell is not None and live:
        state = new_state(num_ranks, time.time())
        panel = Panel(cell, heading, state, actions=actions, label=label)
        limit = Limit(write)
    elif wanted and cell is None and environment.is_tty:
        panel = TerminalPanel(heading)
        write, aside = panel.write, panel.aside
    text = TextSink(
        limit or write,
        num_ranks=num_ranks,
        mode=mode,
        label="short" if kernel is not None else "long",
        transient=environment.live or environment.is_tty,
        displays=cell is None and mode != "none",
    )

    def interrupt() -> None:
        for run in made:
            run.interrupt()

    def say(note: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # the stream is closed: nobody is there to be told
            write(f"nbaccel: {note}\n", "stderr")

    prompts = Prompts(
        lambda rank, id, answer: tell(rank, Request(kind="input", name=id, value=answer)),
        interrupt=interrupt,
        can_ask=environment.allow_stdin if kernel is not None else _keyboard(),
        num_ranks=num_ranks,
        say=say,
        aside=aside,
    )
    sinks: list[Sink] = [*([panel] if panel is not None else []), text]
    widgets: RankWidgets | None = None
    if cell is not None and mode != "none":
        widgets = RankWidgets(cell, tell, live=live)
        # in this order: a display takes the widget's last form before the widget ends
        sinks += [Displays(cell, num_ranks=num_ranks, before=text.flush, widgets=widgets), widgets]
    if limit is not None:
        sinks.append(limit)
    sinks.append(prompts)

    def meanwhile() -> None:
        for one in (panel, widgets):
            if isinstance(one, (Panel, RankWidgets)):
                one.pump()
        prompts.meanwhile()

    def show_run(run: Run) -> None:
        show(Cell(kernel), heading, run, actions=actions, label=label)

    return Front(
        sinks=tuple(sinks),
        meanwhile=meanwhile,
        panel=panel is not None,
        heading=heading,
        show=show_run if kernel is not None else None,
        say=say,
    )


def _controls(made: Sequence[Run]) -> tuple[Actions, Callable[[int, Request], None]]:
    """What the panel's controls do to the run, and how one rank is told something."""
    stopped: Stopped = ""  # by whichever panel of the run

    def stop() -> None:
        nonlocal stopped
        if not stopped and any(run.state.options for run in made):
            stopped = "asked"  # an Accelerator listens: all ranks end at the same step, if one comes
        else:
            stopped = "interrupted" if stopped in ("", "asked") else "killed"
        for run in made:
            {"asked": run.stop, "interrupted": run.interrupt, "killed": run.kill}[stopped]()

    def save() -> None:
        for run in made:
            run.save()

    def turn(name: str, value: Any) -> None:
        for run in made:
            if not run.done():
                run.set_knob(name, value)

    def tell(rank: int, request: Request) -> None:
        for run in made:
            run.tell(rank, request)

    return Actions(stop=stop, stopped=lambda: stopped, save=save, turn=turn), tell


def with_tilde(folder: Path) -> str:
    """A path as people write it: notebooks are given to others."""
    try:
        return f"~/{folder.relative_to(Path.home())}"
    except (ValueError, RuntimeError):
        return str(folder)


def running_kernel() -> Any:
    """The ipykernel this is, if it is one."""
    get = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return getattr(get() if get is not None else None, "kernel", None)


def _keyboard() -> bool:
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()
