"""A run as its caller sees it: a future of the ranks' values that can be watched and ended."""

from __future__ import annotations

import asyncio
import contextlib
import time
import warnings
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any, Literal, final

from nbaccel.errors import ConfigError, RunInterrupted
from nbaccel.session.call import CallInFlight
from nbaccel.session.interrupts import Presses
from nbaccel.session.panel.pages import Report, page, report
from nbaccel.session.panel.reading import Heading, shown_state
from nbaccel.session.relay import Relay
from nbaccel.session.results import Results, rank_ranges
from nbaccel.session.scaling import compared
from nbaccel.session.sinks.capped import read_log
from nbaccel.session.sinks.folder import log_path
from nbaccel.session.stacks import StackReport
from nbaccel.session.state import RunState
from nbaccel.session.watch import Stall
from nbaccel.wire.events import Request

__all__ = ["Run"]

_MEANWHILE = 0.05


@final
class Run:
    """A function running, or having run, on N ranks. Made by `nbaccel.launch`.

    It can be awaited: `values = await run`. The ranks' questions are then asked there too, and an interrupt or a
    kill raises RunInterrupted where `result` raises KeyboardInterrupt.

    Args:
        meanwhile: called ten times a second or more by the thread that waits for the run.
        heading: what its panel says above everything else.
        show: paints it in a notebook's cell.
        asked: the options of the launch.
    """

    def __init__(
        self,
        relay: Relay,
        call: CallInFlight,
        *,
        name: str,
        folder: Path | None,
        meanwhile: Callable[[], None] | None = None,
        heading: Heading | None = None,
        show: Callable[[Run], None] | None = None,
        asked: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.folder = folder
        """Where the run's files are; None when no run folder was wanted."""
        self._relay = relay
        self._call = call
        self._taken = False
        self._meanwhile = meanwhile
        self._heading = heading or Heading(name=name, folder=str(folder) if folder else None)
        self._show = show
        self._asked = dict(asked or {})

    def result(self, timeout: float | None = None) -> Results:
        """The ranks' values, in rank order.

        While this waits in the main thread, ■ (SIGINT) interrupts the ranks, and a second one kills them (in a
        session only when a second has passed).

        Args:
            timeout: seconds; when they pass TimeoutError is raised and the run goes on.

        Raises:
            WorkerError: a rank failed; its own exception is the `__cause__`.
            LaunchError: the ranks could not be brought up.
            RunTimeout: it took longer than `max_time`.
            KeyboardInterrupt: the run was interrupted or killed; its `results` are what ranks returned all the same.
        """
        if self._taken:
            raise self._gone()
        if not self._call.future.done():
            with Presses() as presses:
                self.wait_done(presses, timeout)
        return self._call.future.result()

    def take_result(self) -> Results:
        """`result`, for the last time: the values are then the caller's alone, and so is their memory."""
        values = self.result()
        self._taken = True
        self._call.forget()
        return values

    def wait_done(self, presses: Presses, timeout: float | None = None) -> None:
        """Wait for the end, passing on the presses of ■ that whoever started the run has been holding.

        Raises:
            TimeoutError: `timeout` seconds have passed; the run goes on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        future = self._call.future
        future.add_done_callback(lambda _: presses.done())
        while not future.done():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"{self.name} is still running after {timeout:g} s; it goes on")
            if self._meanwhile is not None:
                self._meanwhile()
                left = _MEANWHILE if left is None else min(left, _MEANWHILE)
            if presses.wait(left) == "press":
                self._relay.interrupt(self._call)
        if not self._call.keep and self._relay.parked is None:
            self._relay.join()

    def done(self) -> bool:
        """Whether it has ended, well or not; no process of it is left then but a parked rank."""
        return self._call.future.done()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What `result` would raise; None when it would return."""
        if self._taken:
            return self._gone()
        try:
            return self._call.future.exception(timeout)
        except (FutureTimeout, CancelledError):
            raise TimeoutError(f"{self.name} is still running after {timeout:g} s; it goes on") from None

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt in every rank; a second call kills them, in a session after a second."""
        self._relay.interrupt(self._call)

    def kill(self) -> None:
        """End every rank and what it started, at once."""
        self._relay.kill(self._call)

    def stop(self) -> None:
        """Ask the function's Accelerator to stop: all ranks save and stop at the same step. Until it has made one,
        nothing stops; a warning says so."""
        self._ask_loop("stop")

    def save(self) -> None:
        """Ask the function's Accelerator to save a checkpoint at the next step; a warning where it has made none."""
        self._ask_loop("save")

    def set_knob(self, name: str, value: Any) -> None:
        """Change a value that the function's Accelerator has made changeable, on all ranks at the same step.

        One that no rank has asked for so far is set when it does; a warning says so.

        Raises:
            ConfigError: the run is over.
        """
        if self.done():
            raise ConfigError(f"{self.name} is over; knob {name!r} cannot be set any more")
        known = self.state.knobs
        if name not in known:
            has = f"it has {', '.join(map(repr, known))}" if known else "it has none so far"
            warnings.warn(
                f"{self.name} has not asked for a knob {name!r} ({has}); it takes {value!r} where its "
                f"function calls accelerator.knob({name!r}, …)",
                stacklevel=2,
            )
        self._ask(Request(kind="knob", name=name, value=value))

    def show(self) -> None:
        """Show its panel below the cell that runs now; it goes on there while the run does."""
        if self._show is not None:
            self._show(self)
        else:
            print(self.report())

    def report(self) -> Report:
        """What became of it so far: `print` it (at most 40 lines), or take `.values` or `.to_json()`."""
        return report(self.state, compared(self._heading), self._call.label, self._asked)

    def save_html(self, path: str | Path) -> Path:
        """Write its panel as an HTML file of its own."""
        target = Path(path)
        target.write_text(page(self.state, compared(self._heading), self._call.label), encoding="utf-8")
        return target

    def reply(self, rank: int, id: str, answer: Any) -> None:
        """Answer a question that a rank asks a person: with a line, or with an exception to raise there."""
        self.tell(rank, Request(kind="input", name=id, value=answer))

    def tell(self, rank: int, request: Request) -> None:
        """Send a request to one rank; nothing happens once the run is over."""
        self._relay.post(request, (rank,), self._call)

    def _ask_loop(self, kind: Literal["stop", "save"]) -> None:
        if not (self.state.options or self.done()):
            warnings.warn(
                f"{self.name} has made no Accelerator so far, which could {kind} at a step of all ranks. It will when "
                "its function makes one; run.interrupt() ends it at once",
                stacklevel=3,
            )
        self._ask(Request(kind=kind))

    def _ask(self, request: Request) -> None:
        self._relay.post(request, call=self._call)

    def stacks(self) -> StackReport:
        """What every rank is doing now, and who waits for whom. Takes 0.1 to 0.3 s.

        Raises:
            ConfigError: the run is over.
        """
        if self._relay.over:
            raise ConfigError(f"{self.name} is over: its ranks have no stacks any more")
        return self._relay.look()

    def debug(self, rank: int | None = None) -> None:
        """Open pdb on the frames of the rank that failed, at this cell's input box; `q` leaves it.

        Args:
            rank: None is the rank that is parked; in a session, any that failed in its last call.

        Raises:
            ConfigError: no such failure is kept.
        """
        from nbaccel.session.looking import look_at

        look_at(self._relay, rank, first=next(iter(self._call.causes()), None))

    def release(self) -> None:
        """End the rank that a failed launch has parked, and wait for its end; nothing happens without one."""
        if self._relay.parked is not None:
            self._relay.close()
            self._relay.join()

    @property
    def stall(self) -> Stall | None:
        """The latest that was noticed of ranks that wait for one another; None when nothing was."""
        return self._call.stall

    def logs(self, rank: int) -> str:
        """What a rank has printed so far, stdout and stderr in the order they came.

        From the run folder; without one, the last lines that were kept in memory.

        Raises:
            ConfigError: there is no such rank.
        """
        known = self._call.state.ranks
        if not 0 <= rank < len(known):
            raise ConfigError(f"there is no rank {rank}: this run has ranks 0 to {len(known) - 1}")
        if self.folder is not None:
            try:
                return read_log(log_path(self.folder, rank)).decode(errors="replace")
            except FileNotFoundError:
                pass  # it has printed nothing yet, or the folder could not be written
        return "\n".join(known[rank].last_lines(1000))

    @property
    def state(self) -> RunState:
        """What is known of every rank now."""
        return self._call.state

    def __await__(self) -> Generator[Any, None, Results]:
        async def wait() -> Results:
            loop = asyncio.get_running_loop()
            done = asyncio.Event()

            def wake(_: object) -> None:
                with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                    loop.call_soon_threadsafe(done.set)

            self._call.future.add_done_callback(wake)
            waiting = asyncio.ensure_future(done.wait())
            try:
                # ■ cancels the cell's task and does not wake a loop that sleeps
                while not done.is_set():
                    if self._meanwhile is not None:
                        self._meanwhile()  # a question that is open holds the loop up, as `input` in a cell does
                    await asyncio.wait({waiting}, timeout=_MEANWHILE)
            except asyncio.CancelledError:
                self._relay.interrupt(self._call)
                raise
            finally:
                waiting.cancel()
            try:
                return self.result()
            except KeyboardInterrupt as stopped:
                # asyncio lets that one end the loop, past everything that awaits this task
                raise RunInterrupted(str(stopped), results=getattr(stopped, "results", ())) from stopped

        return wait().__await__()

    def _gone(self) -> ConfigError:
        return ConfigError(
            f"the values of {self.name} went to the cell that launched it and are not kept here"
        )

    def __repr__(self) -> str:
        states: dict[str, list[int]] = {}
        for known in self._call.state.ranks:
            states.setdefault(shown_state(known, self._call.state), []).append(known.rank)
        text = ", ".join(f"{state}: {rank_ranges(ranks)}" for state, ranks in states.items())
        return f"<Run {self.name!r}, ranks {text}>"
