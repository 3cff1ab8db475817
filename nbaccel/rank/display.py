"""`display`, `plt.show`, rich results and `clear_output` in a rank: shown in the notebook.

IPython's functions ask for the shell that runs the code. In a rank they find one that has what they need,
formatters and a publisher, and that is made when they first ask: a rank that shows nothing pays nothing.
"""

from __future__ import annotations

import base64
import builtins
import json
import sys
from collections.abc import Mapping
from typing import Any, final

from nbaccel.rank.late import when_imported
from nbaccel.wire import events
from nbaccel.wire.events import Display

__all__ = ["Displays"]

_MOST_BYTES = 16 << 20
_INLINE = "matplotlib_inline.backend_inline"


@final
class Displays:
    """Relays what this rank shows, from construction on."""

    def __init__(self) -> None:
        self._shell: Any = None
        builtins.display = _display  # type: ignore[attr-defined]  # as in a notebook's cells
        when_imported("IPython.core.interactiveshell", self._adopt)

    def show(self, value: Any) -> None:
        """What a notebook does with the last expression of a cell."""
        if value is not None:
            _display(value)

    def finish(self) -> None:
        """Show the figures that were drawn and not shown, as at the end of a cell."""
        inline = sys.modules.get(_INLINE)
        pyplot = sys.modules.get("matplotlib.pyplot")
        if inline is None or pyplot is None or not pyplot.get_fignums():
            return
        if "inline" not in str(pyplot.get_backend()):
            return
        import IPython

        if IPython.get_ipython() is not None:
            inline.show(True)

    def _adopt(self, module: Any) -> None:
        """Let IPython find our shell where it looks for the one there is."""
        shell_class = module.InteractiveShell

        def instance(cls: type, *args: Any, **kwargs: Any) -> Any:
            if self._shell is None:
                self._shell = _make_shell(module)
                if (inline := sys.modules.get(_INLINE)) is not None:
                    inline._enable_matplotlib_integration()
            return self._shell

        shell_class.instance = classmethod(instance)
        shell_class.initialized = classmethod(lambda cls: True)


def _display(*objects: Any, **options: Any) -> Any:
    from IPython.display import display

    return display(*objects, **options)


def _make_shell(module: Any) -> Any:
    """What stands in for IPython's shell: formatters, events, a namespace and the publisher."""
    from IPython.core.events import EventManager, available_events
    from IPython.core.formatters import DisplayFormatter
    from traitlets.config.configurable import Configurable

    class RankShell(Configurable):  # type: ignore[misc]
        """No terminal, no history, no magics."""

        def __init__(self) -> None:
            super().__init__()
            self.display_formatter = DisplayFormatter(parent=self)
            self.display_formatter.active_types = self.display_formatter.format_types
            self.display_pub = _Publisher()
            self.events = EventManager(self, available_events)
            self.configurables: list[Any] = [self]
            self.user_module = sys.modules["__main__"]
            self.user_ns = vars(self.user_module)

        def showtraceback(self, *_: Any, **__: Any) -> None:
            """IPython's callbacks show what they caught; here it is the rank's error."""
            raise

    module.InteractiveShellABC.register(RankShell)
    return RankShell()


@final
class _Publisher:
    """IPython's `display_pub`."""

    is_publishing = False

    def publish(
        self,
        data: Mapping[str, Any],
        metadata: Mapping[str, Any] | None = None,
        source: str | None = None,
        *,
        transient: Mapping[str, Any] | None = None,
        update: bool = False,
        **_: Any,
    ) -> None:
        """Send it to the notebook."""
        if not events.active():
            return
        name = (transient or {}).get("display_id")
        plain = {mime: _plain(mime, value) for mime, value in data.items()}
        size = sum(len(value) for value in plain.values() if isinstance(value, str))
        if size > _MOST_BYTES:
            words = str(plain.get("text/plain", ""))[:1000]
            plain = {
                "text/plain": f"{words}\n(what was to be shown has {size >> 20} MB, too many for a notebook)"
            }
        events.emit(Display(data=plain, metadata=_json(metadata or {}), name=name, update=update))

    def clear_output(self, wait: bool = False) -> None:
        """Remove what this rank has shown."""
        if events.active():
            events.emit(Display(data={}, clear="next" if wait else "now"))


def _plain(mime: str, value: Any) -> Any:
    """A value that JSON can hold, of plain types: whoever shows it need not have the user's classes."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode() if not mime.startswith("text/") else value.decode()
    return value if isinstance(value, str) else _json(value)


def _json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
