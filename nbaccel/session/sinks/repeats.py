"""Lines that are printed over and over, as one line with a count."""

from __future__ import annotations

from itertools import groupby
from typing import final

from nbaccel.session.sinks.held import Block

__all__ = ["Repeats"]

_ENOUGH = 5
"""So many equal lines are told as one: fewer are a person's own layout."""
_COUNTED_SECONDS = 1.0


@final
class Repeats:
    """Folds lines that the same ranks print one after another: `line ×5000`.

    What comes after such a line and is the same is counted on, and told once a second at most or when something
    else is printed. Lines that differ cost a set of them.
    """

    def __init__(self) -> None:
        self._line: Block | None = None  # the repeated line that was printed last
        self._more = 0  # how often it has come since
        self._due = 0.0

    def fold(self, blocks: list[Block], now: float, *, everything: bool = False) -> list[Block]:
        """`blocks` with what is to be told of the lines before them; with `everything`, nothing is counted on."""
        out: list[Block] = []
        for block in blocks:
            left = self._counted_on(block)
            if left:
                self._tell(out)
                out.append(self._folded(block._replace(texts=left), now))
        if self._more and (everything or now >= self._due):
            self._tell(out)
            self._due = now + _COUNTED_SECONDS
        return out

    def _counted_on(self, block: Block) -> list[str]:
        """The lines of `block` from the first on that is another."""
        line, texts = self._line, block.texts
        if line is None or (line.ranks, line.stream) != (block.ranks, block.stream):
            return texts
        text = line.texts[0]
        same = next((at for at, other in enumerate(texts) if other != text), len(texts))
        self._more += same
        return texts[same:]

    def _tell(self, out: list[Block]) -> None:
        if self._line is not None and self._more:
            out.append(self._line._replace(texts=[_times(self._line.texts[0], self._more)]))
        self._more = 0

    def _folded(self, block: Block, now: float) -> Block:
        texts = block.texts
        self._line = None
        if len(texts) < _ENOUGH or len(texts) - len(set(texts)) < _ENOUGH - 1:
            return block
        found: list[str] = []
        count = 0
        for text, same in groupby(texts):
            count = len(list(same))
            found += [_times(text, count)] if count >= _ENOUGH and _can_be_counted(text) else [text] * count
        if count >= _ENOUGH and _can_be_counted(texts[-1]):
            self._line, self._due = block._replace(texts=texts[-1:]), now + _COUNTED_SECONDS
        return block._replace(texts=found)


def _can_be_counted(text: str) -> bool:
    """Not a piece of a long line, which has no end, nor an empty line: those are there for the distance."""
    return text.endswith("\n") and bool(text.strip())


def _times(text: str, count: int) -> str:
    return f"{text[:-1]} ×{count}\n" if count > 1 else text
