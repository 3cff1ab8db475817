"""What ranks display, below the cell that launched: by rank, and side by side when several show the same kind.

The n-th thing of a kind that each rank shows shares one place: one rank's as it is, several ranks' as a grid. What
only the front end can draw (widgets, Markdown, Latex, JSON) cannot stand in a grid: it has a place of its own below
a label, and ranks that show the very same share it. Updates and what replaces after `clear_output(wait=True)` go to
the front end ten times a second at most. Inside an `Output` widget, where nothing can be replaced, each rank's thing
has a place of its own and stays as it was first.
"""

from __future__ import annotations

import base64
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from html import escape
from typing import final

from nbaccel.notebook.cell import Bundle, Cell
from nbaccel.notebook.widgets import VIEW, RankWidgets
from nbaccel.session.results import rank_ranges
from nbaccel.session.state import RunState
from nbaccel.wire.events import Display, Event

__all__ = ["Displays"]

_SECONDS = 0.1
_MOST = 40
"""Places of one run; what comes after takes that of the last, and a line says so."""
_IMAGES = ("image/png", "image/jpeg", "image/gif", "image/webp")
_SVG = "image/svg+xml"
_NOTHING: Bundle = {"text/html": "", "text/plain": ""}


@dataclass(frozen=True, slots=True)
class _Piece:
    """One rank's content of a place."""

    data: Bundle
    metadata: Bundle
    kind: str
    """The MIME type that matters; it stays a widget's when the widget has become HTML."""

    @property
    def in_grid(self) -> bool:
        """Whether it can be HTML among others."""
        return self.kind in ("text/html", "text/plain", _SVG, *_IMAGES)


@final
class Displays:
    """A sink that shows Display events.

    Args:
        cell: where.
        num_ranks: of the run; one alone has no label.
        before: called before a new output appears, to print text that is held back.
        widgets: knows the widgets that ranks show.
    """

    def __init__(
        self, cell: Cell, *, num_ranks: int, before: Callable[[], None], widgets: RankWidgets
    ) -> None:
        self._cell, self._alone, self._before, self._widgets = cell, num_ranks == 1, before, widgets
        self._prefix = f"nbaccel-{secrets.token_hex(6)}"
        self._places: list[dict[int, _Piece]] = []
        self._labels: dict[int, str] = {}  # what is written above a place; only some have room for it
        self._rows: dict[tuple[str, int], list[int]] = {}  # the places of the ranks' n-th things of a kind
        self._free: set[int] = set()  # places of what was cleared
        self._used: list[Counter[str]] = [Counter() for _ in range(num_ranks)]  # things shown, by their kind
        self._last = [-1] * num_ranks  # the lowest place each rank has filled
        self._names: dict[tuple[int, str], int] = {}
        self._clearing = [False] * num_ranks
        self._lost: Counter[int] = Counter()  # what had to make room, by rank
        self._said: str | None = None
        self._label_first = False
        self._dirty: set[int] = set()
        self._due = 0.0

    def handle(self, event: Event, state: RunState) -> None:
        if not isinstance(event, Display):
            return
        rank, piece = event.rank, _Piece(event.data, event.metadata, _kind(event.data))
        if self._cell.captured:
            if event.clear is None and not event.update:
                self._append(rank, piece)
            return
        if event.clear is not None:
            self._clearing[rank] = True
            if event.clear == "now":
                self._clear(rank)
            return
        if event.update:
            at = self._updated(rank, event.name or "", piece)
            if at is None:
                return
        else:
            self._clear(rank)
            at = self._emptied(rank, event.name or "", piece)
            if at is None:
                at = self._place(rank, piece)
        if event.name is not None:
            self._names[rank, event.name] = at
        self._put(at, rank, piece)

    def tick(self, now: float) -> None:
        if now >= self._due and self._dirty:
            self._due = now + _SECONDS
            self._show_changes()

    def close(self, state: RunState) -> None:
        for rank in range(len(self._used)):
            self._clear(rank)
        for at, place in enumerate(self._places):
            for rank, piece in place.items():
                if VIEW in piece.data:
                    place[rank] = replace(piece, data=self._widgets.still(piece.data), metadata={})
                    self._dirty.add(at)
        self._show_changes()

    def _append(self, rank: int, piece: _Piece) -> None:
        """Show it below everything else, where nothing can be replaced later."""
        self._before()
        if len(self._places) == _MOST:
            self._lost[rank] += 1
            return
        self._places.append({})
        if VIEW in piece.data:
            data = self._widgets.still(piece.data)
            piece = _Piece(data, {}, _kind(data))
        if not self._alone and piece.in_grid:
            self._cell.show(_grid({rank: piece}))
            return
        if not self._alone:
            self._cell.show(_small(_label([rank])))
        self._cell.show(piece.data, metadata=piece.metadata)

    def _updated(self, rank: int, name: str, piece: _Piece) -> int | None:
        """Where an update goes: into its place if it can stand there; None when there is nothing to show."""
        at = self._names.get((rank, name))
        if at is None:
            return None  # its output has been cleared
        if piece.data and self._fits(at, rank, piece, update=True):
            return at
        self._places[at].pop(rank, None)
        self._dirty.add(at)
        # without contents an `Output` widget was cleared: the name stays, and may get some again
        return self._place(rank, piece) if piece.data else None

    def _emptied(self, rank: int, name: str, piece: _Piece) -> int | None:
        """The place of this name, if it was emptied and can be filled again."""
        at = self._names.get((rank, name))
        if at is None or rank in self._places[at] or not self._fits(at, rank, piece):
            return None
        return at

    def _place(self, rank: int, piece: _Piece) -> int:
        """Where a rank's next thing goes."""
        key = piece.kind, self._used[rank][piece.kind]
        self._used[rank][piece.kind] += 1
        at = next((at for at in self._rows.get(key, ()) if self._fits(at, rank, piece)), None)
        if at is None:
            at = self._room(rank, piece)
            if at is None:
                return self._crowded(rank, piece)
            self._rows.setdefault(key, []).append(at)
            self._free.discard(at)
        self._last[rank] = max(self._last[rank], at)
        return at

    def _fits(self, at: int, rank: int, piece: _Piece, *, update: bool = False) -> bool:
        """Whether it can stand there with what other ranks show; an update keeps its place if it can at all."""
        others = [other for one, other in self._places[at].items() if one != rank]
        if not piece.in_grid:
            return (self._alone or at in self._labels) and all(other == piece for other in others)
        return all(other.in_grid and (update or other.kind == piece.kind) for other in others)

    def _room(self, rank: int, piece: _Piece) -> int | None:
        """A place that nobody uses, below what the rank has shown if there is one; None when there is none."""
        free = sorted(at for at in self._free if self._fits(at, rank, piece))
        below = [at for at in free if at > self._last[rank]]
        if below:
            return below[0]
        return len(self._places) if len(self._places) < _MOST else next(iter(free), None)

    def _crowded(self, rank: int, piece: _Piece) -> int:
        """The last place that it can take from what the rank has shown there."""
        fitting = (at for at in reversed(range(_MOST)) if self._fits(at, rank, piece))
        at = next(fitting, _MOST - 1)
        if rank in self._places[at]:
            self._lost[rank] += 1
            self._names = {key: place for key, place in self._names.items() if key[0] != rank or place != at}
            self._dirty.add(at)
        return at

    def _clear(self, rank: int) -> None:
        """Do what `clear_output` asked for."""
        if not self._clearing[rank]:
            return
        self._clearing[rank], self._last[rank], self._lost[rank] = False, -1, 0
        self._used[rank].clear()
        self._names = {key: at for key, at in self._names.items() if key[0] != rank}
        for at, place in enumerate(self._places):
            if place.pop(rank, None) is not None:
                self._dirty.add(at)
                if not place:
                    self._free.add(at)
        self._rows = {
            key: kept
            for key, row in self._rows.items()
            if (kept := [at for at in row if at not in self._free])
        }

    def _put(self, at: int, rank: int, piece: _Piece) -> None:
        new = at == len(self._places)
        if new:
            self._before()
            self._places.append({})
        self._places[at][rank] = piece
        if not piece.in_grid and rank != 0 and not self._label_first:
            self._label_first = True  # from now on the first rank's are told apart too
            self._dirty.update(self._labels)
        if not new:
            self._dirty.add(at)
            return
        if not piece.in_grid and not self._alone:
            self._show_label(at)
        self._show(at, update=False)

    def _show_changes(self) -> None:
        for at in sorted(self._dirty):
            if at in self._labels:
                self._show_label(at)
            self._show(at, update=True)
        self._dirty.clear()
        self._show_lost()

    def _show(self, at: int, *, update: bool) -> None:
        data, metadata = self._content(at)
        if VIEW in data:
            # beside the widget what it looks like, for where there are none
            data = {**self._widgets.still(data), VIEW: data[VIEW]}
        self._cell.show(data, metadata=metadata, name=f"{self._prefix}-{at}", update=update)

    def _show_label(self, at: int) -> None:
        """Say above a place whose content it has; it may say nothing, and something later."""
        place = self._places[at]
        first = [*place] == [0] and place[0].kind != VIEW and not self._label_first
        text = "" if first or not self._is_own(at) else _label(place)
        if self._labels.get(at) == text:
            return
        name = f"{self._prefix}-{at}-label"
        self._cell.show(_small(text), name=name, update=at in self._labels)
        self._labels[at] = text

    def _show_lost(self) -> None:
        """Say how much is not shown."""
        num = sum(self._lost.values())
        text = ""
        if num:
            whose = "" if self._alone else f" of {_label(rank for rank in self._lost if self._lost[rank])}"
            what = f"{num} display{'s' if num > 1 else ''}{whose} {'are' if num > 1 else 'is'} not shown"
            text = f"{what}: a run has {_MOST} outputs"
            text += "" if self._cell.captured else ", and what comes after takes the place of the last"
        if text == (self._said or ""):
            return
        if self._said is None:
            self._before()
        self._cell.show(_small(text), name=f"{self._prefix}-lost", update=self._said is not None)
        self._said = text

    def _is_own(self, at: int) -> bool:
        """Whether the front end draws what is there: one thing, of one rank or of several."""
        pieces = list(self._places[at].values())
        return bool(pieces) and not pieces[0].in_grid and all(piece == pieces[0] for piece in pieces)

    def _content(self, at: int) -> tuple[Bundle, Bundle]:
        """Data and metadata of one output."""
        place = dict(sorted(self._places[at].items()))
        if not place:
            return _NOTHING, {}
        own = self._is_own(at) and at in self._labels
        if own or self._alone or [*place] == [0]:
            piece = next(iter(place.values()))
            return piece.data, piece.metadata
        return _grid(place), {}


def _grid(place: Mapping[int, _Piece]) -> Bundle:
    """Several ranks' contents side by side; those that show the very same are shown once."""
    alike: dict[str, list[int]] = {}
    plain: dict[str, list[int]] = {}
    for rank, piece in place.items():
        alike.setdefault(_as_html(piece), []).append(rank)
        plain.setdefault(str(piece.data.get("text/plain", "")), []).append(rank)
    cells = "".join(
        f'<div style="min-width:0;overflow-x:auto"><div style="font-size:12px;opacity:0.7">{_label(ranks)}</div>'
        f"{content}</div>"
        for content, ranks in alike.items()
    )
    text = "\n".join(f"[{rank_ranges(ranks)}] {words}" for words, ranks in plain.items())
    style = "display:flex;flex-wrap:wrap;gap:6px 16px;align-items:flex-start"
    return {"text/html": f'<div style="{style}">{cells}</div>', "text/plain": text}


def _label(ranks: Iterable[int]) -> str:
    listed = sorted(ranks)
    return f"rank{'s' if len(listed) > 1 else ''} {rank_ranges(listed)}"


def _small(text: str) -> Bundle:
    """A line beside what ranks show."""
    if not text:
        return _NOTHING
    return {"text/html": f'<div style="font-size:12px;opacity:0.7">{text}</div>', "text/plain": text}


def _kind(data: Bundle) -> str:
    """The MIME type that says how contents are drawn."""
    if VIEW in data:
        return VIEW
    if isinstance(data.get("text/html"), str):
        return "text/html"
    if (application := next((mime for mime in data if mime.startswith("application/")), None)) is not None:
        return application
    drawn = (*_IMAGES, _SVG, "text/markdown", "text/latex")
    return next((mime for mime in drawn if isinstance(data.get(mime), str)), "text/plain")


def _as_html(piece: _Piece) -> str:
    """Contents as HTML that can stand among others; the words of what cannot."""
    content = str(piece.data.get(piece.kind, ""))
    if piece.kind == "text/html":
        return content
    if piece.kind in _IMAGES:
        style, image = "max-width:420px;background-color:#ffffff", escape(content)
        return f'<img style="{style}" src="data:{piece.kind};base64,{image}">'
    if piece.kind == _SVG:
        image = base64.b64encode(content.encode()).decode()
        return f'<img style="max-width:420px" src="data:image/svg+xml;base64,{image}">'
    return f'<pre style="margin:0">{escape(str(piece.data.get("text/plain", "")))}</pre>'
