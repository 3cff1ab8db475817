"""Models larger than the device's memory, or than the machine's: built empty, placed, streamed while they run.

`plan` decides which module lies where and is pure; `weights` is where tensors lie; `hooks` brings them to
where they are needed, and takes them away again. Needs no ranks: works in a notebook's kernel and in ranks.
"""

from __future__ import annotations

from nbaccel.core.offload.dispatched import remove_hooks
from nbaccel.core.offload.meta import init_empty_weights, init_on_device
from nbaccel.core.offload.models import (
    cpu_offload,
    disk_offload,
    dispatch_model,
    infer_auto_device_map,
    load_checkpoint_and_dispatch,
)

__all__ = [
    "cpu_offload",
    "disk_offload",
    "dispatch_model",
    "infer_auto_device_map",
    "init_empty_weights",
    "init_on_device",
    "load_checkpoint_and_dispatch",
    "remove_hooks",
]
