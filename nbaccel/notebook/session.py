"""Ranks that stay: a session runs functions and cells on the same N processes, one after another."""

from __future__ import annotations

import functools
import operator
import re
import sys
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Literal, final, get_args

from nbaccel.config import Device, Precision, RunConfig, StartMethod, combine, duration_seconds
from nbaccel.engines.local import LocalEngine
from nbaccel.errors import ConfigError, LaunchError, PayloadError
from nbaccel.notebook.definitions import Definitions
from nbaccel.notebook.front import Dashboard, LateFront
from nbaccel.notebook.kernel import cell_label, cell_source, running_cell
from nbaccel.notebook.streams import say
from nbaccel.notebook.view import SessionView, Waiting
from nbaccel.parallel import StrategyLike
from nbaccel.rank import namespace, shell
from nbaccel.rank.debugger import is_persons
from nbaccel.session import parking
from nbaccel.session.call import CallInFlight, Delivery
from nbaccel.session.doctor import Idle
from nbaccel.session.ending import Limits
from nbaccel.session.environment import probe
from nbaccel.session.interrupts import Presses
from nbaccel.session.looking import look_at
from nbaccel.session.outcome import interrupted
from nbaccel.session.record import record
from nbaccel.session.relay import Relay
from nbaccel.session.request import Configuration, make_folder, read_config, read_variables
from nbaccel.session.resolve import Plan, resolve
from nbaccel.session.restarts import attempt, run_again
from nbaccel.session.results import Results, rank_ranges
from nbaccel.session.run import Run
from nbaccel.session.session import Task, check_call, default_start_method, make_spec
from nbaccel.session.sinks.text import Mode
from nbaccel.session.stacks import StackReport
from nbaccel.session.state import RunState
from nbaccel.wire import payload

__all__ = ["Session", "idle_sessions"]

_sessions: weakref.WeakSet[Session] = weakref.WeakSet()
"""Of this process, for the doctor."""


def idle_sessions() -> list[Idle]:
    """This process's sessions that have nothing to do now."""
    return sorted((idle for one in _sessions if (idle := one.idle) is not None), key=lambda one: one.name)


@final
class Session:
    """N ranks that stay, each with its own variables and a process group that is ready.

    Every rank finds `rank`, `local_rank`, `world_size`, `device` and `dist` in its namespace. Use it as a
    context manager, or `close` it; it also ends with this process, whatever ends that.

    Args:
        num_processes: ranks; None is every accelerator, or on the CPU every core this process may use.
        device, devices, mixed_precision, strategy, config, env, start_method: as `nbaccel.launch`.
        grace: seconds ranks have after an interrupt, or after another rank failed, before they are replaced
            and their variables lost.
        start_timeout: seconds until all ranks must be ready.
        output: how what ranks print is shown: "auto", "all", "rank0" or "none".
        stall_after: as `nbaccel.launch`.
        idle_stop: seconds, or "30min", without a call after which the session ends by itself.
        max_restarts: how many times `run`, and `notebook_launcher(session=…)`, call a function again after a
            rank has failed: ranks that were lost are replaced first, the others keep their variables.
        name: what it is called in messages.
        replaces: a session that makes way for this one: it is closed once what is asked here can be done.

    Raises:
        ConfigError: something asked cannot be done; nothing was started.
        LaunchError: the ranks could not be brought up.
    """

    def __init__(
        self,
        num_processes: int | None = None,
        *,
        device: Device | None = None,
        devices: Sequence[int] | Literal["free"] | None = None,
        mixed_precision: Precision | None = None,
        strategy: StrategyLike | None = None,
        config: Configuration | None = None,
        env: Mapping[str, str] | None = None,
        start_method: StartMethod | None = None,
        grace: float = 5.0,
        start_timeout: float | str = 60,
        output: Mode = "auto",
        stall_after: float | str = 30,
        idle_stop: float | str | None = None,
        max_restarts: int | None = None,
        name: str = "session",
        replaces: Session | None = None,
    ) -> None:
        asked = {
            "num_processes": num_processes,
            "device": device,
            "devices": devices,
            "mixed_precision": mixed_precision,
            "strategy": strategy,
            "start_method": start_method,
            "max_restarts": max_restarts,
        }
        if output not in get_args(Mode):
            raise ConfigError(f"output={output!r}: one of {', '.join(get_args(Mode))}")
        self.name = name
        self._config = _settings(asked, config)
        self._env = read_variables(env)
        self._limits = Limits(
            start=duration_seconds(start_timeout, what="start_timeout"),
            grace=0.0 if grace == 0 else duration_seconds(grace, what="grace"),
            stall=0.0 if stall_after == 0 else duration_seconds(stall_after, what="stall_after"),
            hang=Limits.hang_after(self._config.collective_timeout),
        )
        self._idle_stop = None if idle_stop is None else duration_seconds(idle_stop, what="idle_stop")
        self._environment = probe()
        self._view = SessionView(self._environment, self._config, output)
        self._plan: Plan = resolve(self._config, self._environment)
        if self._plan.in_place:
            raise ConfigError(
                "this process already is a rank (RANK and WORLD_SIZE are set): a session starts its own"
            )
        for note in self._plan.notes:
            say(note)
        self._latest: CallInFlight | None = None
        self.definitions = Definitions()
        """What the ranks know of the notebook's names, for `%%ranks` cells."""
        if replaces is not None:
            replaces.close()
        self._relay = self._start()
        _sessions.add(self)

    # ── calls ─────────────────────────────────────────────────────────────────────────────────────

    def run(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Results:
        """Run `function(*args, **kwargs)` on every rank; their values, in rank order.

        Raises: as `Run.result`. The session goes on after a failure or an interrupt.
        """
        return self._perform(_task(function, args, kwargs))

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Run:
        """Let the ranks run it, once, after the calls before it; returns at once."""
        return self._submit(_task(function, args, kwargs), dashboard="auto")

    def execute(
        self,
        source: str,
        ranks: Collection[int] | None = None,
        *,
        first_line: int = 1,
    ) -> Results:
        """Run a cell's text on these ranks (None: all) as a notebook would; what each last expression shows.

        Args:
            first_line: where `source` begins in the notebook's cell that runs now.

        Raises: as `run`.
        """
        filename, number = running_cell() or (None, 1)
        cell = shell.Cell(source=source, filename=filename, number=number, first_line=first_line)
        task = _task(shell.run_cell, (cell,), {}, "cell")
        return self._finish(self._submit(task, ranks=ranks))

    def warm_up(self) -> None:
        """Let the ranks make what their first cell needs; returns at once."""
        self._submit(_task(shell.warm_up, (), {}, "warm up"), shown=False)

    def define(
        self,
        definitions: Mapping[str, Any],
        ranks: Collection[int] | None = None,
        *,
        reloaded: Sequence[str] = (),
    ) -> None:
        """Set the notebook's definitions in these ranks (None: all).

        Args:
            reloaded: modules to reload there before.

        Raises: as `run`.
        """
        if reloaded:
            reload = _task(namespace.reload, (tuple(reloaded),), {}, "reload")
            self._finish(self._submit(reload, ranks=ranks))
        if definitions:
            self._finish(
                self._submit(_task(namespace.push, (dict(definitions),), {}, "definitions"), ranks=ranks)
            )

    def push(self, /, **values: Any) -> None:
        """Set these names in every rank.

        Raises:
            PayloadError: a value cannot be sent; nothing was.
        """
        try:
            run = self._submit(_task(namespace.push, (values,), {}, "push"))
        except PayloadError as error:
            told = re.sub(r"^args\[0\]\['(\w+)'\]", r"\1", str(error))  # as the person calls it
            raise PayloadError(told.replace("inside the function", "in the ranks")) from error.__cause__
        self._finish(run)

    def bound(
        self, names: Collection[str], ranks: Collection[int] | None = None
    ) -> dict[int, tuple[str, ...]]:
        """By rank (None: all), those of these names that have a value there.

        Raises: as `run`.
        """
        chosen = self._checked(ranks)
        task = _task(namespace.bound, (tuple(names),), {}, "names")
        return dict(zip(chosen, self._finish(self._submit(task, ranks=chosen)), strict=True))

    def pull(self, name: str, ranks: Collection[int] | None = None) -> Results:
        """The value of a name, or of a dotted path ("model.fc.weight"), on these ranks (None: all).

        Raises:
            WorkerError: a rank has no such name.
        """
        return self._finish(self._submit(_task(namespace.pull, (name,), {}, "pull"), ranks=ranks))

    def variables(self, ranks: Collection[int] | None = None) -> dict[int, list[namespace.Variable]]:
        """Every variable of each rank: type, shape, dtype, device, bytes and a checksum of its value."""
        chosen = self._checked(ranks)
        found = self._finish(self._submit(_task(namespace.variables, (), {}, "vars"), ranks=chosen))
        return dict(zip(chosen, found, strict=True))

    def launch(self, task: Task) -> Results:
        """What `notebook_launcher(f, session=…)` does."""
        return self._perform(task, dashboard="auto")

    def complete(self, text: str, cursor: int, ranks: Collection[int] | None = None) -> shell.Completions:
        """What could stand at `cursor` in a cell, by the first of these ranks' names; nothing while they work."""
        nothing = shell.Completions("", ())
        if self._relay.busy:
            return nothing
        first = self._checked(ranks)[0]
        run = self._submit(_task(shell.complete, (text, cursor), {}, "complete"), ranks=[first], shown=False)
        try:
            found: shell.Completions = run.result(timeout=2.0)[0]
        except TimeoutError:
            run.interrupt()
            return nothing
        return found

    # ── the ranks ─────────────────────────────────────────────────────────────────────────────────

    @property
    def num_processes(self) -> int:
        """How many ranks there are."""
        return self._plan.num_processes

    @property
    def state(self) -> RunState:
        """What is known of every rank now."""
        return self._relay.state

    @property
    def latest(self) -> RunState:
        """What became of the latest cell or function: what only asks for variables or frames leaves it alone."""
        return self.state if self._latest is None else self._latest.state

    @property
    def closed(self) -> bool:
        """Whether it has ended, by `close`, `idle_stop` or because its processes were killed."""
        return self._relay.over

    @property
    def idle(self) -> Idle | None:
        """For how long it has had nothing to do; None while it works, and once it has ended."""
        seconds = self._relay.idle_for
        device = self._plan.device
        return None if seconds is None else Idle(name=self.name, device=device, seconds=seconds)

    @property
    def relay(self) -> Relay:
        """What drives the ranks, for reports about them."""
        return self._relay

    def stacks(self) -> StackReport:
        """What every rank is doing now, and who waits for whom. Takes 0.1 to 0.3 s.

        Raises:
            ConfigError: the session has ended.
        """
        if self.closed:
            raise ConfigError(f"the {self.name} has ended: its ranks have no stacks any more")
        return self._relay.look()

    def debug(self, rank: int) -> None:
        """Open pdb on the frames of a rank whose last call failed, at this cell's input box; `q` leaves it.

        Raises:
            ConfigError: no failure of it is kept.
        """
        look_at(self._relay, self._checked([rank])[0])

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt in the ranks that run something; they keep their variables."""
        self._relay.interrupt_current()

    def restart(self) -> None:
        """End every rank and start fresh ones, without variables."""
        self.close()
        self._latest = None
        self._relay = self._start()

    def close(self) -> None:
        """End the ranks and what they started; may be called twice.

        Raises:
            KeyboardInterrupt: ■ was pressed meanwhile; the session has ended all the same.
        """
        with Presses() as presses:
            self._relay.close()
            self._relay.join()
            presses.absorb()
        if presses.pressed:
            raise interrupted(f"the {self.name} was ending, and has ended")

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        states: dict[str, list[int]] = {}
        for known in self.state.ranks:
            state = "idle" if known.state in ("done", "failed") else known.state
            states.setdefault("closed" if self.closed else state, []).append(known.rank)
        text = ", ".join(f"{state}: {rank_ranges(ranks)}" for state, ranks in states.items())
        return f"<Session {self.name!r} on {self._plan.device}, ranks {text}>"

    # ── within ────────────────────────────────────────────────────────────────────────────────────

    def _start(self) -> Relay:
        parking.release()
        spec = make_spec(self._config, self._plan, self._env, keep=True)
        parcel, fd = payload.pack((int, (), {}), outward=True)
        relay = Relay(
            LocalEngine(self._config.start_method or default_start_method()),
            spec,
            Delivery(parcel=parcel, fd=fd, returns="none"),
            start_limit=self._limits.start,
            say=say,
            label=cell_label,
            idle_sink=self._view.between_calls(self.num_processes),
            idle_stop=self._idle_stop,
        )
        with Presses() as presses:
            relay.ready.add_done_callback(lambda _: presses.done())
            while not relay.ready.done():
                if presses.wait(None) == "press":
                    relay.close()
                    relay.join()
                    raise interrupted("the session was still starting")
        if relay.ready.exception() is not None:
            relay.join()
        relay.ready.result()
        return relay

    def _perform(self, task: Task, *, dashboard: Dashboard = False) -> Results:
        """The task's values, called again after a failure as often as was asked."""
        limit = self._config.max_restarts or 0
        with Presses() as presses:
            run = run_again(
                lambda number: self._submit(
                    task, dashboard=dashboard, plan=attempt(self._plan, number, limit)
                ),
                lambda run: run.wait_done(presses),
                limit=limit,
                resumes=self._config.resume == "auto",
                say=say,
                report=lambda error: print("\n".join(error.rendered), file=sys.stderr, flush=True),
            )
            presses.absorb()
        return run.take_result()

    def _submit(
        self,
        task: Task,
        *,
        ranks: Collection[int] | None = None,
        dashboard: Dashboard = False,
        shown: bool = True,
        plan: Plan | None = None,
        done: Callable[[Future[Results]], None] = lambda _: None,
    ) -> Run:
        if self.closed:
            raise LaunchError(f"the {self.name} has ended: start another, or restart() this one")
        chosen = self._checked(ranks)
        check_call(task)
        parcel, fd = payload.pack((task.function, task.args, dict(task.kwargs)), outward=True)
        made: list[Run] = []
        # what is only shown, as a cell's text, is in the notebook already
        folder = make_folder(task.name, None, say) if dashboard is not False else None
        plan = plan or self._plan
        build = functools.partial(
            self._view.front, task.name, plan, folder=folder, dashboard=dashboard, made=made
        )
        late = LateFront(build) if shown and dashboard is False else None  # a cell waits for it
        front = build() if shown and late is None else None
        kept = record(
            folder,
            task,
            config=self._config,
            plan=plan,
            environment=self._environment,
            cell=cell_source(),
            report=say,
        )
        call = CallInFlight(
            Delivery(parcel=parcel, fd=fd, returns=task.returns),
            [*(() if front is None else front.sinks), *kept],
            num_ranks=self.num_processes,
            ranks=chosen,
            limits=self._limits,
            say=say,
            label=cell_label,
            keep=True,
            folder=str(folder) if folder else None,
            late_sinks=None if late is None else late.sinks,
        )
        shows = late or front
        run = Run(
            self._relay,
            call,
            name=task.name,
            folder=folder,
            meanwhile=None if shows is None else Waiting(call, shows.meanwhile),
            heading=None if front is None else front.heading,
            show=None if front is None else front.show,
        )
        made.append(run)
        if is_persons(task.function):
            self._latest = call
            if parcel.modules:
                self._renew_modules(call, parcel.modules)
            self._note_what_comes_along(call, task)
        call.future.add_done_callback(done)
        # last: the relay's thread takes the interpreter from here on
        self._relay.submit(call)
        return run

    def _renew_modules(self, call: CallInFlight, modules: Sequence[str]) -> None:
        """Before a call, let its ranks read again what it comes from and the notebook has read again."""
        pids = {rank: self.state.ranks[rank].pid for rank in call.ranks}
        outdated, undo = self.definitions.note_modules(modules, pids)
        call.future.add_done_callback(lambda _: None if call.id >= 0 else undo())

        def look(done: Future[Results]) -> None:
            if (error := done.exception()) is not None:
                undo()
                call.say(f"the ranks could not read a module again, and go on with what they had: {error}")

        for names, ranks in outdated.items():
            task = _task(namespace.reload, (names,), {}, "reload")
            self._submit(task, ranks=ranks, shown=False, done=look)

    def _note_what_comes_along(self, call: CallInFlight, task: Task) -> None:
        """The notebook's data that the call's functions refer to: `%%ranks` cells need not send it again."""
        pids = {rank: self.state.ranks[rank].pid for rank in call.ranks}
        notebook = sys.modules["__main__"].__dict__
        undo = self.definitions.note_called((task.function, task.args, task.kwargs), notebook, pids)
        call.future.add_done_callback(lambda _: None if call.id >= 0 else undo())

    def _finish(self, run: Run) -> Results:
        with Presses() as presses:
            run.wait_done(presses)
            presses.absorb()
        return run.take_result()

    def _checked(self, ranks: Collection[int] | None) -> tuple[int, ...]:
        if ranks is None:
            return tuple(range(self.num_processes))
        try:
            chosen = sorted({operator.index(rank) for rank in ranks})
        except TypeError:
            raise ConfigError(f"ranks={ranks!r}: write them as a list of numbers, [0, 2]") from None
        wrong = [rank for rank in chosen if rank not in range(self.num_processes)]
        if wrong or not chosen:
            what = f"there is no rank {rank_ranges(wrong)}" if wrong else "no rank was chosen"
            raise ConfigError(f"{what}: this session has ranks 0 to {self.num_processes - 1}")
        return tuple(chosen)


def _task(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str | None = None
) -> Task:
    called = name or getattr(function, "__name__", None) or type(function).__name__
    return Task(function=function, args=args, kwargs=kwargs, name=called)


def _settings(asked: Mapping[str, Any], config: Configuration | None) -> RunConfig:
    """The options that were asked for, with those in `config`."""
    given = {name: value for name, value in asked.items() if value is not None}
    layers = [RunConfig.from_mapping(given, place="the session")]
    return combine(*layers, *([] if config is None else [read_config(config)]))
