"""The thread of a rank that answers while the main thread is busy or blocked.

It sleeps in `recv` and costs nothing until it is asked. When C code holds the interpreter's lock it is
silent: then a signal makes faulthandler write every stack into a memory file that the notebook's process
reads, with no help from this one. The notebook's process gets both descriptors with the rank's first
"idle". Anything else about a rank (stopped, gone, how busy) is seen from outside.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from types import CodeType, FrameType
from typing import Any, final

from nbaccel.rank import here
from nbaccel.rank.free import close_connections
from nbaccel.rank.membership import num_called
from nbaccel.rank.spec import Free
from nbaccel.rank.vitals import Gauge
from nbaccel.wire.channel import Channel, ChannelClosed, pair
from nbaccel.wire.snapshot import Answer, Ask, Collective, Line, Peer, Records, Stacks, Thread

__all__ = ["STACKS_SIGNAL", "Reporter"]

# A real-time signal: SIGUSR1 belongs to the user (Slurm, Lightning). None where there are none (macOS).
STACKS_SIGNAL: int | None = getattr(signal, "SIGRTMIN", 0) + 12 if hasattr(signal, "SIGRTMIN") else None

_DEEPEST = 100
_C10D = os.path.join("torch", "distributed", "distributed_c10d.py")
# More wake-ups a second than this: the thread works, in many short waits.
_WAKES = 4.0
# Two looks that lie further apart, in seconds, say nothing of the time between them.
_APART = 3.0


@final
class Reporter:
    """Set up in the rank's main thread; `start` begins to answer.

    Attributes:
        descriptors: what the notebook's process needs: its end of the socketpair, then the memory file that
            holds what faulthandler writes (not everywhere). `start` closes this process's copy of the first.

    Args:
        local_rank: the index of this rank's accelerator.
        moves: how often each thread, by its ident, has told of progress in a loop or been given something to do.
        thread: the one that runs user code; None is the main thread.
    """

    def __init__(
        self, local_rank: int, *, moves: Mapping[int, int], thread: threading.Thread | None = None
    ) -> None:
        self._thread = thread or threading.main_thread()
        self._moves = moves
        ours, theirs = pair()
        self._channel = Channel(ours)
        self._theirs = theirs
        self._memory = _memory_file()
        self._gauge = Gauge(local_rank)
        self._complained = False
        self.descriptors = (theirs.fileno(), *(() if self._memory is None else (self._memory,)))

    def start(self) -> None:
        """Answer from now on; the descriptors have been sent."""
        self._theirs.close()
        # a worker that outlives this rank must not hold the connection open
        os.register_at_fork(after_in_child=self._channel.close)
        threading.Thread(target=self._answer_all, name="nbaccel-reporter", daemon=True).start()

    def _answer_all(self) -> None:
        _leave_signals_to_others()
        place: _Place | None = None
        try:
            while True:
                ask, _ = self._channel.recv()
                place = place or _Place(self._thread, self._moves)
                if isinstance(ask, Free):
                    close_connections(ask.pids)
                else:
                    self._channel.send(self._try_to_answer(ask, place))
        except (ChannelClosed, OSError):
            return  # the notebook's process is gone; the rank's own channel ends the rank

    def _try_to_answer(self, ask: Ask, place: _Place) -> Answer:
        """The answer; an empty one, and once a word in the rank's log, when torch or Python is not as we know
        them: the thread must go on."""
        try:
            return _answer(ask, place, self._gauge)
        except Exception as problem:  # noqa: BLE001  # whatever a private function of torch may raise
            if not self._complained:
                self._complained = True
                sys.stderr.write(f"nbaccel: no {ask.what} from this rank: {problem!r}\n")
            return Answer(ask.id, None)


def _answer(ask: Ask, place: _Place, gauge: Gauge) -> Answer:
    still = place.look()
    if ask.what == "stacks":
        return Answer(ask.id, _stacks(place), still)
    if ask.what == "records":
        return Answer(ask.id, _records(), still)
    return Answer(ask.id, None, still, gauge.read(place.codes, still, _pending))


def _pending() -> list[Collective]:
    return [one for one in _records().collectives if one.pending]


def _memory_file() -> int | None:
    """Let faulthandler write there, on our signal and at a crash. Inherited by DataLoader workers."""
    if STACKS_SIGNAL is None or not hasattr(os, "memfd_create"):
        return None
    fd = os.memfd_create("nbaccel-stacks")
    faulthandler.register(STACKS_SIGNAL, file=fd, all_threads=True, chain=False)
    if not faulthandler.is_enabled():
        faulthandler.enable(file=fd, all_threads=True)
    return fd


def _leave_signals_to_others() -> None:
    """The user's handlers run in the main thread; a blocked system call there must be the one to end."""
    if hasattr(signal, "pthread_sigmask"):
        own = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, STACKS_SIGNAL}
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - own)


@final
class _Place:
    """Where the thread that runs user code is (the main one, but for ranks that share a process) and since
    when, as far as it was looked at.

    A frame seen twice is the same one only if the thread did not work in between: a frame's address is
    used again by the next call. So nothing is said of a thread that computes, wakes up often, tells of progress or
    has been given something to do.
    That it computes does not make it move: a wait for a GPU does so too, in one place.

    Whoever holds a frame keeps its variables alive after it has returned. On XLA a tensor that lives a moment longer
    is one more result of the graph that is cut in this moment, on this rank alone: another graph than its peers',
    which is compiled anew and whose collectives meet nobody. So no frame is held longer than it is read, and those of
    a thread that traces graphs are read only while it stands still.
    """

    def __init__(self, thread: threading.Thread, moves: Mapping[int, int]) -> None:
        self.thread, self._moves = thread, moves
        self.codes: tuple[CodeType, ...] = ()
        """What it was in when it was last looked at, the innermost first."""
        self._seen: dict[tuple[int, int, int], float] = {}
        self._now: tuple[tuple[int, int, int], ...] = ()
        self._since = self._looked = time.monotonic()
        self._used, self._told = _usage(thread), self._moves.get(thread.ident or 0, 0)

    def look(self) -> float:
        """Look again; for how many seconds it has not moved."""
        now, used = time.monotonic(), _usage(self.thread)
        told = self._moves.get(self.thread.ident or 0, 0)
        elapsed = max(now - self._looked, 1e-3)
        cpu, wakes = used[0] - self._used[0], used[1] - self._used[1]
        moved = wakes > _WAKES * elapsed + 2 or told != self._told or elapsed > _APART
        worked = moved or cpu > 0.1 * elapsed + 0.02
        steps = () if worked and "torch_xla" in sys.modules else _steps(self.thread)
        self.codes = tuple(code for _, code, _ in steps)
        keys = tuple((frame, id(code), lineno) for frame, code, lineno in steps)
        if worked:
            self._seen = {}
        if moved or not keys or keys != self._now:
            self._since = now
        self._seen = {key: self._seen.get(key, now) for key in keys}
        self._now, self._looked, self._used, self._told = keys, now, used, told
        return now - self._since

    def lines(self) -> tuple[Line, ...]:
        """The main thread's frames now, the innermost first."""
        now = time.monotonic()
        return tuple(
            _line(frame, lineno, self._ago((id(frame), id(frame.f_code), lineno), now))
            for frame, lineno in _walk(sys._current_frames().get(self.thread.ident or 0))
        )

    def _ago(self, key: tuple[int, int, int], now: float) -> float | None:
        since = self._seen.get(key)
        return None if since is None or now - since < 0.5 else now - since


def _usage(thread: threading.Thread) -> tuple[float, int]:
    """Seconds of processor time and voluntary waits of a thread; zeros where /proc has none."""
    try:
        task = f"/proc/self/task/{_native_id(thread)}"
        with open(f"{task}/schedstat", "rb") as file:
            cpu = int(file.read().split()[0]) / 1e9
        with open(f"{task}/status", "rb") as file:
            for line in file:
                if line.startswith(b"voluntary_ctxt_switches:"):
                    return cpu, int(line.split()[1])
    except (OSError, IndexError, ValueError):
        pass  # not this platform: frames alone tell
    return 0.0, 0


def _native_id(thread: threading.Thread) -> int:
    """The system's number for a thread. Of the main one Linux has it from the process: Python may still have that of
    the process this one was forked from."""
    if thread is threading.main_thread() and sys.platform == "linux":
        return os.getpid()
    return thread.native_id or 0


def _walk(frame: FrameType | None) -> Iterator[tuple[FrameType, int]]:
    """Frames outwards, each with its line."""
    for _ in range(_DEEPEST):
        if frame is None:
            return
        yield frame, frame.f_lineno or 0
        frame = frame.f_back


def _steps(thread: threading.Thread) -> tuple[tuple[int, CodeType, int], ...]:
    """Each frame's address, code and line, the innermost first."""
    return tuple(
        (id(frame), frame.f_code, lineno)
        for frame, lineno in _walk(sys._current_frames().get(thread.ident or 0))
    )


def _line(frame: FrameType, lineno: int, seconds: float | None = None) -> Line:
    code = frame.f_code
    return Line(code.co_filename, lineno, getattr(code, "co_qualname", code.co_name), seconds)


def _stacks(place: _Place) -> Stacks:
    me, main = threading.get_ident(), place.thread.ident
    known = {thread.ident: thread for thread in threading.enumerate()}
    threads = []
    for ident, top in sys._current_frames().items():
        thread = known.get(ident)
        if ident == me or here.index_of(thread) != here.index_of(place.thread):
            continue
        name = thread.name if thread else "started by C code"
        native = 0 if thread is None else _native_id(thread)
        frames = place.lines() if ident == main else tuple(_line(*at) for at in _walk(top))
        threads.append(Thread(name, native, frames, main=ident == main))
    threads.sort(key=lambda thread: not thread.main)
    return Stacks(tuple(threads), _peer(main), _children())


def _peer(main: int | None) -> Peer | None:
    """Whom the main thread waits for in send or recv: they stand in the frame's variables."""
    for frame, _ in _walk(sys._current_frames().get(main or 0)):
        name = frame.f_code.co_name
        if name in ("send", "recv") and frame.f_code.co_filename.endswith(_C10D):
            local = frame.f_locals
            peer = local.get("dst" if name == "send" else "src")
            return Peer(name, peer if isinstance(peer, int) else None, int(local.get("tag") or 0))
    return None


def _children() -> tuple[tuple[int, str], ...]:
    """multiprocessing's own list: asking `active_children` would reap them."""
    children = getattr(sys.modules.get("multiprocessing.process"), "_children", ())
    return tuple((child.pid, child.name) for child in list(children) if child.pid)


# ── collectives ───────────────────────────────────────────────────────────────────────────────────────


def _records() -> Records:
    """What torch's flight recorders hold, gloo's and NCCL's; torch's counts where they hold nothing."""
    c10d = sys.modules.get("torch.distributed.distributed_c10d")
    if c10d is None or not getattr(c10d, "is_initialized", lambda: False)():
        return Records()
    groups = _groups(c10d)
    found = tuple(_recorded(c10d))
    counts = () if found else tuple(_counts(c10d))
    return Records(found, tuple(groups.items()), counts)


def _groups(c10d: Any) -> dict[str, tuple[int, ...]]:
    """Global ranks of each group this rank is in."""
    world = c10d._world
    return {
        str(world.pg_names.get(group, "")): tuple(sorted(ranks))
        for group, ranks in list(world.pg_group_ranks.items())
    }


def _recorded(c10d: Any) -> Iterator[Collective]:
    """What was called in this rank's groups, the oldest first."""
    native = sys.modules.get("torch._C._distributed_c10d")
    now = time.time_ns()
    entries: list[tuple[str, dict[str, Any]]] = []
    for dump_name, device in (("_dump_fr_trace", "cpu"), ("_dump_nccl_trace", "cuda")):
        if (dump := getattr(native, dump_name, None)) is None:
            continue
        # stacks are left out: the first dump with them imports 800 modules
        found = pickle.loads(dump(includeCollectives=True, includeStackTraces=False, onlyActive=False))
        of_group: dict[str, list[dict[str, Any]]] = {
            str(name): [] for name in list(c10d._world.pg_names.values())
        }
        for entry in found.get("entries", ()):
            earlier = of_group.get(str(entry["process_group"][0]))
            if earlier is None or entry.get("is_p2p"):
                continue
            # The numbers begin again when a group's name is given again or its connection is a new one.
            if earlier and entry["op_id"] <= earlier[-1]["op_id"]:
                earlier.clear()
            earlier.append(entry)
        # asked for behind the records, so that it is no lower than the latest one's number
        counts = {str(name): _count(group, device) for group, name in list(c10d._world.pg_names.items())}
        for name, of_one in of_group.items():
            called = counts.get(name)
            # what lies past the count was called before that, by a rank that has called less since
            entries += ((name, one) for one in of_one if called is None or one["collective_seq_id"] <= called)
    for group, entry in sorted(entries, key=lambda pair: int(pair[1]["time_created_ns"])):
        yield Collective(
            group=group,
            seq=entry["collective_seq_id"],
            op=str(entry["profiling_name"]).rpartition(":")[2],
            sizes=tuple(tuple(size) for size in entry["input_sizes"]),
            dtypes=tuple(map(str, entry["input_dtypes"])),
            # gloo's state is always "scheduled"; NCCL's records retire a little after they have completed
            pending=not entry["retired"] and entry.get("state") != "completed",
            seconds=max(0.0, (now - entry["time_created_ns"]) / 1e9),
        )


def _counts(c10d: Any) -> Iterator[tuple[str, int]]:
    """How many collectives were called in each group, where torch counts them."""
    for group, name in list(c10d._world.pg_names.items()):
        if (count := _count(group)) is not None:
            yield str(name), count


def _count(group: Any, device: str = "") -> int | None:
    """How many collectives a group's present connection has called; None when its backend does not count.

    Args:
        device: the kind of device whose connection is asked; "" is the one the group stands for.
    """
    try:
        return num_called(group, device)
    except (RuntimeError, AttributeError):
        return None
