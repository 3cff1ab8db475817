"""The TPU runtime in a rank's process: told its place before it opens a chip.

torch_xla: what `torch_xla.launch` does in each process it makes (torch_xla 2.9 `_internal/pjrt.py`), for its
processes cannot be ours: they are made by an executor, give nothing back and end with it. In SPMD mode one process
has all devices and sees one. TorchTPU reads its place from the variables the launch has set (`engines.tpu`) and
torchrun's; a rank's chip is device 0 to it.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from nbaccel.rank.spec import RunSpec

if TYPE_CHECKING:
    import torch

__all__ = ["current_device", "set_up", "use"]


def set_up(spec: RunSpec, process: int) -> list[torch.device]:
    """Open this process's devices; one for each of its ranks.

    Args:
        process: the number of this process on its host.

    Raises:
        RuntimeError: the runtime has another number of devices than were planned, or numbers them otherwise.
    """
    processes = spec.num_processes // spec.replicas
    if spec.runtime == "torch_tpu":
        importlib.import_module("torch_tpu")
        return [_device("tpu:0")]
    if os.environ.get("PJRT_DEVICE", "").upper() == "TPU":  # the CPU's programs cannot be read back
        os.environ.setdefault("XLA_PERSISTENT_CACHE_PATH", _cache_folder(process, processes))
    pjrt = importlib.import_module("torch_xla._internal.pjrt")
    if os.environ.get("XLA_USE_SPMD") == "1":
        return [current_device()]
    if spec.num_processes == 1:
        pjrt.initialize_singleprocess()
    else:
        pjrt.initialize_multiprocess(process, processes)
    model = importlib.import_module("torch_xla.core.xla_model")
    devices = list(model.get_xla_supported_devices())
    if len(devices) < spec.replicas:
        raise RuntimeError(
            f"process {process} was to have {spec.replicas} XLA devices, but the runtime gives it {len(devices)} "
            f"({', '.join(devices)}). Variables of an earlier start may still be set: restart the kernel."
        )
    return [_device(name) for name in devices[: spec.replicas]]


def use(device: torch.device, rank: int) -> None:
    """Let the calling thread, which is this rank, compute on this device.

    Raises:
        RuntimeError: the runtime calls it another rank.
    """
    if device.type != "xla":
        return  # TorchTPU's chip is bound by the variables
    xla: Any = importlib.import_module("torch_xla")
    runtime = importlib.import_module("torch_xla.runtime")
    xla._XLAC._xla_set_default_device(str(device))
    runtime._init_world_size_ordinal()
    found = runtime.global_ordinal()
    if found != rank:
        raise RuntimeError(
            f"the runtime calls this device number {found}, but it was to be rank {rank}: this host's chips are not "
            "in the order that was expected. Please report it with the output of `nbaccel env`."
        )


def current_device() -> torch.device:
    """The device of the calling thread."""
    if "torch_tpu" in sys.modules:
        return _device("tpu:0")
    found: torch.device = importlib.import_module("torch_xla").device()
    return found


def _device(name: str) -> torch.device:
    made: torch.device = importlib.import_module("torch").device(name)
    return made


def _cache_folder(process: int, processes: int) -> str:
    """Where compiled programs outlive the process: beside our other caches, each process's apart, as torch_xla's
    documentation has it."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(home, "nbaccel", "xla", f"{process}-of-{processes}")
