"""Output as text, in the cell or the terminal: whole lines, each saying which ranks printed it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple, final

from nbaccel.session.lines import Lines, fit, visible
from nbaccel.session.sinks.held import Block, Held, Stream
from nbaccel.session.sinks.repeats import Repeats
from nbaccel.session.state import RunState
from nbaccel.wire.events import Died, Display, Event, InputRequest, Output, Raised, Returned

__all__ = ["Label", "Mode", "TextSink", "Write"]

Mode = Literal["auto", "all", "rank0", "none"]
Label = Literal["short", "long"]
Write = Callable[[str, Stream], None]

_REPAINT_SECONDS = 0.25
_BATCH_SECONDS = 0.04


class _Bar(NamedTuple):
    """An unfinished line on the screen, to be painted over."""

    key: tuple[int, Stream]
    """The rank and stream it comes from."""
    stream: Stream
    """The stream it is painted on."""
    text: str
    width: int


@final
class TextSink:
    """Prints what the ranks print.

    Several lines go out in one `write`. A line is never split between ranks, with one exception: one of
    more than 64 Ki characters goes out in pieces, which stay together unless another rank prints
    meanwhile. What `write` raises goes to the caller.

    Args:
        write: called with text and the stream it belongs to; the text is one or more whole lines, except
            for bars and for pieces of very long lines.
        num_ranks: ranks of the run; with one there are no labels.
        mode: "auto" folds lines that several ranks print within `hold` seconds into one, and what is printed over
            and over into a line with a count (of a single rank only where `transient`: elsewhere its text may be
            read by a program); "all" labels every line and folds none; "rank0" shows rank 0 only, as it is;
            "none" nothing.
        label: "short", `[2] ` and `[0,2-3] `, and in mode "auto" none for what only rank 0 printed; or
            "long", `[rank 2] ` and `[ranks 0,2-3] `, for every line.
        transient: whether what has been painted can be painted over: a live front end or a terminal, on both
            streams. The bar of the lowest rank that draws one, else the lowest rank's unfinished line, is
            then shown in place, up to four times a second; otherwise a bar appears once, in its final state.
        hold: seconds a line may wait for its likes.
        columns: width of the terminal, which bars are cut to; None when lines have no limit.
        first_rank: the number of the first rank where there are several hosts, for its label.
        displays: whether what ranks display is printed as text: there is no place for anything richer.
        clock: what `tick` is called with.
    """

    def __init__(
        self,
        write: Write,
        *,
        num_ranks: int,
        mode: Mode = "auto",
        label: Label = "short",
        transient: bool = False,
        hold: float = 0.1,
        columns: int | None = None,
        first_rank: int | None = None,
        displays: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write = write
        self._shown_ranks = {"none": 0, "rank0": 1}.get(mode, num_ranks)
        self._bare = (num_ranks == 1 and first_rank is None) or mode == "rank0"
        self._bare_rank0 = mode == "auto" and label == "short"
        self._long = label == "long"
        self._first_rank = first_rank or 0
        self._transient = transient
        self._columns = columns
        self._displays = displays
        self._clock = clock
        folds = mode == "auto" and not self._bare
        self._held = Held(num_ranks, hold if folds else 0.0)
        self._repeats = Repeats() if folds or (mode == "auto" and transient) else None
        self._splitters: dict[tuple[int, Stream], Lines] = {}
        self._due = 0.0  # before then, lines wait for a tick so that more go out together
        self._painted = 0.0
        self._bar: _Bar | None = None
        self._open: tuple[int, Stream] | None = None  # ranks and stream of a piece whose line is not ended

    def handle(self, event: Event, state: RunState) -> None:
        if event.rank >= self._shown_ranks:
            return
        if isinstance(event, Output):
            key = event.rank, event.stream
            splitter = self._splitters.get(key)
            if splitter is None:
                splitter = self._splitters[key] = Lines()
            texts = splitter.feed(event.data)
            if texts:
                self._add(key, texts)
        elif isinstance(event, (Returned, Raised, Died)):
            self._end_lines(event.rank)
        elif isinstance(event, InputRequest):
            self._end_lines(event.rank)
            self.flush()  # what was printed before the question is what it is about
        elif (
            isinstance(event, Display) and self._displays and not event.update and "text/plain" in event.data
        ):
            self._end_lines(event.rank)
            self._add((event.rank, "stdout"), [f"{event.data['text/plain']}\n"])

    def tick(self, now: float) -> None:
        if now >= self._due:
            self._flush(now)
        if self._transient and now - self._painted >= _REPAINT_SECONDS:
            self._repaint(now)

    def flush(self) -> None:
        """Print what is held back: something else is about to appear below it."""
        self._print_all(self._clock(), everything=True)

    def close(self, state: RunState) -> None:
        for rank in sorted({rank for rank, _ in self._splitters}):
            self._end_lines(rank)
        self.flush()
        if self._bar is not None:
            self._write(_wipe(self._bar), self._bar.stream)
            self._bar = None

    def _add(self, key: tuple[int, Stream], texts: list[str]) -> None:
        now = self._clock()
        by_line = not self._bare or self._repeats is not None
        self._held.add(*key, texts if by_line else ["".join(texts)], now)
        if now >= self._due or self._held.overfull:
            self._flush(now)

    def _end_lines(self, rank: int) -> None:
        for stream in ("stdout", "stderr"):
            splitter = self._splitters.get((rank, stream))
            texts = splitter.finish() if splitter else []
            if texts:
                self._add((rank, stream), texts)

    def _flush(self, now: float) -> None:
        self._due = now + _BATCH_SECONDS
        self._print_all(now)

    def _print_all(self, now: float, *, everything: bool = False) -> None:
        """Print what has been held long enough; with `everything`, all."""
        blocks = self._held.take(now, everything=everything)
        if self._repeats is not None:
            blocks = self._repeats.fold(blocks, now, everything=everything)
        if blocks:
            self._print(blocks)

    def _print(self, blocks: list[Block]) -> None:
        runs = self._labelled(blocks)
        bar, self._bar = self._bar, None
        if bar is not None:
            if runs[0][0] == bar.stream:
                runs[0] = bar.stream, _wipe(bar) + runs[0][1]
            else:
                self._write(_wipe(bar), bar.stream)
            # In the same write, so that it does not flicker; and on the stream just written, because a
            # notebook shows each change of stream as a new block, where nothing above can be painted over.
            again = self._unfinished(runs[-1][0])
            if again is not None and again.key == bar.key:
                runs[-1] = again.stream, runs[-1][1] + again.text
                self._bar = again
        for stream, text in runs:
            self._write(text, stream)

    def _labelled(self, blocks: list[Block]) -> list[tuple[Stream, str]]:
        """The text of `blocks`, cut where the stream changes."""
        runs: list[tuple[Stream, str]] = []
        parts: list[str] = []
        current = self._open[1] if self._open else blocks[0].stream
        for block in blocks:
            goes_on = False
            if self._open is not None:
                goes_on = self._open == (block.ranks, block.stream)
                if not goes_on:
                    parts.append("\n")  # another line comes between: what the piece continued ends here
            if block.stream != current:
                runs.append((current, "".join(parts)))
                parts, current = [], block.stream
            parts.append(_joined(block.texts, self._label(block.ranks), goes_on))
            self._open = None if parts[-1].endswith("\n") else (block.ranks, block.stream)
        runs.append((current, "".join(parts)))
        return runs

    def _label(self, ranks: int) -> str:
        if self._bare or (self._bare_rank0 and ranks == 1):
            return ""
        return _label(ranks << self._first_rank, self._long)

    def _repaint(self, now: float) -> None:
        old = self._bar
        new = self._unfinished(None)
        if old is not None and new is not None and old.key == new.key:
            new = new._replace(stream=old.stream)
        if old is not None and (new is None or old.stream != new.stream):
            self._write(_wipe(old), old.stream)
            old = None
        if new is not None and new != old:
            padding = " " * (old.width - new.width) if old else ""
            self._write(("\r" if old else "") + new.text + padding, new.stream)
            self._painted = now
        self._bar = new

    def _unfinished(self, stream: Stream | None) -> _Bar | None:
        """The unfinished line to show, to be painted on `stream` (None: its own): the lowest rank's that
        is a progress bar, else the lowest rank's whose earlier lines have all been printed."""
        if not self._transient or self._open is not None:
            return None
        for bars in (True, False):
            for key in sorted(self._splitters):
                splitter = self._splitters[key]
                if splitter.rewritten if bars else not self._held.waiting(key[0]):
                    text = fit(splitter.pending).rstrip(" ")
                    if text:
                        return self._painting(key, stream or key[1], text)
        return None

    def _painting(self, key: tuple[int, Stream], stream: Stream, text: str) -> _Bar:
        columns = None if self._columns is None else self._columns - 1  # the last one would wrap
        text = fit(self._label(1 << key[0]) + text, columns)
        # A terminal overwrites what can be seen; a notebook overwrites the raw text, colours and all.
        return _Bar(key, stream, text, len(text) if columns is None else visible(text))


def _wipe(bar: _Bar) -> str:
    return "\r" + " " * bar.width + "\r"


def _joined(texts: list[str], label: str, goes_on: bool) -> str:
    """`texts`, each with the label unless it continues the one before it (the first: if `goes_on`)."""
    plain = "".join(texts)
    if not label:
        return plain
    if plain.count("\n") == len(texts) and not goes_on:
        return label + label.join(texts)
    parts = []
    for text in texts:
        parts.append(text if goes_on else label + text)
        goes_on = not text.endswith("\n")
    return "".join(parts)


@lru_cache(maxsize=4096)
def _label(ranks: int, long: bool) -> str:
    """The label for a set of ranks, a bit for each: `[0,2-3] ` or `[ranks 0,2-3] `."""
    numbers = [rank for rank in range(ranks.bit_length()) if ranks >> rank & 1]
    spans: list[list[int]] = []
    for rank in numbers:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    word = ("rank " if len(numbers) == 1 else "ranks ") if long else ""
    return f"[{word}{text}] "
