"""`display`, `plt.show`, rich results and `clear_output` in a rank: shown in the notebook.

IPython's functions ask for the shell that runs the code. In a rank it is made when something first asks: a
rank that shows nothing pays nothing.
"""

from __future__ import annotations

import base64
import builtins
import json
import sys
from collections.abc import Mapping
from typing import Any, final

from nbaccel.rank.areas import clear_entered, emit_display, forget_areas, tell_outputs_apart
from nbaccel.rank.late import when_imported
from nbaccel.wire import events
from nbaccel.wire.events import Display

__all__ = ["Publisher", "relay_displays", "show_figures"]

_MOST_BYTES = 16 << 20
_INLINE = "matplotlib_inline.backend_inline"
_SOURCES = ("text/markdown", "text/latex", "application/json")
"""What says in words more than the name of a class does."""


def relay_displays() -> None:
    """Let what this rank shows appear in the notebook from now on."""
    builtins.display = _display  # type: ignore[attr-defined]  # as in a notebook's cells
    when_imported("IPython.core.interactiveshell", _make_shell_when_asked)
    tell_outputs_apart()


def show_figures() -> None:
    """Show the figures that were drawn and not shown, as at the end of a cell."""
    inline = sys.modules.get(_INLINE)
    pyplot = sys.modules.get("matplotlib.pyplot")
    if inline is None or pyplot is None or not pyplot.get_fignums():
        return
    if "inline" in str(pyplot.get_backend()):
        from IPython.core.getipython import get_ipython

        get_ipython()
        inline.show(True)


@final
class Publisher:
    """What IPython's functions hand displays to, as a shell's `display_pub`."""

    is_publishing = False

    def publish(
        self,
        data: Mapping[str, Any],
        metadata: Mapping[str, Any] | None = None,
        *_: Any,
        transient: Mapping[str, Any] | None = None,
        update: bool = False,
        **__: Any,
    ) -> None:
        """Show contents by MIME type in the notebook."""
        if not events.active():
            return
        plain = _with_words({mime: _plain(mime, value) for mime, value in data.items()})
        size = sum(len(value) for value in plain.values() if isinstance(value, str))
        if size > _MOST_BYTES:
            words = str(plain.get("text/plain", ""))[:1000]
            size >>= 20
            plain = {"text/plain": f"{words}\n(what was to be shown has {size} MB, too many for a notebook)"}
        name = (transient or {}).get("display_id")
        emit_display(Display(data=plain, metadata=_json(metadata or {}), name=name, update=update))

    def clear_output(self, wait: bool = False) -> None:
        """Remove what this rank has displayed, or inside an `Output` widget what it has displayed there; with `wait`,
        when it displays the next thing. What was printed is one log of all ranks, and stays."""
        if events.active() and not clear_entered(wait):
            forget_areas()
            events.emit(Display(data={}, clear="next" if wait else "now"))


def _display(*objects: Any, **options: Any) -> Any:
    from IPython.display import display

    show: Any = display
    return show(*objects, **options)


def _make_shell_when_asked(module: Any) -> None:
    """IPython's question whether there is a shell makes it; `shell` then answers such questions itself."""
    shell_class = module.InteractiveShell

    def make() -> None:
        from nbaccel.rank import shell

        shell.warm_up()
        if (inline := sys.modules.get(_INLINE)) is not None:
            inline._enable_matplotlib_integration()  # it looked for a shell when it was imported

    def initialized(cls: Any) -> bool:
        make()
        return True

    def instance(cls: Any, *args: Any, **options: Any) -> Any:
        make()
        return shell_class.instance()

    shell_class.initialized, shell_class.instance = classmethod(initialized), classmethod(instance)


def _with_words(data: dict[str, Any]) -> dict[str, Any]:
    """Contents whose text is their source, where it would be `<IPython.core.display.Markdown object>`."""
    source = next((data[mime] for mime in _SOURCES if mime in data), None)
    text = str(data.get("text/plain", ""))
    if source is None or not (text.startswith("<") and " object" in text and text.endswith(">")):
        return data
    words = source if isinstance(source, str) else json.dumps(source, indent=1, ensure_ascii=False)
    return {**data, "text/plain": words}


def _plain(mime: str, value: Any) -> Any:
    """A value that JSON can hold, of plain types: whoever shows it need not have the user's classes."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode() if not mime.startswith("text/") else value.decode()
    return value if isinstance(value, str) else _json(value)


def _json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
