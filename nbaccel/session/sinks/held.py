"""Lines held back for a moment, so that what several ranks print alike becomes one line."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from itertools import groupby
from typing import Literal, NamedTuple, final

__all__ = ["Block", "Held", "Stream"]

Stream = Literal["stdout", "stderr"]
_STREAMS: tuple[Stream, Stream] = ("stdout", "stderr")


class Block(NamedTuple):
    """Consecutive lines that the same ranks printed on the same stream."""

    texts: list[str]
    ranks: int
    """A bit for each rank."""
    stream: Stream


@final
class Held:
    """Lines in the order they will be printed, each with the set of ranks that printed it.

    A rank's line joins the first held line with the same text and stream that comes after the rank's
    own latest one; otherwise it goes to the end. So every rank's lines stay in that rank's order, and
    each line is counted once for each time it was printed.

    Lines lie in parallel lists of strings and numbers, and are handled by the batch where a batch is all
    new or all alike: a flood costs about 0.3 µs a line, where an object for each line took ten times that.

    Args:
        num_ranks: ranks of the run; a line that all of them printed waits no longer.
        hold: seconds a line waits for its likes; 0 folds nothing.
        max_chars, max_lines: past either, the older half goes out however young it is.
    """

    def __init__(
        self, num_ranks: int, hold: float, *, max_chars: int = 4 << 20, max_lines: int = 1 << 16
    ) -> None:
        self._everyone = (1 << num_ranks) - 1
        self._hold = hold
        self._max_chars = max_chars
        self._max_lines = max_lines
        self._texts: list[str] = []
        self._tags: list[int] = []  # for each text: a bit for each rank, shifted by one, and 1 for stderr
        self._first = 0  # the sequence number of _texts[0]
        self._latest = [-1] * num_ranks  # sequence number of each rank's latest line
        self._where = (_Places(), _Places())  # by stream
        self._arrivals: deque[tuple[float, int]] = deque()  # (when, sequence number past the last of then)
        self._chars = 0

    @property
    def overfull(self) -> bool:
        """Whether `take` has to be called now for memory to stay bounded."""
        return self._chars > self._max_chars or len(self._texts) > self._max_lines

    def waiting(self, rank: int) -> bool:
        """Whether a line of this rank is held."""
        return self._latest[rank] >= self._first

    def add(self, rank: int, stream: Stream, texts: list[str], now: float) -> None:
        """Hold what `rank` has printed; `texts` are not empty strings."""
        error = stream == "stderr"
        if self._hold > 0:
            texts = self._join_alike(rank, error, texts)
            if texts:
                self._join(rank, error, texts)
        else:
            self._append(rank, error, texts)
        end = self._first + len(self._texts)
        if not self._arrivals or self._arrivals[-1][1] < end:
            self._arrivals.append((now, end))

    def _append(self, rank: int, error: bool, texts: list[str]) -> None:
        self._texts += texts
        self._tags += [(2 << rank) + error] * len(texts)
        self._chars += sum(map(len, texts))
        self._latest[rank] = self._first + len(self._texts) - 1

    def _join_alike(self, rank: int, error: bool, texts: list[str]) -> list[str]:
        """Join `texts` to an equal stretch of held lines, if there is one; what is left to place."""
        place = self._where[error].of(texts[0])
        if not isinstance(place, int) or place <= max(self._latest[rank], self._first - 1):
            return texts
        at = place - self._first
        alike = min(len(texts), len(self._texts) - at)
        tags = self._tags[at : at + alike]
        if self._texts[at : at + alike] != texts[:alike] or any(tag & 1 != error for tag in tags):
            return texts
        self._tags[at : at + alike] = [tag | (2 << rank) for tag in tags]
        self._latest[rank] = place + alike - 1
        return texts[alike:]

    def _join(self, rank: int, error: bool, texts: list[str]) -> None:
        where = self._where[error]
        different = len(set(texts))
        if different == len(texts) and where.knows_none_of(texts):
            where.note_all(texts, self._first + len(self._texts))
            self._append(rank, error, texts)
            return
        if different == 1 and where.after(texts[0], max(self._latest[rank], self._first - 1)) is None:
            start = self._first + len(self._texts)
            where.note(texts[0], range(start, start + len(texts)), self._first)
            self._append(rank, error, texts)
            return
        for text in texts:
            place = where.after(text, max(self._latest[rank], self._first - 1))
            if place is None:
                end = self._first + len(self._texts)
                where.note(text, range(end, end + 1), self._first)
                self._append(rank, error, [text])
            else:
                self._tags[place - self._first] |= 2 << rank
                self._latest[rank] = place

    def take(self, now: float, *, everything: bool = False) -> list[Block]:
        """The lines to print now, and no longer held: those that have waited long enough or that every
        rank has printed, as far as the order allows; with `everything`, all."""
        due = self._first
        while self._arrivals and self._arrivals[0][0] <= now - self._hold:
            due = max(due, self._arrivals.popleft()[1])
        count = due - self._first
        if everything:
            count = len(self._texts)
        elif self.overfull:
            count = max(count, (len(self._texts) + 1) // 2)
        while count < len(self._tags) and self._tags[count] >> 1 == self._everyone:
            count += 1
        return self._remove(count) if count else []

    def _remove(self, count: int) -> list[Block]:
        texts, tags = self._texts[:count], self._tags[:count]
        del self._texts[:count], self._tags[:count]
        self._first += count
        self._chars = self._chars - sum(map(len, texts)) if self._texts else 0
        for where in self._where:
            where.forget(self._first, self._first + len(self._texts))
        blocks, at = [], 0
        for tag, same in groupby(tags):
            end = at + len(list(same))
            blocks.append(Block(texts[at:end], tag >> 1, _STREAMS[tag & 1]))
            at = end
        return blocks


@final
class _Places:
    """Where each held text lies: one sequence number, or several in order.

    Numbers of lines that are held no longer are stale and mean nothing. They go by the generation: what was
    noted before `_turn` lies in `_old`, which is dropped as a whole when no line of that age is held.
    """

    def __init__(self) -> None:
        self._young: dict[str, int | list[int]] = {}
        self._old: dict[str, int | list[int]] = {}
        self._turn = 0

    def of(self, text: str) -> int | list[int] | None:
        """Where `text` lies or lay; None if it was never noted or is forgotten."""
        found = self._young.get(text)
        return self._old.get(text) if found is None else found

    def knows_none_of(self, texts: list[str]) -> bool:
        return self._young.keys().isdisjoint(texts) and self._old.keys().isdisjoint(texts)

    def after(self, text: str, latest: int) -> int | None:
        """The first place of `text` after `latest`, if there is one."""
        places = self.of(text)
        if isinstance(places, list):
            return places[bisect_right(places, latest)] if places[-1] > latest else None
        return places if places is not None and places > latest else None

    def note(self, text: str, more: range, first: int) -> None:
        """That `text` lies at these places too; what lay before `first` is held no longer."""
        places = self.of(text)
        if isinstance(places, list):
            if places[0] < first:
                del places[: bisect_left(places, first)]
            places.extend(more)
            self._young[text] = places
        else:
            before = [] if places is None or places < first else [places]
            self._young[text] = [*before, *more] if before or len(more) > 1 else more[0]

    def note_all(self, texts: list[str], start: int) -> None:
        """That these, new and all different, lie one after another from `start`."""
        self._young.update(zip(texts, range(start, start + len(texts)), strict=True))

    def forget(self, first: int, end: int) -> None:
        """Let go of stale numbers: lines from `first` to before `end` are held."""
        if first >= self._turn:
            self._old, self._young, self._turn = self._young, {}, end
