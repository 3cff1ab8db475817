"""Looking at ranks from outside, whatever their main threads do; no ptrace.

Three ways, each used when the one before is silent: the rank's reporter thread answers; our signal makes
faulthandler write every stack into the rank's memory file, which is read here; /proc says what became of
the process. DataLoader workers have inherited signal and file, and are asked one after another.
"""

from __future__ import annotations

import itertools
import os
import re
import select
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from nbaccel.rank.reporter import STACKS_SIGNAL
from nbaccel.rank.spec import Free
from nbaccel.session.stacks import Condition, Process, RankView, WorkerView
from nbaccel.wire.channel import Channel, ChannelClosed
from nbaccel.wire.snapshot import Answer, Ask, Line, Records, Stacks, Thread, Vitals

__all__ = ["Probes", "crash_stack"]

_WINDOW = 0.1  # processor time is told over this long, so an answer may take as long for nothing
_PATIENCE = 0.25  # eight busy Python threads answer after this long
_SIGNAL_ANSWER = 0.05
_UNANSWERED = 1.0
_MOST_WORKERS = 16
_TEXT = 1 << 18
_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)')
_THREAD = re.compile(r"(?P<which>Thread|Current thread) (?P<ident>0x[0-9a-f]+).*\(most recent call first\):")


@dataclass(slots=True)
class _Probe:
    """One rank's."""

    pid: int
    channel: Channel
    memory: int | None
    answers: dict[int, Answer] = field(default_factory=dict)
    unanswered: int | None = None
    """The last question that is still open: no further one is sent meanwhile."""
    silent_since: float = 0.0
    """When the first question was asked that has not been answered; counts while one is open."""
    still: float = 0.0
    vitals: Vitals | None = None
    """The latest, until somebody takes them."""

    def silent(self, now: float) -> float:
        """For how many seconds it owes an answer."""
        return now - self.silent_since if self.unanswered is not None else 0.0


@final
class Probes:
    """The ranks of one run or session. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._probes: dict[int, _Probe] = {}

    def add(self, rank: int, pid: int, descriptors: Sequence[int]) -> None:
        """Watch a rank through what its reporter has sent; it takes the descriptors over."""
        self.drop(rank)
        with self._lock:
            memory = descriptors[1] if len(descriptors) > 1 else None
            self._probes[rank] = _Probe(pid, Channel.from_fd(descriptors[0]), memory)

    def drop(self, rank: int) -> None:
        """Let go of a rank that has ended."""
        with self._lock:
            old = self._probes.pop(rank, None)
            if old is not None:
                _close(old)

    def close(self) -> None:
        """Let go of every rank; may be called twice."""
        with self._lock:
            for probe in self._probes.values():
                _close(probe)
            self._probes.clear()

    def free(self, rank: int, peers: Sequence[int]) -> None:
        """Have a rank let go of the collective it waits in, by closing its connections to these processes."""
        if (probe := self._probes.get(rank)) is not None:
            try:
                probe.channel.send(Free(tuple(peers)))
            except ChannelClosed:
                pass  # it died just now

    def crash(self, rank: int) -> tuple[Line, ...]:
        """The stack of a rank that a signal has ended; see `crash_stack`."""
        with self._lock:
            probe = self._probes.get(rank)
            return () if probe is None or probe.memory is None else crash_stack(probe.memory)

    def pulse(self) -> dict[int, float]:
        """Have every reporter note where its main thread is. By rank: for how many seconds it has not moved
        or not answered, as of the answers that have come. Never waits."""
        with self._lock:
            now = time.monotonic()
            for probe in self._probes.values():
                self._take(probe)
                self._ask(probe, "pulse")
            return {rank: max(probe.still, probe.silent(now)) for rank, probe in self._probes.items()}

    def take_vitals(self) -> dict[int, Vitals]:
        """What reporters have told of their ranks since the last call."""
        with self._lock:
            told = {rank: probe.vitals for rank, probe in self._probes.items() if probe.vitals is not None}
            for rank in told:
                self._probes[rank].vitals = None
            return told

    def look(
        self, num_ranks: int, ended: Mapping[int, str] | None = None, *, first_rank: int = 0
    ) -> tuple[RankView, ...]:
        """Every rank's stacks and collectives now. Takes a tenth of a second, three when ranks are silent.

        Args:
            first_rank: what is added to a rank's number here, on one of several hosts.
            ended: how the call of a rank ended, for those whose call has.
        """
        with self._lock:
            start = time.monotonic()
            usage = {rank: _cpu_seconds(probe.pid) for rank, probe in self._probes.items()}
            for probe in self._probes.values():
                self._take(probe)
            asked = {rank: self._ask_for_all(probe) for rank, probe in self._probes.items()}
            self._wait(asked, start + _WINDOW)
            if any(not self._has_all(rank, asked) for rank in asked):
                self._wait(asked, start + _PATIENCE)
            time.sleep(max(0.0, start + _WINDOW - time.monotonic()))
            views = []
            for rank in range(num_ranks):
                how = (ended or {}).get(rank, "")
                if rank not in self._probes:
                    condition: Condition = "gone" if how else "starting"
                    views.append(RankView(rank=first_rank + rank, pid=None, condition=condition, ended=how))
                    continue
                probe = self._probes[rank]
                process = _process(probe.pid, usage[rank], time.monotonic() - start)
                view = self._view(first_rank + rank, probe, asked[rank], process, how)
                views.append(view)
            return tuple(views)

    # ── the reporters ─────────────────────────────────────────────────────────────────────────────

    def _ask(self, probe: _Probe, what: str, *, anyway: bool = False) -> int | None:
        """The question's number; None when the last one is still open (a stopped rank's socket fills up)."""
        if probe.unanswered is not None and not anyway:
            return None
        ask = Ask(next(self._ids), what)  # type: ignore[arg-type]
        try:
            probe.channel.send(ask)
        except ChannelClosed:
            return None  # /proc will tell
        if probe.unanswered is None:
            probe.silent_since = time.monotonic()
        probe.unanswered = ask.id
        return ask.id

    def _ask_for_all(self, probe: _Probe) -> tuple[int, int] | None:
        if probe.silent(time.monotonic()) > _UNANSWERED:
            return None  # silent for long: a question more would only lie there
        # stacks first: they matter more, and records take longer
        first, second = self._ask(probe, "stacks", anyway=True), self._ask(probe, "records", anyway=True)
        return None if first is None or second is None else (first, second)

    def _take(self, probe: _Probe) -> None:
        """Read the answers that have come."""
        if probe.channel.eof:
            return
        for answer, _ in probe.channel.drain():
            probe.still, probe.silent_since = answer.still, time.monotonic()
            probe.vitals = answer.vitals or probe.vitals
            if answer.id == probe.unanswered:
                probe.unanswered = None
            if answer.body is not None:
                probe.answers[answer.id] = answer

    def _has_all(self, rank: int, asked: Mapping[int, tuple[int, int] | None]) -> bool:
        ids, probe = asked[rank], self._probes[rank]
        return ids is None or probe.channel.eof or all(number in probe.answers for number in ids)

    def _wait(self, asked: Mapping[int, tuple[int, int] | None], until: float) -> None:
        while True:
            left = until - time.monotonic()
            open_ones = [rank for rank in asked if not self._has_all(rank, asked)]
            if left <= 0 or not open_ones:
                return
            poll = select.poll()
            for rank in open_ones:
                poll.register(self._probes[rank].channel, select.POLLIN)
            if poll.poll(left * 1000):
                for rank in open_ones:
                    self._take(self._probes[rank])

    # ── one rank ──────────────────────────────────────────────────────────────────────────────────

    def _view(
        self, rank: int, probe: _Probe, asked: tuple[int, int] | None, process: Process, ended: str
    ) -> RankView:
        stacks, records = (probe.answers.pop(number, None) for number in asked or (0, 0))
        probe.answers.clear()
        body = stacks.body if stacks is not None and isinstance(stacks.body, Stacks) else None
        told = records.body if records is not None and isinstance(records.body, Records) else Records()
        seconds = probe.still
        condition: Condition = "answers"
        threads = body.threads if body else ()
        if body is None:
            seconds = probe.silent(time.monotonic())
            condition = "stopped" if process.state == "T" else "silent"
            if process.state in ("", "Z", "X"):
                condition = "gone"
            elif condition == "silent":
                threads = self._signalled(probe, probe.pid)
        # of the others a stack tells nothing, and each takes some milliseconds
        children = body.children if body and _waits_for_workers(threads) else ()
        return RankView(
            rank=rank,
            pid=probe.pid,
            condition=condition,
            seconds=seconds,
            threads=threads,
            records=told,
            peer=body.peer if body else None,
            process=process,
            workers=tuple(
                WorkerView(pid=pid, name=name, process=_process(pid), threads=self._signalled(probe, pid))
                for pid, name in children[:_MOST_WORKERS]
            ),
            ended=ended,
        )

    def _signalled(self, probe: _Probe, pid: int) -> tuple[Thread, ...]:
        """Stacks by faulthandler; none from a process that does not know our signal."""
        if probe.memory is None or STACKS_SIGNAL is None or not _catches(pid, STACKS_SIGNAL):
            return ()
        if _process(pid).state == "T":
            return ()  # it would be answered at SIGCONT, into somebody else's question
        before = os.fstat(probe.memory).st_size
        try:
            os.kill(pid, STACKS_SIGNAL)
        except (ProcessLookupError, PermissionError):
            return ()
        return _parse(_when_written(probe.memory, before))


def _waits_for_workers(threads: Sequence[Thread]) -> bool:
    frames = next((thread.frames for thread in threads if thread.main), ())
    return any("_next_data" in line.function or "_try_get_data" in line.function for line in frames)


def _close(probe: _Probe) -> None:
    probe.channel.close()
    if probe.memory is not None:
        os.close(probe.memory)
        probe.memory = None


def crash_stack(memory: int) -> tuple[Line, ...]:
    """The stack faulthandler wrote when the process crashed, the innermost frame first; empty if it did not."""
    text = os.pread(memory, _TEXT, max(0, os.fstat(memory).st_size - _TEXT)).decode(errors="replace")
    _, found, crash = text.rpartition("Fatal Python error:")
    threads = _parse(crash) if found else ()
    return next((thread.frames for thread in threads if thread.name == "current"), ())


def _when_written(memory: int, before: int) -> str:
    """What was appended, once it has stopped growing."""
    end, size = time.monotonic() + _SIGNAL_ANSWER, before
    while time.monotonic() < end:
        time.sleep(0.002)
        now = os.fstat(memory).st_size
        if now == size and now > before:
            break
        size = now
    return os.pread(memory, _TEXT, before).decode(errors="replace")


def _parse(text: str) -> tuple[Thread, ...]:
    """faulthandler's text. The main thread is the last one it lists: it walks from the newest."""
    threads: list[tuple[str, list[Line]]] = []
    for line in text.splitlines():
        if head := _THREAD.match(line):
            threads.append(("current" if head["which"].startswith("Current") else head["ident"], []))
        elif (frame := _FRAME.match(line)) and threads:
            threads[-1][1].append(Line(frame["file"], int(frame["line"]), frame["function"]))
    last = len(threads) - 1
    found = [Thread(name, 0, tuple(frames), main=i == last) for i, (name, frames) in enumerate(threads)]
    return tuple(sorted(found, key=lambda thread: not thread.main))


# ── /proc ─────────────────────────────────────────────────────────────────────────────────────────────


def _process(pid: int, used: float | None = None, elapsed: float = 0.0) -> Process:
    """A process's state; its processor use since it had used `used` seconds, `elapsed` seconds ago."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state = file.read().rpartition(b")")[2].split()[0].decode()
    except (OSError, IndexError):
        return Process()
    now = _cpu_seconds(pid)
    cpu = None if used is None or now is None or elapsed <= 0 else 100 * max(0.0, now - used) / elapsed
    try:
        with open(f"/proc/{pid}/wchan") as file:
            wchan = file.read().strip("0\n")
    except OSError:
        wchan = ""
    return Process(state="T" if state == "t" else state, cpu=cpu, wchan=wchan)


def _cpu_seconds(pid: int) -> float | None:
    """Processor time of all threads, to the nanosecond (`stat` counts in hundredths of a second)."""
    total = 0
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/schedstat", "rb") as file:
                total += int(file.read().split()[0])
    except (OSError, IndexError, ValueError):
        return None
    return total / 1e9


def _catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for this signal: without one it would be killed by it."""
    try:
        with open(f"/proc/{pid}/status") as file:
            for line in file:
                if line.startswith("SigCgt:"):
                    return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    except (OSError, IndexError, ValueError):
        pass  # gone, or no /proc
    return False
