"""The one thread between the ranks and everything that watches them.

It reads every rank's channel and output, folds each event into the run's state, hands it to the sinks,
starts the call once all ranks are there, ends the run when something asks for it, and resolves its
future when no process of it is left. Nobody else reads, kills or closes.

        channel, stdout, stderr of each rank ─┐                        ┌─ sinks (text, run folder, …)
        control (exits)                      ─┼─ select → fold ────────┤
        commands (interrupt, kill)           ─┘     │                  └─ future of the run
                                                    └─ Call, Exit, signals → ranks
"""

from __future__ import annotations

import contextvars
import fcntl
import os
import selectors
import signal
import struct
import termios
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Literal, final

from nbaccel.engines.base import Engine, Exited, Failed, Opening, Ports, Retry, Started
from nbaccel.errors import LaunchError, NbaccelError
from nbaccel.rank.spec import Call, Exit, RunSpec
from nbaccel.session.ending import Ending, Limits, Reason
from nbaccel.session.outcome import Ended, conclude
from nbaccel.session.report import CellLabel, explain_exit, render
from nbaccel.session.results import Results
from nbaccel.session.sinks.base import Sink
from nbaccel.session.state import RunState, fold, new_state
from nbaccel.wire import payload
from nbaccel.wire.channel import ChannelClosed
from nbaccel.wire.events import Applied, Died, Event, Output, Raised, Returned, Status

__all__ = ["Delivery", "Relay"]

_READ = 1 << 18
_TICK = 0.05
# Importing torch in a cold server, on a slow disk: no fault of the ranks.
_SERVER_START = 300.0
_GONE = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """The call on its way: what, and whose value is wanted."""

    parcel: payload.Parcel
    fd: int | None
    returns: Literal["all", "rank0", "none"]


@final
class Relay:
    """Drives one run from its start to the last process's end.

    Args:
        engine: makes and ends the ranks.
        spec: the run.
        delivery: the call; the relay closes its descriptor.
        sinks: fed with every event on the relay's thread; the relay closes them.
        say: tells the person one sentence about how the ranks came to be.
        label: what the front end calls a file a cell was compiled from.
        folder: the run's folder, for messages.
        expected: options some Accelerator must say it applied, with what to tell the person if none does.
    """

    def __init__(
        self,
        engine: Engine,
        spec: RunSpec,
        delivery: Delivery,
        sinks: Sequence[Sink],
        *,
        limits: Limits,
        say: Callable[[str], None],
        label: CellLabel = lambda _: None,
        folder: str | None = None,
        expected: Mapping[str, str] | None = None,
    ) -> None:
        self.future: Future[Results] = Future()
        self._say = say
        self._expected = dict(expected or {})
        self._engine, self._spec, self._delivery, self._sinks = engine, spec, delivery, list(sinks)
        self._limits, self._label, self._folder = limits, label, folder
        self._state = new_state(spec.num_processes, time.time())
        self._phase: Literal["starting", "running", "ending", "stopping"] = "starting"
        self._ending = Ending(limits.grace)
        self._deadline = time.monotonic() + _SERVER_START
        # the sinks' own work waits while the ranks come up, unless that takes long
        self._quiet_until = time.monotonic() + 0.5
        self._opened = False
        self._failures: dict[int, Raised | Died] = {}
        self._values: dict[int, tuple[payload.Parcel | None, int | None]] = {}
        self._errors: dict[int, tuple[payload.Parcel, int | None]] = {}
        self._signalled: dict[int, signal.Signals] = {}
        self._retries: list[Retry] = []
        self._startup_error: NbaccelError | None = None
        self._commands, self._command_write = os.pipe()
        os.set_blocking(self._command_write, False)
        self._ports = engine.start(spec, delivery.parcel, delivery.fd)
        self._tell()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._commands, selectors.EVENT_READ, self._on_command)
        self._watch(self._ports)
        # in a copy of the caller's context: what a sink prints appears in the cell that launched
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(self._run,), name="nbaccel-relay", daemon=True
        )
        self._thread.start()

    @property
    def state(self) -> RunState:
        """What is known of the ranks now."""
        return self._state

    def interrupt(self) -> None:
        """Ask for KeyboardInterrupt in every rank; a second time, kill them. Safe in a signal handler."""
        self._command(b"i")

    def kill(self) -> None:
        """End every rank at once."""
        self._command(b"k")

    def join(self) -> None:
        """Wait for the thread's last line, after the future is resolved."""
        self._thread.join()

    def forget(self) -> None:
        """Keep the values no longer, once the run has ended."""
        self.future = Future()
        self.future.cancel()

    def _tell(self) -> None:
        for note in self._ports.notes:
            self._say(note)

    def _command(self, what: bytes) -> None:
        try:
            os.write(self._command_write, what)
        except OSError:
            pass  # the run is over, or 64 Ki presses are waiting already

    # ── the loop ──────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            # before the run's own process exists there is nothing to wait for: it will find us gone
            while self._phase != "stopping" or (self._opened and not self._ports.control.eof):
                for key, _ in self._selector.select(self._pause()):
                    key.data()
                self._on_time(time.monotonic())
        except BaseException as problem:  # noqa: BLE001  # whoever waits for the run gets it
            error = problem
        finally:
            self._finish(error)

    def _pause(self) -> float:
        """Seconds until the loop has something to do by itself."""
        due = [at for at in (self._ending.next_at(), self._deadline) if at is not None]
        return max(0.0, min([_TICK, *(at - time.monotonic() for at in due)]))

    def _on_time(self, now: float) -> None:
        if self._phase != "starting" or now > self._quiet_until:
            self._tell_sinks(lambda sink: sink.tick(now))
        if due := self._ending.take_due(now):
            self._signal(due)
        if self._phase == "starting" and now > self._deadline:
            self._give_up(self._late())
        if self._phase == "running" and self._limits.run is not None and now > self._deadline:
            self._end("timeout")
        if self._phase == "ending" and self._all_ended():
            self._stop()
        if self._phase == "stopping" and now > self._deadline:
            raise LaunchError(f"the run's own process did not end in {_GONE:g} s.\n{self._engine.log()}")

    def _watch(self, ports: Ports) -> None:
        read = selectors.EVENT_READ
        self._selector.register(ports.control, read, self._on_control)
        for rank, channel in enumerate(ports.channels):
            self._selector.register(channel, read, lambda rank=rank: self._on_channel(rank))
            self._selector.register(
                ports.stdouts[rank], read, lambda rank=rank: self._on_output(rank, "stdout")
            )
            self._selector.register(
                ports.stderrs[rank], read, lambda rank=rank: self._on_output(rank, "stderr")
            )

    # ── what comes in ─────────────────────────────────────────────────────────────────────────────

    def _on_command(self) -> None:
        for what in os.read(self._commands, 64):
            kill = what == ord("k") or self._ending.reason in ("interrupted", "failed", "timeout")
            self._end("killed" if kill else "interrupted")

    def _on_control(self) -> None:
        for message in self._engine.exits(self._ports):
            if isinstance(message, Opening):
                self._opened = True
                self._deadline = time.monotonic() + self._limits.start
            elif isinstance(message, Retry):
                self._retry(message)
                return
            elif isinstance(message, Failed):
                text = "\n".join(render(message.info, self._label, title="the ranks' parent", colour=False))
                self._give_up(
                    LaunchError(f"the function or its arguments could not be opened in the ranks.\n{text}")
                )
            elif isinstance(message, Started):
                for known, pid in zip(self._state.ranks, message.pids, strict=True):
                    if (
                        known.state == "starting"
                    ):  # a quick rank has said "idle" before its parent says it exists
                        self._fold(Status(rank=known.rank, state="starting", pid=pid))
            elif isinstance(message, Exited):
                self._on_exit(message)
        if self._ports.control.eof:
            self._selector.unregister(self._ports.control)
            if self._phase != "stopping":
                self._on_lost_parent()

    def _retry(self, retry: Retry) -> None:
        """The same run again, made in the way `retry` says."""
        self._retries.append(retry)
        self._unwatch()
        self._ports = self._engine.start(
            self._spec, self._delivery.parcel, self._delivery.fd, after=tuple(self._retries)
        )
        self._tell()
        self._watch(self._ports)

    def _on_lost_parent(self) -> None:
        """Whoever made the ranks is gone, and so are they."""
        if self._startup_error is None and self._phase == "starting":
            log = self._engine.log()
            self._startup_error = LaunchError(
                f"the process that makes the ranks ended before they were there.\n{log}"
            )
        for rank in range(self._spec.num_processes):
            if rank not in self._values and rank not in self._failures:
                self._on_exit(Exited(rank, -signal.SIGKILL, "the process that made it is gone"))
        self._phase = "stopping"

    def _on_channel(self, rank: int) -> None:
        channel = self._ports.channels[rank]
        for event, fds in channel.drain():
            self._on_event(replace(event, rank=rank), fds)
        if channel.eof and channel in self._selector.get_map():
            self._selector.unregister(channel)

    def _on_event(self, event: Event, fds: list[int]) -> None:
        rank = event.rank
        if isinstance(event, (Returned, Raised)):
            self._drain_output(rank)  # all its output is seen before its result
        self._fold(event)
        if isinstance(event, Applied):
            self._expected.pop(event.option, None)
        elif isinstance(event, Status) and event.state == "idle" and self._phase == "starting":
            if all(known.state == "idle" for known in self._state.ranks):
                self._call()
        elif isinstance(event, Returned):
            self._values[rank] = (event.value, fds[0] if fds else None)
            if len(self._values) == self._spec.num_processes:
                self._end("returned")
        elif isinstance(event, Raised):
            self._failures[rank] = event
            if event.error is not None:
                self._errors[rank] = (event.error, fds[0] if fds else None)
            self._end("failed")

    def _on_exit(self, exited: Exited) -> None:
        rank = exited.rank
        self._on_channel(rank)
        self._drain_output(rank)
        answered = rank in self._values or rank in self._failures
        died = Died(rank=rank, exitcode=exited.exitcode, detail=exited.detail)
        self._fold(died)
        if answered and exited.exitcode != 0 and rank in self._values:
            self._say(f"rank {rank} had returned, then {explain_exit(exited.exitcode)} while it was leaving")
        if not answered:
            self._failures.setdefault(rank, died)
            if self._ending.reason in (None, "returned"):
                self._end("failed")

    def _on_output(self, rank: int, stream: Literal["stdout", "stderr"]) -> int:
        """Read what is in a pipe; the number of bytes, 0 when there is nothing more for now."""
        fd = (self._ports.stdouts if stream == "stdout" else self._ports.stderrs)[rank]
        try:
            data = os.read(fd, _READ)
        except BlockingIOError:
            return 0
        if not data:
            if fd in self._selector.get_map():
                self._selector.unregister(fd)
            return 0
        self._fold(Output(rank=rank, stream=stream, data=data))
        return len(data)

    def _drain_output(self, rank: int) -> None:
        """Read what a rank had written until now; not what goes on being written meanwhile."""
        for stream, fds in (("stdout", self._ports.stdouts), ("stderr", self._ports.stderrs)):
            waiting = struct.unpack("i", fcntl.ioctl(fds[rank], termios.FIONREAD, b"\0" * 4))[0]
            while waiting > 0:
                got = self._on_output(rank, stream)  # type: ignore[arg-type]
                waiting = waiting - got if got else 0

    def _fold(self, event: Event) -> None:
        self._state = fold(self._state, event)
        self._tell_sinks(lambda sink: sink.handle(event, self._state))

    def _tell_sinks(self, tell: Callable[[Sink], None]) -> None:
        """A display that fails is dropped, with a word; the ranks' work goes on."""
        for sink in list(self._sinks):
            try:
                tell(sink)
            except Exception as error:  # noqa: BLE001  # whatever a display or a disk may raise
                self._sinks.remove(sink)
                self._say(f"{type(sink).__name__} stopped ({type(error).__name__}: {error}); the run goes on")

    # ── what goes out ─────────────────────────────────────────────────────────────────────────────

    def _call(self) -> None:
        """All ranks are there: let them run the function."""
        self._phase = "running"
        if self._limits.run is not None:
            self._deadline = time.monotonic() + self._limits.run
        else:
            self._deadline = float("inf")
        for rank, channel in enumerate(self._ports.channels):
            wanted = self._delivery.returns == "all" or (self._delivery.returns == "rank0" and rank == 0)
            self._fold(Status(rank=rank, state="running"))
            try:
                channel.send(Call(0, wanted))
            except ChannelClosed:
                pass  # it died just now: its exit says so

    def _end(self, reason: Reason) -> None:
        if self._phase == "stopping":
            return
        before = self._ending.reason
        self._ending.begin(reason, time.monotonic())
        if self._phase == "starting" and reason != "failed":
            self._startup_error = self._startup_error or LaunchError("interrupted while the ranks started")
            self._stop()
            return
        if self._phase == "starting" and self._startup_error is None:
            self._startup_error = self._start_failure()
        self._phase = "ending"
        self._deadline = float("inf")
        if before is None:
            # also after a failure: a rank that has returned must not wait for its grace to pass
            for channel in self._ports.channels:
                try:
                    channel.send(Exit())
                except ChannelClosed:
                    pass  # it has left already

    def _signal(self, number: signal.Signals) -> None:
        alive = [known.rank for known in self._state.ranks if known.exitcode is None]
        for rank in alive:
            self._signalled[rank] = number
        self._engine.kill(self._ports, alive, number)

    def _all_ended(self) -> bool:
        return all(known.exitcode is not None for known in self._state.ranks)

    def _give_up(self, error: NbaccelError) -> None:
        self._startup_error = self._startup_error or error
        self._stop()

    def _stop(self) -> None:
        """Let the run's own process end whatever is left, and wait for its end."""
        self._phase = "stopping"
        self._deadline = time.monotonic() + _GONE
        self._engine.stop(self._ports)

    def _late(self) -> LaunchError:
        if not self._opened:
            return LaunchError(
                f"the server that makes ranks was not ready in {_SERVER_START:g} s.\n{self._engine.log()}"
            )
        states = "\n".join(
            f"  rank {known.rank}: {known.state} {known.detail}" for known in self._state.ranks
        )
        return LaunchError(
            f"not all ranks were ready in {self._limits.start:g} s (start_timeout):\n{states}\n"
            "Opening the arguments or setting up the device takes longer: give start_timeout=… more seconds."
        )

    def _start_failure(self) -> LaunchError:
        rank, event = next(iter(self._failures.items()))
        if isinstance(event, Raised):
            text = "\n".join(render(event.info, self._label, title=f"rank {rank}", colour=False))
            return LaunchError(f"rank {rank} could not be set up.\n{text}")
        words = "\n".join(self._state.ranks[rank].last_lines(20))
        return LaunchError(f"rank {rank} ended while it was set up, exit code {event.exitcode}.\n{words}")

    # ── the end ───────────────────────────────────────────────────────────────────────────────────

    def _finish(self, problem: BaseException | None) -> None:
        """Close everything, then resolve: whoever waits finds nothing left."""
        for rank in range(self._spec.num_processes):
            if problem is None:
                self._drain_output(rank)
        try:
            ended = Ended(
                num_ranks=self._spec.num_processes,
                reason=self._ending.reason,
                startup_error=self._startup_error,
                failures=self._failures,
                signalled=self._signalled,
                values=self._values,
                errors=self._errors,
                last_words={known.rank: known.last_lines(20) for known in self._state.ranks},
                limits=self._limits,
                folder=self._folder,
            )
            outcome: Results | BaseException = problem or conclude(ended, self._label)
        except BaseException as error:  # noqa: BLE001  # a value that cannot be loaded: the caller is told
            outcome = error
        self._close()
        self._tell_sinks(lambda sink: sink.close(self._state))
        if isinstance(outcome, Results):
            for complaint in self._expected.values():
                self._say(complaint)
        if isinstance(outcome, BaseException):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)

    def _unwatch(self) -> None:
        """Let go of the present ports."""
        ports = self._ports
        everything: list[Any] = [ports.control, *ports.channels, *ports.stdouts, *ports.stderrs]
        for watched in everything:
            if watched in self._selector.get_map():
                self._selector.unregister(watched)
        ports.control.close()
        for channel in ports.channels:
            channel.close()
        for fd in (*ports.stdouts, *ports.stderrs):
            os.close(fd)

    def _close(self) -> None:
        self._unwatch()
        self._selector.close()
        for _, fd in (*self._values.values(), *self._errors.values()):
            if fd is not None:
                os.close(fd)
        if self._delivery.fd is not None:
            os.close(self._delivery.fd)
        os.close(self._command_write)
        os.close(self._commands)
