"""What the training core asks of a TPU's runtime, which the rank's process has set up before.

Under TorchTPU a chip is a torch device like a GPU, and the ordinary strategies drive it. Where torch_xla makes ranks of
threads (two cores of a v2 or v3 chip, its CPU device), environment variables cannot tell them apart and the runtime
does.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from nbaccel.core.world import Environment

__all__ = ["as_this_replica", "device", "is_present"]


def is_present() -> bool:
    """Whether the launch has made this process a rank on a TPU."""
    on_xla = "torch_xla" in sys.modules and os.environ.get("PJRT_DEVICE", "").upper() == "TPU"
    return on_xla or "torch_tpu" in sys.modules


def device() -> torch.device:
    """This rank's device; opens it if nobody has.

    Raises:
        ImportError: torch_xla is not installed.
    """
    if "torch_tpu" in sys.modules:
        return torch.device("tpu", 0)
    found: torch.device = importlib.import_module("torch_xla").device()
    return found


def as_this_replica(environment: Environment) -> Environment:
    """`environment`, with the rank of the calling thread where several are threads of this process."""
    xla = sys.modules.get("torch_xla")
    if xla is None or not xla._XLAC._xla_runtime_is_initialized():
        return environment
    runtime: Any = importlib.import_module("torch_xla.runtime")
    if runtime.addressable_device_count() < 2 or environment.size < 2:
        return environment
    index = xla.device().index  # the variables are the first one's, which has the first device
    return replace(environment, rank=environment.rank + index, local_rank=environment.local_rank + index)
