"""Drive real Jupyter kernels as a front end does, and look at their processes from outside.

Times are seconds of `time.monotonic()`, which all processes of one Linux machine share.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any, final

import psutil
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

__all__ = ["Cell", "Kernel", "pss_bytes", "running_kernel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What one executed cell did."""

    sent: float
    """When the front end sent it."""
    idle: float
    """When the kernel reported that it was done."""
    text: str
    """What it printed, standard output and error together."""

    @property
    def seconds(self) -> float:
        return self.idle - self.sent


@final
class Kernel:
    """One running kernel. Make it with `running_kernel`."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient) -> None:
        self._manager = manager
        self._client = client

    def execute(self, source: str, *, timeout: float = 120) -> Cell:
        """Run one cell to its end.

        Raises:
            RuntimeError: the cell raised; the message holds its traceback.
            TimeoutError: it was not done after `timeout` seconds.
        """
        return self.finish(*self.send(source), timeout=timeout)

    def send(self, source: str) -> tuple[str, float]:
        """Send a cell and return at once; hand what this returns to `finish`."""
        sent = time.monotonic()
        return self._client.execute(source), sent

    def finish(self, message: str, sent: float, *, timeout: float = 120) -> Cell:
        """Wait for the end of a cell that `send` sent."""
        text: list[str] = []
        failure = ""
        while True:
            left = sent + timeout - time.monotonic()
            try:
                reply: dict[str, Any] = self._client.get_iopub_msg(timeout=max(left, 0.01))
            except Empty:
                raise TimeoutError(
                    f"a cell was not done after {timeout:.0f} s:\n{''.join(text)[-2000:]}"
                ) from None
            if reply["parent_header"].get("msg_id") != message:
                continue
            kind, content = reply["msg_type"], reply["content"]
            if kind == "stream":
                text.append(content["text"])
            elif kind == "error":
                failure = "\n".join(content["traceback"])
            elif kind == "status" and content["execution_state"] == "idle":
                break
        idle = time.monotonic()
        if failure:
            raise RuntimeError(f"a cell failed:\n{failure}\n{''.join(text)[-2000:]}")
        return Cell(sent=sent, idle=idle, text="".join(text))

    def processes(self) -> list[psutil.Process]:
        """The kernel's process and every descendant of it."""
        return _tree(self._manager)


@contextmanager
def running_kernel(*, env: Mapping[str, str] | None = None) -> Iterator[Kernel]:
    """A fresh kernel of this Python, ready for its first cell; shut down, with its descendants, at the end."""
    import os

    manager = KernelManager(kernel_name="python3")
    assert manager.kernel_spec is not None
    manager.kernel_spec.argv[0] = sys.executable
    # else ipykernel warns about its loopback port
    manager.start_kernel(env={**os.environ, **(env or {})}, extra_arguments=["--IPKernelApp.log_level=40"])
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        yield Kernel(manager, client)
    finally:
        client.stop_channels()
        # Killed, not asked: this also runs when the benchmark itself is being ended.
        tree = _tree(manager)
        for process in tree:
            process.kill()
        psutil.wait_procs(tree, timeout=5)
        manager.cleanup_resources()


def pss_bytes(processes: list[psutil.Process]) -> int:
    """Memory of these processes together, each shared page counted once (PSS of /proc/PID/smaps_rollup)."""
    total = 0
    for process in processes:
        try:
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) * 1024
    return total


def _tree(manager: KernelManager) -> list[psutil.Process]:
    try:
        kernel = psutil.Process(manager.provisioner.pid)  # type: ignore[union-attr]
        return [kernel, *kernel.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
