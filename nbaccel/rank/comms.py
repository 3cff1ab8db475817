"""ipywidgets made in a rank: their comms are opened in the notebook's page, and hear it while the rank works.

The page's messages are handled in a thread of their own, as the main thread is busy; what handlers print and
change is the rank's.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, final

from nbaccel.rank.late import when_imported
from nbaccel.wire import events
from nbaccel.wire.channel import ChannelClosed
from nbaccel.wire.events import CommMessage, Request

__all__ = ["Heard", "relay_comms"]


class Heard(Protocol):
    """Where the page's messages arrive."""

    def wait_comm(self) -> Request:
        """The next message to a comm of this rank.

        Raises:
            ChannelClosed: the notebook is gone.
        """


def relay_comms(heard: Heard) -> None:
    """Open the comms of this rank in the notebook from now on."""
    when_imported("comm", lambda module: _replace(module, heard))


def _replace(module: Any, heard: Heard) -> None:
    manager = module.base_comm.CommManager()
    opened: list[threading.Thread] = []

    @final
    class Comm(module.base_comm.BaseComm):  # type: ignore[misc]
        """One whose other end is in the notebook's page."""

        def publish_msg(
            self,
            msg_type: str,
            data: Mapping[str, Any] | None = None,
            metadata: Mapping[str, Any] | None = None,
            buffers: Sequence[Any] | None = None,
            **_: Any,
        ) -> None:
            if not events.active():
                return
            if not opened:
                opened.append(_listen(manager, heard))
            events.emit(
                CommMessage(
                    kind=msg_type,  # type: ignore[arg-type]  # the protocol's three
                    comm=self.comm_id,
                    target=self.target_name,
                    data=json.loads(json.dumps(data or {}, default=str)),
                    metadata=json.loads(json.dumps(metadata or {}, default=str)),
                    buffers=tuple(bytes(buffer) for buffer in buffers or ()),
                )
            )

    module.create_comm = Comm
    module.get_comm_manager = lambda: manager


def _listen(manager: Any, heard: Heard) -> threading.Thread:
    thread = threading.Thread(target=_hear, args=(manager, heard), name="nbaccel-widgets", daemon=True)
    thread.start()
    return thread


def _hear(manager: Any, heard: Heard) -> None:
    if hasattr(signal, "pthread_sigmask"):
        # the user's handlers run in the main thread; a blocked system call there must be the one to end
        signal.pthread_sigmask(
            signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
        )
    while True:
        try:
            request = heard.wait_comm()
        except (ChannelClosed, OSError):
            return  # the notebook is gone; the main thread ends the rank
        comm = manager.comms.get(request.name)
        if comm is None:
            continue  # closed meanwhile
        message = {
            "content": {"comm_id": request.name, "data": request.value["data"]},
            "buffers": [memoryview(buffer) for buffer in request.value["buffers"]],
        }
        try:
            comm.handle_msg(message)
        except Exception:  # noqa: BLE001  # the user's handler: shown where the rank prints
            traceback.print_exc(file=sys.stderr)
