"""Terminal text as HTML: escaped, its colours as styles, every other escape sequence dropped.

Source of the sequences: ECMA-48 section 8.3.117 (SGR), xterm's 256 colours.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

__all__ = ["ansi_to_html", "plain"]

_ESCAPE = re.compile(r"\x1b(?:\[([0-?]*)[ -/]*([@-~])|\][^\x07\x1b\n]*(?:\x07|\x1b\\)?|[@-Z\\^_]|$)")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

# Of middling lightness, to be read on white and on black.
_BASIC = (
    "#7f7f7f", "#d1453b", "#2f9e44", "#b58900", "#3b7dd8", "#b452b4", "#1c9c9c", "#9a9a9a",
    "#8f8f8f", "#e8594f", "#37b24d", "#d09b00", "#4d90f0", "#c568c5", "#22b3b3", "#b0b0b0",
)  # fmt: skip
_STEPS = (0, 95, 135, 175, 215, 255)


def ansi_to_html(text: str) -> str:
    """`text` as HTML that shows it as a terminal would."""
    return "".join(
        f'<span style="{style}">{html.escape(piece)}</span>' if style else html.escape(piece)
        for style, piece in _pieces(text)
    )


def plain(text: str) -> str:
    """`text` without escape sequences and control characters."""
    return _CONTROL.sub("", _ESCAPE.sub("", text))


def _pieces(text: str) -> Iterator[tuple[str, str]]:
    """(style, text) for stretches of one style."""
    style: dict[str, str] = {}
    at = 0
    for match in _ESCAPE.finditer(text):
        yield from _piece(style, text[at : match.start()])
        at = match.end()
        if match[2] == "m":
            _apply(style, match[1])
    yield from _piece(style, text[at:])


def _piece(style: dict[str, str], text: str) -> Iterator[tuple[str, str]]:
    text = _CONTROL.sub("", text)
    if text:
        yield ";".join(f"{name}:{value}" for name, value in style.items()), text


def _apply(style: dict[str, str], parameters: str) -> None:
    codes = [int(code) if code.isdigit() else 0 for code in re.split("[;:]", parameters)]
    while codes:
        code = codes.pop(0)
        if code == 0:
            style.clear()
        elif code == 1:
            style["font-weight"] = "bold"
        elif code == 3:
            style["font-style"] = "italic"
        elif code == 4:
            style["text-decoration"] = "underline"
        elif code in (22, 23, 24):
            style.pop({22: "font-weight", 23: "font-style", 24: "text-decoration"}[code], None)
        elif code in (39, 49):
            style.pop("color" if code == 39 else "background-color", None)
        elif code in (38, 48):
            if colour := _extended(codes):
                style["color" if code == 38 else "background-color"] = colour
        else:
            _basic(style, code)


def _basic(style: dict[str, str], code: int) -> None:
    for first, name, bright in ((30, "color", 0), (90, "color", 8), (40, "", 0), (100, "", 8)):
        if first <= code < first + 8:
            style[name or "background-color"] = _BASIC[code - first + bright]


def _extended(codes: list[int]) -> str | None:
    """The colour after 38 or 48, whose numbers are taken off `codes`."""
    kind = codes.pop(0) if codes else 0
    if kind == 2 and len(codes) >= 3:
        red, green, blue = (min(255, code) for code in codes[:3])
        del codes[:3]
        return f"#{red:02x}{green:02x}{blue:02x}"
    if kind != 5 or not codes:
        return None
    index = min(255, codes.pop(0))
    if index < 16:
        return _BASIC[index]
    if index >= 232:
        return "#" + f"{8 + 10 * (index - 232):02x}" * 3
    index -= 16
    return "#" + "".join(f"{_STEPS[index // unit % 6]:02x}" for unit in (36, 6, 1))
