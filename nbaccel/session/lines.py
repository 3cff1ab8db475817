"""Bytes of one stream in, whole lines of text out, the way a terminal would have shown them.

What was written is read as a terminal reads it: `\\r` goes back to the start of the line and what
follows overwrites it, so a progress bar that rewrites itself a thousand times is one line; `\\r\\n` is
an ordinary line end; other escape sequences (colours) are kept. However the bytes are cut into pieces
on their way here, the same lines come out.
"""

from __future__ import annotations

import codecs
import io
import re
from itertools import chain
from typing import final

__all__ = ["Lines", "fit", "overlay", "repainted", "visible"]

_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])")
_ERASE_RIGHT = re.compile(r"\x1b\[0?K")
_ERASE_LINE = "\x1b[2K"
_REWOUND = re.compile(r"^[^\n]*\r(?!\n)", re.MULTILINE)
_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")
# Past this length a line with escape sequences is replaced rather than overwritten character by character:
# taking it apart at each rewrite would cost more than anybody could see of it.
_WIDEST = 4096


@final
class Lines:
    """The line splitter of one stream of one rank.

    Lines come out with their final `\\n`. A line longer than `limit` characters comes out in pieces as it
    is written: a string that does not end in `\\n` is such a piece and the next string continues it, so
    that joining what comes out gives the text, and memory stays bounded by a few times `limit`.

    Bytes that are not UTF-8 become U+FFFD.
    """

    __slots__ = ("_decoder", "_limit", "_overlaid", "_tail", "_under")

    def __init__(self, limit: int = 1 << 16) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._limit = limit
        self._under = ""  # what the unfinished line showed when it was last rewound
        self._tail = ""  # what has been written since, from its first column on
        self._overlaid = False  # whether text has overwritten text in the unfinished line

    def feed(self, data: bytes) -> list[str]:
        """The lines, and pieces of long ones, that `data` completes. Memory use is O(len(data) + limit)."""
        return self._split(self._decoder.decode(data))

    def finish(self) -> list[str]:
        """What is left when nothing more will come (or has to be shown now), as a finished line."""
        lines = self._split(self._decoder.decode(b"", final=True))
        self._decoder.reset()
        if self._tail or self._under:
            line = self._finished(self._tail)
            # A bar that wiped itself out leaves nothing to show.
            if line != "\n":
                lines.append(line)
        self._under, self._tail, self._overlaid = "", "", False
        return lines

    @property
    def pending(self) -> str:
        """What a terminal would show of the unfinished line."""
        return overlay(self._under, self._tail)

    @property
    def rewritten(self) -> bool:
        """Whether the unfinished line has been rewound by `\\r`: it is a progress bar."""
        return bool(self._under)

    def _split(self, text: str) -> list[str]:
        if not text:
            return []
        if "\r" not in text and not self._under and not self._overlaid:
            return self._split_plain(text)
        out: list[str] = []
        *whole, last = text.split("\n")
        for line in whole:
            out.append(self._finished(self._rewind(line, out)))
            self._under, self._tail, self._overlaid = "", "", False
        self._tail = self._rewind(last, out)
        return out

    def _split_plain(self, text: str) -> list[str]:
        # StringIO, unlike str.splitlines, ends lines at "\n" only, keeps the ends, and runs in C.
        text = self._tail + text
        out = io.StringIO(text, newline="\n").readlines()
        if len(text) > self._limit and max(map(len, out)) > self._limit:
            out = list(chain.from_iterable(map(self._pieces, out)))
        self._tail = "" if out[-1].endswith("\n") else out.pop()
        return out

    def _pieces(self, line: str) -> list[str]:
        length = len(line) - line.endswith("\n")
        if length <= self._limit:
            return [line]
        # The rest is never empty, and what is cut off goes out the moment one more character is there:
        # where the cuts fall depends on the text alone, not on how it arrived.
        cuts = range(0, length, self._limit)
        return [line[i : i + self._limit] for i in cuts[:-1]] + [line[cuts[-1] :]]

    def _rewind(self, text: str, out: list[str]) -> str:
        """Write `text`, which has no `\\n`, on the unfinished line; what follows its last `\\r`, with the
        tail it continues, is returned. Pieces of a long line go to `out`."""
        segments = (self._tail + text).split("\r")
        if max(map(len, segments)) > self._limit:
            segments = self._cut(segments, out)
        *rewound, last = segments
        under = [s for s in (self._under, *rewound) if s]
        self._overlaid = self._overlaid or len(under) > 1
        self._under = _overlay_all(under)
        return last

    def _cut(self, segments: list[str], out: list[str]) -> list[str]:
        """Send what is longer than the limit out as pieces; the segments left for the unfinished line."""
        kept: list[str] = []
        for segment in segments:
            if len(segment) <= self._limit:
                kept.append(segment)
                continue
            *pieces, rest = self._pieces(segment)
            # All that was under it has been overwritten, and a line on its way out cannot be rewound.
            self._under, self._overlaid, kept = "", False, [rest]
            out.extend(pieces)
        return kept

    def _finished(self, tail: str) -> str:
        if not self._under:
            return tail + "\n"
        line = overlay(self._under, tail)
        if self._overlaid or tail:
            line = line.rstrip(" ")  # blanks written to wipe out a longer text
        return line + "\n"


def overlay(under: str, text: str) -> str:
    """What a terminal shows when `text` is written from the first column of a line showing `under`."""
    if "\x1b" not in text and ("\x1b" not in under or not text):
        return text + under[len(text) :]
    return _overlay_cells(under, text)


def _overlay_all(segments: list[str]) -> str:
    if not segments:
        return ""
    if any("\x1b" in segment for segment in segments):
        shown = ""
        for segment in segments:
            shown = overlay(shown, segment)
        return shown
    # From the last one backwards: of what came before, only what sticks out on the right is to be seen.
    shown = segments[-1]
    for segment in reversed(segments):
        if len(segment) > len(shown):
            shown += segment[len(shown) :]
    return shown


def _overlay_cells(under: str, text: str) -> str:
    if _ERASE_LINE in text:
        before, _, text = text.rpartition(_ERASE_LINE)
        return " " * visible(before) + _ERASE_RIGHT.sub("", text)
    erases = _ERASE_RIGHT.search(text)
    text = _ERASE_RIGHT.sub("", text)
    if erases or len(under) > _WIDEST:
        return text
    cells, trailing = _cells(text)
    older, older_trailing = _cells(under)
    rest = older[len(cells) :]
    if not rest:
        return text
    if trailing:
        # A colour reset that ends `text` is kept, in place of the next cell's escapes: they cannot pile up.
        rest[0] = trailing + rest[0][-1]
    return "".join(cells) + "".join(rest) + older_trailing


def _cells(text: str) -> tuple[list[str], str]:
    """The visible characters, each with the escape sequences before it, and the escapes that come last."""
    cells: list[str] = []
    escapes, at = "", 0
    for match in chain(_ESCAPE.finditer(text), (None,)):
        plain = text[at : match.start() if match else len(text)]
        if plain:
            cells.append(escapes + plain[0])
            cells.extend(plain[1:])
            escapes = ""
        if match:
            escapes += match.group()
            at = match.end()
    return cells, escapes


def repainted(text: str) -> str:
    """Of each line what stays when all before its last `\\r` is painted over, as `TextSink` does with bars."""
    return _REWOUND.sub("", text) if "\r" in text else text


def visible(text: str) -> int:
    """How many characters of `text` are not part of an escape sequence."""
    return len(text) if "\x1b" not in text else len(_ESCAPE.sub("", text))


def fit(text: str, columns: int | None = None) -> str:
    """`text` without escape sequences other than colours, cut to `columns` visible characters."""
    if "\x1b" in text:
        text = _ESCAPE.sub(lambda match: match[0] if _COLOUR.fullmatch(match[0]) else "", text)
    if columns is None or visible(text) <= columns:
        return text
    cells, trailing = _cells(text)
    end = "\x1b[0m" if "\x1b" in text else ""
    return "".join(cells[:columns]) + (end or trailing)
