"""What ranks display, below the cell that launched: by rank, and side by side when several show the same.

The n-th thing each rank shows shares one output: one rank's as it is, several ranks' as a grid. Updates and
what replaces after `clear_output(wait=True)` go to the front end ten times a second at most. A widget has an output of
its own: it cannot stand in a grid.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from html import escape
from typing import Any, final

from nbaccel.notebook.cell import Bundle, Cell
from nbaccel.notebook.widgets import VIEW, RankWidgets
from nbaccel.session.results import rank_ranges
from nbaccel.session.state import RunState
from nbaccel.wire.events import Display, Event

__all__ = ["Displays"]

_SECONDS = 0.1
_MOST = 40
"""Outputs of one run; what comes after takes the place of the last."""
_IMAGES = ("image/png", "image/jpeg", "image/gif", "image/webp")


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
        self._groups: list[dict[int, Display]] = []
        self._shared: list[int] = []  # the groups that ranks fill together, by their place
        self._used = [0] * num_ranks  # how many of these each rank has filled
        self._names: dict[tuple[int, str], int] = {}
        self._clearing = [False] * num_ranks
        self._dirty: set[int] = set()
        self._due = 0.0

    def handle(self, event: Event, state: RunState) -> None:
        if not isinstance(event, Display):
            return
        rank = event.rank
        if event.clear is not None:
            self._clearing[rank] = True
            if event.clear == "now":
                self._clear(rank)
            return
        if event.update:
            at = self._names.get((rank, event.name or ""))
            if at is None:
                return  # its output has been cleared
        else:
            self._clear(rank)
            at = self._place(event)
            if event.name is not None:
                self._names[rank, event.name] = at
        self._put(at, event)

    def tick(self, now: float) -> None:
        if now >= self._due and self._dirty:
            self._due = now + _SECONDS
            self._show_changes()

    def close(self, state: RunState) -> None:
        for rank in range(len(self._used)):
            self._clear(rank)
        for at, group in enumerate(self._groups):
            for rank, event in group.items():
                if VIEW in event.data:
                    group[rank] = replace(event, data=self._widgets.still(event.data), metadata={})
                    self._dirty.add(at)
        self._show_changes()

    def _place(self, event: Display) -> int:
        """The group it goes to."""
        new = len(self._groups)
        if VIEW in event.data:
            return min(new, _MOST - 1)
        used = self._used[event.rank]
        self._used[event.rank] = used + 1
        if used < len(self._shared):
            return self._shared[used]
        if new < _MOST:
            self._shared.append(new)
            return new
        return self._shared[-1] if self._shared else _MOST - 1

    def _clear(self, rank: int) -> None:
        """Do what `clear_output` asked for."""
        if not self._clearing[rank]:
            return
        self._clearing[rank], self._used[rank] = False, 0
        self._names = {key: at for key, at in self._names.items() if key[0] != rank}
        for at, group in enumerate(self._groups):
            if group.pop(rank, None) is not None:
                self._dirty.add(at)

    def _put(self, at: int, event: Display) -> None:
        if at < len(self._groups):
            self._groups[at][event.rank] = event
            self._dirty.add(at)
            return
        self._before()
        if VIEW in event.data and not self._alone:
            label = _label([event.rank])
            html = f'<div style="font-size:12px;opacity:0.7">{label}</div>'
            self._cell.show({"text/html": html, "text/plain": label})
        self._groups.append({event.rank: event})
        self._show(at, update=False)

    def _show_changes(self) -> None:
        for at in sorted(self._dirty):
            self._show(at, update=True)
        self._dirty.clear()

    def _show(self, at: int, *, update: bool) -> None:
        data, metadata = self._content(at)
        if VIEW in data:
            # beside the widget what it looks like, for where there are none
            data = {**self._widgets.still(data), VIEW: data[VIEW]}
        self._cell.show(data, metadata=metadata, name=f"{self._prefix}-{at}", update=update)

    def _content(self, at: int) -> tuple[Bundle, Bundle]:
        """Data and metadata of one output."""
        group = dict(sorted(self._groups[at].items()))
        if not group:
            return {"text/html": "", "text/plain": ""}, {}
        if len(group) == 1:
            (rank, event), *_ = group.items()
            if self._alone or rank == 0 or at not in self._shared or _as_html(event.data) is None:
                return event.data, event.metadata
        return _grid(group), {}


def _grid(group: Mapping[int, Display]) -> Bundle:
    """Several ranks' contents side by side; those that show the very same are shown once."""
    alike: dict[str, list[int]] = {}
    plain: dict[str, list[int]] = {}
    for rank, event in group.items():
        shown = _as_html(event.data)
        words = str(event.data.get("text/plain", ""))
        alike.setdefault(shown if shown is not None else _pre(words), []).append(rank)
        plain.setdefault(words, []).append(rank)
    cells = "".join(
        f'<div style="min-width:0;overflow-x:auto"><div style="font-size:12px;opacity:0.7">{_label(ranks)}</div>'
        f"{content}</div>"
        for content, ranks in alike.items()
    )
    text = "\n".join(f"[{rank_ranges(ranks)}] {words}" for words, ranks in plain.items())
    style = "display:flex;flex-wrap:wrap;gap:6px 16px;align-items:flex-start"
    return {"text/html": f'<div style="{style}">{cells}</div>', "text/plain": text}


def _label(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {rank_ranges(ranks)}"


def _as_html(data: Bundle) -> str | None:
    """Contents as HTML that can stand among others; None when only the front end can draw them."""
    if isinstance(html := data.get("text/html"), str):
        return html
    if any(mime.startswith("application/") for mime in data):
        return None
    for mime in _IMAGES:
        if isinstance(image := data.get(mime), str):
            return f'<img style="max-width:420px;background-color:#ffffff" src="data:{mime};base64,{escape(image)}">'
    if isinstance(svg := data.get("image/svg+xml"), str):
        image = base64.b64encode(svg.encode()).decode()
        return f'<img style="max-width:420px" src="data:image/svg+xml;base64,{image}">'
    words: Any = data.get("text/markdown") or data.get("text/latex") or data.get("text/plain", "")
    return _pre(str(words))


def _pre(text: str) -> str:
    return f'<pre style="margin:0">{escape(text)}</pre>'
