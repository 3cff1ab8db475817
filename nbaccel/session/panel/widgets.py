"""ipywidgets as they were last, in HTML and in words: what stays of them in a notebook."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import Any

__all__ = ["Models", "widget_html", "widget_text"]

Models = Mapping[str, Mapping[str, Any]]
"""The state of each widget's model, by the id of its comm."""

_REFERENCE = "IPY_MODEL_"
_DEEPEST = 12
_HIDDEN = "••••"
_BOX = "border:1px solid rgba(128,128,128,0.5);border-radius:3px;padding:0 8px"
_TRACK = (
    "display:inline-block;width:150px;height:6px;border-radius:3px;"
    "background-color:rgba(128,128,128,0.25);vertical-align:middle;overflow:hidden"
)
_ROWS = ("HBoxModel",)
_COLUMNS = ("VBoxModel", "BoxModel", "GridBoxModel", "TabModel", "AccordionModel", "StackModel")


def widget_html(model: str, models: Models) -> str:
    """The widget `model` and what is in it."""
    return _html(model, models, 0)


def widget_text(model: str, models: Models) -> str:
    """The same in words, a widget in a box after the other."""
    return ", ".join(filter(None, _words(model, models, 0)))


def _html(model: str, models: Models, depth: int) -> str:
    state = models.get(model)
    if state is None or depth > _DEEPEST:
        return ""
    kind = str(state.get("_model_name"))
    if kind in _ROWS + _COLUMNS:
        direction = "row" if kind in _ROWS else "column"
        style = f"display:flex;flex-flow:{direction} wrap;gap:4px 10px;align-items:flex-start"
        inside = "".join(_html(child, models, depth + 1) for child in _children(state))
        return f'<div style="{style}">{inside}</div>'
    if kind in ("HTMLModel", "HTMLMathModel"):
        return f"<div>{_description(state)}{state.get('value', '')}</div>"  # as `display(HTML(…))` shows it
    if kind == "ImageModel":
        return _image(state)
    if kind == "OutputModel":
        return f"<pre>{escape(text)}</pre>" if (text := _printed(state)) else ""
    name = "" if kind == "ButtonModel" else _description(state)
    return f"<div>{name}{_control(kind, state)}</div>"


def _description(state: Mapping[str, Any]) -> str:
    name = str(state.get("description") or "")
    return f'<span style="opacity:0.7">{escape(name)}</span> ' if name else ""


def _control(kind: str, state: Mapping[str, Any]) -> str:
    if kind == "ButtonModel":
        return f'<span style="{_BOX};opacity:0.7">{escape(str(state.get("description", "")))}</span>'
    share = _share(state)
    if share is None:
        return escape(_value(kind, state))
    bar = f'<span style="display:block;width:{share:.1%};height:6px;background-color:#3b8fd0"></span>'
    return f'<span style="{_TRACK}">{bar}</span> {escape(_value(kind, state))}'


def _share(state: Mapping[str, Any]) -> float | None:
    """How far along its range a slider or a progress bar is; None for anything else."""
    numbers = [state.get(name) for name in ("min", "max", "value")]
    low, high, value = (one if isinstance(one, (int, float)) else math.nan for one in numbers)
    return min(1.0, max(0.0, (value - low) / (high - low))) if low < high and value == value else None


def _image(state: Mapping[str, Any]) -> str:
    value = state.get("value")
    if not isinstance(value, (bytes, bytearray)):
        return ""
    kind, data = escape(str(state.get("format") or "png")), base64.b64encode(value).decode()
    return f'<img style="max-width:420px" src="data:image/{kind};base64,{data}">'


def _value(kind: str, state: Mapping[str, Any]) -> str:
    """A widget's value in words."""
    labels, index = state.get("_options_labels"), state.get("index")
    if isinstance(labels, (list, tuple)):
        chosen = index if isinstance(index, (list, tuple)) else [index]
        return ", ".join(str(labels[at]) for at in chosen if isinstance(at, int) and at < len(labels))
    value = state.get("value")
    if kind == "PasswordModel":
        return _HIDDEN if value else ""
    if kind == "FileUploadModel":
        return ", ".join(str(file.get("name")) for file in value or () if isinstance(file, Mapping))
    if isinstance(value, bool):
        return "✓" if value else "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return " – ".join(map(str, value))
    return kind.removesuffix("Model") if value is None else str(value)


def _words(model: str, models: Models, depth: int) -> Iterable[str]:
    state = models.get(model)
    if state is None or depth > _DEEPEST:
        return
    kind = str(state.get("_model_name"))
    if kind in _ROWS + _COLUMNS:
        for child in _children(state):
            yield from _words(child, models, depth + 1)
        return
    if kind == "OutputModel":
        yield _printed(state)
        return
    name = str(state.get("description") or "")
    value = "" if kind in ("ButtonModel", "ImageModel") else _value(kind, state)
    yield f"{name}: {value}" if name and value else name or value


def _printed(state: Mapping[str, Any]) -> str:
    """What `Output.append_stdout` and its like put there; what was shown inside it stands in the cell."""
    return "".join("".join(one.get("text", "")) for one in state.get("outputs") or ())


def _children(state: Mapping[str, Any]) -> list[str]:
    strip: Callable[[Any], str] = lambda reference: str(reference).removeprefix(_REFERENCE)  # noqa: E731
    return [strip(child) for child in state.get("children") or ()]
