"""The TPU runtime in a rank's process: told its place before it opens a chip.

torch_xla: what `torch_xla.launch` does in each process it makes (torch_xla 2.9 `_internal/pjrt.py`), for its
processes cannot be ours: they are made by an executor, give nothing back and end with it. In SPMD mode one process
has all devices and sees one. TorchTPU reads its place from the variables the launch has set (`engines.tpu`) and
torchrun's; a rank's chip is device 0 to it.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from nbaccel.config import RunConfig
from nbaccel.rank.spec import RunSpec

if TYPE_CHECKING:
    import torch

__all__ = ["current_device", "set_up", "use"]


def set_up(spec: RunSpec, process: int) -> list[torch.device]:
    """Open this process's devices; one for each of its ranks.

    Args:
        process: the number of this process on its host.

    Raises:
        RuntimeError: the runtime has another number of devices than were planned, here or altogether.
    """
    processes = spec.num_processes // spec.replicas
    if spec.runtime == "torch_tpu":
        importlib.import_module("torch_tpu")
        return [_device("tpu:0")]
    if os.environ.get("PJRT_DEVICE", "").upper() == "TPU":  # the CPU's programs cannot be read back
        os.environ.setdefault("XLA_PERSISTENT_CACHE_PATH", _cache_folder(process, processes))
    pjrt = importlib.import_module("torch_xla._internal.pjrt")
    if RunConfig.from_json(spec.config).xla_spmd:
        return [current_device()]
    if spec.num_processes == 1:
        pjrt.initialize_singleprocess()
    else:
        pjrt.initialize_multiprocess(process, processes)
    _refuse_process_groups()
    model = importlib.import_module("torch_xla.core.xla_model")
    devices = list(model.get_xla_supported_devices())
    if len(devices) != spec.replicas:
        raise RuntimeError(
            f"process {process} was to have {spec.replicas} XLA devices, but the runtime gives it {len(devices)} "
            f"({', '.join(devices)}). Variables of an earlier start may still be set: restart the kernel."
        )
    ranks = spec.num_processes if spec.host is None else spec.host.world_size
    computing = importlib.import_module("torch_xla.runtime").global_device_count()
    if computing != ranks:
        raise RuntimeError(
            f"the launch has {ranks} ranks, but the runtime of process {process} computes on {computing} devices "
            "together. Gradients are averaged over a runtime's own devices, so they must be the same: use a slice of "
            "one host (v5litepod-8, v4-8, v3-8 …) and launch from there."
        )
    return [_device(name) for name in devices]


# The operations of `torch.distributed` that take tensors. Its barriers take none.
_COLLECTIVES = (
    "_allgather_base_",
    "_reduce_scatter_base_",
    "allgather_",
    "allgather_coalesced_",
    "allgather_into_tensor_coalesced_",
    "allreduce_",
    "allreduce_coalesced_",
    "alltoall_",
    "alltoall_base_",
    "broadcast_",
    "gather_",
    "recv_",
    "recv_any_source_",
    "reduce_",
    "reduce_scatter_",
    "reduce_scatter_tensor_coalesced_",
    "scatter_",
    "send",
)
_kept: list[Any] = []
"""What torch would take back with its last reference."""


def _refuse_process_groups() -> None:
    """Let gloo refuse XLA tensors: as they are, torch_xla gives it copies of them, and what it computes is lost.
    torch_xla's own process group ("xla") does not come by here."""
    library = importlib.import_module("torch.library").Library("c10d", "IMPL", "XLA")
    for name in _COLLECTIVES:
        library.impl(name, functools.partial(_refuse, name.strip("_")))
    _kept.append(library)


def _refuse(operation: str, *_: Any) -> None:
    raise RuntimeError(
        f"torch.distributed ({operation}) got a tensor on an XLA device, which its gloo process group cannot move. Use "
        "gather, reduce or broadcast of the Accelerator, or give it tensor.cpu()."
    )


def use(device: torch.device) -> None:
    """Let the calling thread compute on this device.

    The runtime's number of it (`torch_xla.runtime.global_ordinal`) may be another than the rank: torch_xla promises no
    order, and what ranks do together on chips is a sum over all of them.
    """
    if device.type != "xla":
        return  # TorchTPU's chip is bound by the variables
    xla: Any = importlib.import_module("torch_xla")
    xla._XLAC._xla_set_default_device(str(device))
    importlib.import_module("torch_xla.runtime")._init_world_size_ordinal()


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
