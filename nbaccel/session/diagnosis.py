"""Who waits for whom: from the ranks' stacks and their records of collectives to sentences. Pure.

Of each process group, in this order: (1) the first collective on which ranks called different things;
(2) the same one with other shapes or types; (3) the oldest pending one, and the members that have not
called it. Then what is not a collective: send and recv, init_process_group, DataLoader workers, a
stopped process, one whose C code holds the interpreter's lock, a main thread that has not moved.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

from nbaccel.ownership import is_users
from nbaccel.session.stacks import (
    SURELY_SILENT,
    CellLabel,
    Finding,
    RankView,
    place,
    user_line,
    who,
)
from nbaccel.wire.snapshot import Collective

__all__ = ["diagnose", "in_debugger"]

_C10D = os.path.join("torch", "distributed", "distributed_c10d.py")
_BACKWARD = os.path.join("torch", "autograd", "graph.py")
_LOADER = os.path.join("torch", "utils", "data", "dataloader.py")
_DEBUGGERS = ("pdb.py", "bdb.py")
# Every rank gives these the same shapes; with the others they may differ.
_EQUAL = frozenset(
    {"all_reduce", "allreduce", "broadcast", "_allgather_base", "_reduce_scatter_base", "reduce"}
)


def diagnose(views: Sequence[RankView], label: CellLabel = lambda _: None) -> tuple[Finding, ...]:
    """What is wrong among these ranks, the likeliest cause first; nothing when nobody waits."""
    found = [*_starting(views, label)]
    for group in _group_names(views):
        found += _in_group(group, views, label)
    found += _peers(views, label)
    named = {rank for one in found for rank in (*one.culprits, *one.waiting)}
    for view in views:
        if view.rank not in named and not view.ended:
            found += _alone(view, label)
    return tuple(sorted(found, key=lambda one: (one.kind != "mismatch", -one.seconds)))


def in_debugger(view: RankView) -> bool:
    """Whether a person is looking at it: then it may stand as long as it likes."""
    return any(os.path.basename(line.filename) in _DEBUGGERS for line in view.frames[:12])


# ── collectives ───────────────────────────────────────────────────────────────────────────────────────


def _group_names(views: Sequence[RankView]) -> list[str]:
    return sorted({name for view in views for name, _ in view.records.members})


def _called(view: RankView, group: str) -> dict[int, Collective]:
    """What a rank called in a group, by sequence number."""
    found = {one.seq: one for one in view.records.collectives if one.group == group}
    if found or view.ended:
        return found
    # no flight recorder: torch's count, and the stack for the rest
    count = dict(view.records.counts).get(group, 0)
    op = _waits_in(view)
    if not count:
        return {}
    name = op or "collective"
    return {count: Collective(group, count, name, (), (), pending=op is not None, seconds=view.seconds)}


def _waits_in(view: RankView) -> str | None:
    """The collective the main thread stands in, by its stack."""
    for line in view.frames:
        if line.filename.endswith(_C10D):
            outer = [one for one in view.frames if one.filename.endswith(_C10D)]
            return outer[-1].function
        if line.filename.endswith(_BACKWARD):
            return "all_reduce"
    return None


def _in_group(group: str, views: Sequence[RankView], label: CellLabel) -> Iterator[Finding]:
    members = {
        rank for view in views for name, ranks in view.records.members if name == group for rank in ranks
    }
    inside = [view for view in views if view.rank in members]
    called = {view.rank: _called(view, group) for view in inside}
    waiting = {
        view.rank: min((one.seq for one in called[view.rank].values() if one.pending), default=None)
        for view in inside
    }
    pending = [seq for rank, seq in waiting.items() if seq is not None]
    if not pending:
        return
    by_rank = {view.rank: view for view in inside}
    title = _group_title(group, members, views)
    if (odd := _mismatch(called, min(pending))) is not None:
        yield _mismatch_finding(odd, called, by_rank, title, label)
        return
    seq = min(pending)
    waiters = tuple(rank for rank, at in waiting.items() if at == seq)
    one = called[waiters[0]][seq]
    seconds = max(called[rank][seq].seconds for rank in waiters)
    absent = [view for view in inside if max(called[view.rank], default=0) < seq]
    if absent:
        yield from _absent(absent, waiters, one, seconds, by_rank, title, label)
    elif len(waiters) == len(inside):
        why = "much data, or the connection between them does not work"
        if members - {view.rank for view in views}:
            why = "the ranks of other hosts, which are not seen from here, have not come or not finished"
        text = f"{who(waiters)} {_all_wait(waiters)} in {_called_text(one)}{title} for {seconds:.0f} s: {why}"
        yield Finding(kind="slow", text=text, culprits=(), waiting=waiters, seconds=seconds)


def _all_wait(ranks: Sequence[int]) -> str:
    return "are all" if len(ranks) > 1 else "is"


def _group_title(group: str, members: set[int], views: Sequence[RankView]) -> str:
    """Which group, where that is a question: the default group has every rank."""
    return "" if members >= {view.rank for view in views} else f" of the group of {who(sorted(members))}"


def _mismatch(called: Mapping[int, Mapping[int, Collective]], first_pending: int) -> int | None:
    """The lowest number under which ranks called different things."""
    every = sorted({seq for of_rank in called.values() for seq in of_rank})
    for seq in every:
        ones = [of_rank[seq] for of_rank in called.values() if seq in of_rank]
        if len({one.op for one in ones}) > 1:
            return seq
        shapes = {(one.sizes, one.dtypes) for one in ones if one.sizes}
        if seq >= first_pending and ones[0].op in _EQUAL and len(shapes) > 1:
            return seq
    return None


def _mismatch_finding(
    seq: int,
    called: Mapping[int, Mapping[int, Collective]],
    views: Mapping[int, RankView],
    title: str,
    label: CellLabel,
) -> Finding:
    groups: dict[str, list[int]] = {}
    backward: set[bool] = set()
    for rank, of_rank in called.items():
        if seq in of_rank:
            text = _called_text(of_rank[seq], sizes=True)
            if of_rank[seq].pending:
                text += _backward_text(views[rank]) + _from(views[rank], label)
                backward.add(bool(_backward_text(views[rank])))
            groups.setdefault(text, []).append(rank)
    odd = min(groups.values(), key=len)
    ops = {called[rank][seq].op for ranks in groups.values() for rank in ranks}
    what = "different collectives" if len(ops) > 1 else "the same collective with different shapes or types"
    parts = "; ".join(f"{who(ranks)} called {text}" for text, ranks in groups.items())
    hint = " (a rank skipped a backward pass, as with uneven batches?)" if len(backward) > 1 else ""
    seconds = max((of_rank[seq].seconds for of_rank in called.values() if seq in of_rank), default=0.0)
    return Finding(
        kind="mismatch",
        text=f"mismatch{title} at #{seq}, {what}: {parts}{hint}",
        culprits=tuple(odd),
        waiting=tuple(rank for ranks in groups.values() for rank in ranks if ranks is not odd),
        seconds=seconds,
    )


def _absent(
    absent: Sequence[RankView],
    waiters: tuple[int, ...],
    one: Collective,
    seconds: float,
    views: Mapping[int, RankView],
    title: str,
    label: CellLabel,
) -> Iterator[Finding]:
    """One finding for each rank that has not come."""
    first = views[waiters[0]]
    backward = _backward_text(first)
    for view in absent:
        known = view.condition == "answers" or view.ended
        has_not = "has not called" if known else "is the one left for"
        uneven = ""
        if backward and view.ended.startswith("its function returned"):
            uneven = " (it had fewer backward passes than the others: uneven batches?)"
        yield Finding(
            kind="absent",
            text=f"rank {view.rank} {has_not} {_called_text(one)}{title}{backward}; "
            f"{where(view, label)}{uneven}; {who(waiters)} wait{'' if len(waiters) > 1 else 's'} "
            f"{seconds:.0f} s{_from(first, label)}",
            culprits=(view.rank,),
            waiting=waiters,
            seconds=seconds,
        )


def _called_text(one: Collective, *, sizes: bool = False) -> str:
    shapes = ", ".join(str(list(size)) for size in one.sizes[:3])
    more = f" {shapes} {'/'.join(sorted(set(one.dtypes)))}" if sizes and shapes else ""
    return f"{one.op} #{one.seq}{more}"


def _backward_text(view: RankView) -> str:
    if any(line.filename.endswith(_BACKWARD) for line in view.frames):
        return " (DDP backward)"
    return ""


def _from(view: RankView, label: CellLabel) -> str:
    line = user_line(view.frames)
    return f", called from {place(line, label)}" if line else ""


# ── where one rank is ─────────────────────────────────────────────────────────────────────────────────


def where(view: RankView, label: CellLabel) -> str:
    """A clause about what a rank does."""
    if view.ended:
        return view.ended
    if view.condition == "starting":
        return "it is still starting"
    if view.condition == "gone":
        return "its process is gone"
    if view.condition == "stopped":
        return "it is stopped (SIGSTOP)"
    if in_debugger(view):
        return f"it stands at a breakpoint{_at(view, label)}"
    if loader := _loader(view, label):
        return loader
    waits = _waits_in(view)
    if waits and view.condition == "answers":
        return f"it waits in {waits}{_backward_text(view)}{_from(view, label)}"
    line = user_line(view.frames)
    if line is None:
        return f"it {_busy(view)}"
    inner = view.frames[0]
    then = (
        f" → {inner.function} {place(inner, label)}"
        if inner is not line and not is_users(inner.filename)
        else ""
    )
    spot = f"{line.function} {place(line, label)}{then}"
    if view.condition == "silent" and view.seconds > SURELY_SILENT:
        return f"it is in {spot}, in C code that holds the interpreter's lock ({_busy(view)})"
    moving = view.process.state == "R" or (view.process.cpu or 0) > 50
    if moving:
        return f"it runs in {spot} ({_busy(view)})"
    held = f" for {line.seconds:.0f} s" if line.seconds is not None and line.seconds >= 1 else ""
    return f"it is in {spot}{held}"


def _at(view: RankView, label: CellLabel) -> str:
    line = user_line(view.frames)
    return f" at {place(line, label)}" if line else ""


def _busy(view: RankView) -> str:
    cpu = view.process.cpu
    if cpu is None:
        return "lives"
    return f"computes, cpu {cpu:.0f} %" if cpu > 50 else f"sleeps, cpu {cpu:.0f} %"


def _loader(view: RankView, label: CellLabel) -> str:
    """That it waits for a DataLoader worker, and where that one is; empty when it does not."""
    if not any(line.filename.endswith(_LOADER) and "_next_data" in line.function for line in view.frames):
        return ""
    if not view.workers:
        return ""
    told = []
    for worker in view.workers:
        if worker.process.state == "T":
            told.append(f"worker pid {worker.pid} is stopped (SIGSTOP)")
        elif not worker.frames:  # it may be starting, at work or idle
            told.append(f"worker pid {worker.pid} does not say where it is, as spawned ones never do")
        elif not worker.idle:
            line = user_line(worker.frames) or worker.frames[0]
            told.append(f"worker pid {worker.pid} is in {line.function} {place(line, label)}")
    if not told:
        return f"it waits for its DataLoader's workers, which have nothing to do{_at(view, label)}"
    return f"it waits for its DataLoader: {'; '.join(sorted(told)[:2])}"


# ── what is not a collective ──────────────────────────────────────────────────────────────────────────


def _starting(views: Sequence[RankView], label: CellLabel) -> Iterator[Finding]:
    """Ranks in init_process_group wait for those that have not come there."""
    waiting = [view for view in views if _starts(view)]
    if not waiting or len(waiting) == len(views):
        return
    ranks = tuple(view.rank for view in waiting)
    seconds = max(view.seconds for view in waiting)
    for view in views:
        if view in waiting or any(len(members) == len(views) for _, members in view.records.members):
            continue
        text = (
            f"rank {view.rank} has not called init_process_group; {where(view, label)}; "
            f"{who(ranks)} wait{'' if len(ranks) > 1 else 's'} {seconds:.0f} s{_from(waiting[0], label)}"
        )
        yield Finding(kind="start", text=text, culprits=(view.rank,), waiting=ranks, seconds=seconds)


def _starts(view: RankView) -> bool:
    return any(
        line.filename.endswith(_C10D) and line.function == "init_process_group" for line in view.frames
    )


def _peers(views: Sequence[RankView], label: CellLabel) -> Iterator[Finding]:
    """Waits in send and recv."""
    by_rank = {view.rank: view for view in views}
    for view in views:
        if view.peer is None or view.ended:
            continue
        other = by_rank.get(view.peer.peer) if view.peer.peer is not None else None
        end = "src" if view.peer.op == "recv" else "dst"
        text = (
            f"rank {view.rank} waits in {view.peer.op}({end}={view.peer.peer}, tag={view.peer.tag}) "
            f"for {view.seconds:.0f} s{_from(view, label)}"
        )
        if other is not None:
            text += f"; rank {other.rank}: {where(other, label)}"
        culprits = (other.rank,) if other is not None else ()
        yield Finding(kind="peer", text=text, culprits=culprits, waiting=(view.rank,), seconds=view.seconds)


def _alone(view: RankView, label: CellLabel) -> Iterator[Finding]:
    """A rank that nobody waits for, as far as is known."""
    mine = (view.rank,)

    def finding(kind: str, text: str) -> Finding:
        return Finding(kind=kind, text=text, culprits=mine, waiting=(), seconds=view.seconds)  # type: ignore[arg-type]

    told = f"rank {view.rank}: {where(view, label)}"
    if in_debugger(view):
        return
    if view.condition == "stopped":
        yield finding("stopped", told)
    elif view.condition == "silent" and view.seconds > SURELY_SILENT:
        yield finding("silent", f"{told} for {view.seconds:.0f} s")
    elif view.condition == "answers" and _loader(view, label):
        lines = [line for line in view.frames if "_next_data" in line.function]
        seconds = max((line.seconds or 0.0 for line in lines), default=0.0)
        yield Finding(kind="loader", text=told, culprits=mine, waiting=(), seconds=seconds)
    elif view.condition == "answers" and view.seconds > 1 and (view.process.cpu or 0.0) < 5:
        yield finding("still", told)
