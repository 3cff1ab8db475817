"""Outputs of the cell that launched, sent from any thread, also when later cells run.

`display()` from a thread goes to the last cell on ipykernel 6 and fails in a thread without a context on
7.0; a message that names its cell as the parent always arrives there.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, final

__all__ = ["Bundle", "Cell"]

Bundle = Mapping[str, Any]
"""Contents by MIME type."""


@final
class Cell:
    """The cell that runs now, as a place for outputs. Made in the main thread.

    Args:
        kernel: the ipykernel this process runs in.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.parent: Mapping[str, Any] = kernel.get_parent("shell")
        """The request the front end sent for this cell."""
        self.captured = _is_captured(self.parent)
        """Whether an `Output` widget takes the cell's outputs: none of them can be replaced."""
        self.running = True
        """Until the cell's last line has run."""
        events = kernel.shell.events

        def over(*_: object) -> None:
            self.running = False
            events.unregister("post_run_cell", over)

        events.register("post_run_cell", over)

    def show(
        self, data: Bundle, *, metadata: Bundle | None = None, name: str | None = None, update: bool = False
    ) -> None:
        """Add an output, or with `update` replace the one of this name wherever it is shown."""
        if not update:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()  # what was printed before stands before
        self.send(
            "update_display_data" if update else "display_data",
            {
                "data": dict(data),
                "metadata": dict(metadata or {}),
                "transient": {"display_id": name} if name else {},
            },
        )

    def send(
        self,
        kind: str,
        content: Mapping[str, Any],
        parent: Mapping[str, Any] | None = None,
        *,
        metadata: Mapping[str, Any] | None = None,
        buffers: Sequence[bytes] = (),
    ) -> None:
        """Publish a message; its parent is the cell's request unless another is given."""
        self.kernel.session.send(
            self.kernel.iopub_socket,
            kind,
            dict(content),
            parent=parent or self.parent,
            ident=kind.encode(),
            metadata=dict(metadata or {}),
            buffers=list(buffers),
        )


def _is_captured(parent: Mapping[str, Any]) -> bool:
    """Whether the code that answers this request stands in `with Output():`. JupyterLab's widget takes what is added
    there and passes over what replaces."""
    output = getattr(sys.modules.get("ipywidgets.widgets.widget_output"), "Output", None)
    request = parent.get("header", {}).get("msg_id")
    if output is None or not request:
        return False
    widgets = getattr(sys.modules["ipywidgets.widgets.widget"], "_instances", {})
    return any(isinstance(widget, output) and widget.msg_id == request for widget in list(widgets.values()))
