"""The failure of a run as its state tells it: whose, its traceback once, what became of the other ranks."""

from __future__ import annotations

from collections.abc import Iterable

from nbaccel.session.panel.ansi import plain
from nbaccel.session.panel.reading import shown_state
from nbaccel.session.report import CellLabel, explain_exit, of_several, render, user_place, waited_in
from nbaccel.session.results import rank_ranges
from nbaccel.session.state import Failure, RankState, RunState, same_failure

__all__ = ["error_lines", "failed_alike", "fates", "headline"]


def failed_alike(state: RunState) -> tuple[int, ...]:
    """The rank that failed first, then those whose failure one traceback describes; empty without one, and for
    an interrupt."""
    first = state.failure
    if first is None or first.asked:
        return ()
    cause = state.ranks[first.rank]
    alike = (rank.rank for rank in state.ranks if rank.rank != first.rank and same_failure(rank, cause))
    return (first.rank, *alike)


def headline(state: RunState, label: CellLabel) -> str:
    """The failure in one line."""
    if state.problem:
        return plain(state.problem.splitlines()[0])
    ranks, first = failed_alike(state), state.failure
    if first is None or not ranks:
        return ""
    who = f"rank{'s' if len(ranks) > 1 else ''} {rank_ranges(ranks)} of {len(state.ranks)}"
    if first.info is None:
        return f"{who} {_how_it_ended(first)}"
    place = user_place(first.info, label)
    return f"{who} failed: {plain(first.info.headline)}{f' (at {place})' if place else ''}"


def fates(state: RunState, label: CellLabel) -> list[str]:
    """What became of the ranks that did not fail first, one line for those with the same end."""
    failed, groups = failed_alike(state), dict[str, list[int]]()
    for rank in state.ranks if failed else ():
        if rank.rank not in failed:
            groups.setdefault(_fate(rank, state, label), []).append(rank.rank)
    return [
        f"rank{'s' if len(ranks) > 1 else ''} {rank_ranges(ranks)} {of_several(fate, len(ranks))}"
        for fate, ranks in groups.items()
    ]


def error_lines(state: RunState, label: CellLabel, *, colour: bool = True) -> list[str]:
    """The whole failure: the remote traceback or the last words, the headline, the fates."""
    if state.problem:
        return state.problem.splitlines() if colour else plain(state.problem).splitlines()
    if not failed_alike(state):
        return []
    return [line for text in _error_lines(state, label, colour) for line in text.split("\n")]


def _error_lines(state: RunState, label: CellLabel, colour: bool) -> Iterable[str]:
    first = state.failure
    assert first is not None
    if first.info is not None:
        yield from render(first.info, label, title=f"rank {first.rank}", colour=colour)
    else:
        yield from state.ranks[first.rank].last_lines(8)
    yield headline(state, label)
    yield from fates(state, label)


def _fate(rank: RankState, state: RunState, label: CellLabel) -> str:
    if rank.error is not None:
        waited = waited_in(rank.error, label)
        return waited or f"raised after it: {plain(rank.error.headline)[:200]}"
    shown = shown_state(rank, state)
    if shown == "lost":
        return explain_exit(rank.exitcode or 0, rank.detail)
    return {"stopped": "ended with it", "done": "had returned"}.get(shown, f"is {shown}")


def _how_it_ended(failure: Failure) -> str:
    code, detail = failure.exitcode, failure.detail
    exit_code = explain_exit(code, detail) if code is not None else "ended"
    return f"{exit_code}; {detail}" if detail and detail not in exit_code else exit_code
