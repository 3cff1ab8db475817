"""Lines held back for a moment, so that what several ranks print alike becomes one line."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from typing import Any, Literal, final

__all__ = ["Held", "Line", "Stream"]

Stream = Literal["stdout", "stderr"]
# [text: str, ranks: int (a bit for each), stream: Stream]. A bare list: one is made for every line printed.
Line = list[Any]


@final
class Held:
    """Lines in the order they will be printed, each with the set of ranks that printed it.

    A rank's line joins the first held line with the same text and stream that comes after the rank's
    own latest one; otherwise it goes to the end. So every rank's lines stay in that rank's order, and
    each line is counted once for each time it was printed.

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
        self._lines: list[Line] = []
        self._first = 0  # the sequence number of _lines[0]
        self._latest = [-1] * num_ranks  # sequence number of each rank's latest line
        self._where: dict[Stream, dict[str, list[int]]] = {"stdout": {}, "stderr": {}}
        self._arrivals: deque[tuple[float, int]] = deque()  # (when, sequence number past the last of then)
        self._chars = 0

    @property
    def overfull(self) -> bool:
        """Whether `take` has to be called now for memory to stay bounded."""
        return self._chars > self._max_chars or len(self._lines) > self._max_lines

    def waiting(self, rank: int) -> bool:
        """Whether a line of this rank is held."""
        return self._latest[rank] >= self._first

    def add(self, rank: int, stream: Stream, texts: list[str], now: float) -> None:
        """Hold what `rank` has printed."""
        bit = 1 << rank
        if self._hold <= 0:
            self._lines.extend([text, bit, stream] for text in texts)
            self._latest[rank] = self._first + len(self._lines) - 1
            self._chars += sum(map(len, texts))
        else:
            self._join(bit, rank, stream, texts)
        end = self._first + len(self._lines)
        if not self._arrivals or self._arrivals[-1][1] < end:
            self._arrivals.append((now, end))

    def _join(self, bit: int, rank: int, stream: Stream, texts: list[str]) -> None:
        lines, where, first = self._lines, self._where[stream], self._first
        latest, end, chars = max(self._latest[rank], first - 1), first + len(lines), 0
        for text in texts:
            places = where.get(text)
            if places is None:
                where[text] = [end]
            elif places[-1] > latest:
                latest = places[bisect_right(places, latest)]
                lines[latest - first][1] |= bit
                continue
            else:
                places.append(end)
            lines.append([text, bit, stream])
            chars += len(text)
            latest = end
            end += 1
        self._latest[rank] = latest
        self._chars += chars

    def take(self, now: float, *, everything: bool = False) -> list[Line]:
        """The lines to print now, and no longer held: those that have waited long enough or that every
        rank has printed, as far as the order allows; with `everything`, all."""
        due = self._first
        while self._arrivals and self._arrivals[0][0] <= now - self._hold:
            due = max(due, self._arrivals.popleft()[1])
        count = due - self._first
        if everything:
            count = len(self._lines)
        elif self.overfull:
            count = max(count, (len(self._lines) + 1) // 2)
        while count < len(self._lines) and self._lines[count][1] == self._everyone:
            count += 1
        return self._remove(count) if count else []

    def _remove(self, count: int) -> list[Line]:
        taken = self._lines[:count]
        del self._lines[:count]
        self._first += count
        self._chars = self._chars - sum(len(line[0]) for line in taken) if self._lines else 0
        if not self._lines:
            self._arrivals.clear()
            for where in self._where.values():
                where.clear()
        elif self._hold > 0:
            self._forget(taken)
        return taken

    def _forget(self, taken: list[Line]) -> None:
        for stream, where in self._where.items():
            for text in {line[0] for line in taken if line[2] == stream}:
                places = where[text]
                if places[-1] < self._first:
                    del where[text]
                else:
                    del places[: bisect_left(places, self._first)]
