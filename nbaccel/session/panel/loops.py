"""Which of a rank's loops is shown, which it stands in, how long they take together, and what their bars say."""

from __future__ import annotations

from nbaccel.session.state import Pace, RankState
from nbaccel.wire.events import Progress

__all__ = ["current", "outer", "pace", "postfix", "seconds_left", "timed", "title"]

_LATELY = 3.0
_SLOWER = 0.5


def current(rank: RankState) -> Progress | None:
    """The loop to show. Of those that go on and have moved lately: one that says where its time goes, else
    the fastest, which is the innermost; by name, so that the choice stays. When all are at their end, the last one
    that says where its time went, else the one that moved last."""
    moved = list(rank.progress.values())[::-1]
    if not moved:
        return None
    lately = [progress for progress in moved if moved[0].time - progress.time < _LATELY]
    going = [progress for progress in lately if _goes_on(progress)]

    def is_timed(progress: Progress) -> bool:
        known = rank.paces.get(progress.name)
        return bool(known and known.parts)

    def worth(progress: Progress) -> tuple[bool, float, int, str]:
        rate = round(pace(rank, progress) or 0.0, 1)
        return is_timed(progress), rate, progress.depth or 0, progress.name

    if going:
        return max(going, key=worth)
    return next(filter(is_timed, lately), moved[0])


def _goes_on(loop: Progress) -> bool:
    return not loop.ended and (loop.total is None or loop.step < loop.total)


def outer(rank: RankState, loop: Progress | None) -> tuple[Progress, ...]:
    """The loops of known length that this one stands in, outermost first."""
    if loop is None:
        return ()
    around = [other for other in rank.progress.values() if _stands_in(rank, loop, other)]
    return tuple(sorted(around, key=lambda other: other.depth or 0))


def _stands_in(rank: RankState, loop: Progress, other: Progress) -> bool:
    if other.name == loop.name or other.depth is None or not other.total or not _goes_on(other):
        return False
    own, its = pace(rank, loop), pace(rank, other)
    if own and its and its > own:
        return False  # a bar that nobody closed, or one inside
    if loop.depth is not None:
        return other.depth < loop.depth
    # not a bar: one of the same length and pace is drawn around the very same loop
    return other.total != loop.total or bool(own and its and its < _SLOWER * own)


def title(loop: Progress) -> str:
    """What the loop is called."""
    return loop.name if loop.label is None else loop.label


def pace(rank: RankState, loop: Progress | None) -> float | None:
    """Steps per second of one of its loops."""
    known = rank.paces.get(loop.name) if loop is not None else None
    return None if known is None else known.rate


def timed(rank: RankState) -> Pace | None:
    """The pace of the loop that says where its time goes, the one that moved last; None without one."""
    return next((known for known in list(rank.paces.values())[::-1] if known.parts and known.rate), None)


def seconds_left(rank: RankState, loop: Progress | None, around: tuple[Progress, ...]) -> float | None:
    """Seconds until this loop and all `around` it are at their end; None when that cannot be told.

    Before an outer loop has made its first step, one takes as long as the whole loop inside it.
    """
    left = each = None
    for one in (loop, *reversed(around)):
        rate = pace(rank, one)
        if one is None or not one.total or not (rate or each):
            left = each = None
            continue
        seconds = 1 / rate if rate else each or 0.0
        steps = one.total - one.step
        if left is None:
            left = max(0.0, steps * seconds)
        else:
            left += max(0.0, (steps - 1) * seconds)  # of the step it is at, what is left inside
        each = one.total * seconds
    return left


def postfix(rank: RankState, loop: Progress | None) -> tuple[dict[str, float], str]:
    """What bars say beside them (tqdm's `set_postfix`): the values of all, this loop's first, and of this one the
    other words."""
    values: dict[str, float] = {}
    others = sorted(rank.progress.values(), key=lambda other: (other is not loop, other.name))
    words = ""
    for one in others:
        found, rest = _parsed(one.note)
        values |= {name: value for name, value in found.items() if name not in values}
        words = rest if one is loop else words
    return values, words


def _parsed(note: str) -> tuple[dict[str, float], str]:
    """`loss=0.5, lr=1e-5, warming up` as values and the other words."""
    values, words = dict[str, float](), []
    for part in filter(None, note.split(", ")):
        name, _, text = part.partition("=")
        try:
            values[name.strip()] = float(text)
        except ValueError:
            words.append(part)
    return values, ", ".join(words)
