"""DeepSpeed itself, imported so that it neither talks, nor compiles, nor takes another device than was asked."""

from __future__ import annotations

import inspect
import logging
import os
from typing import Any

import torch.distributed as dist

from nbaccel.core.world import World
from nbaccel.errors import ConfigError

__all__ = ["end_engine", "import_deepspeed"]


def import_deepspeed(world: World, wanted_by: str) -> Any:
    """The module.

    Args:
        wanted_by: what needs it, for the message.

    Raises:
        ConfigError: it is not installed.
    """
    if world.device.type == "cpu":
        # Else DeepSpeed takes a GPU where there is one, whatever was asked.
        os.environ["DS_ACCELERATOR"] = "cpu"
        # As its own launcher does. Else ZeRO-3 starts numactl for each parameter in each backward, to count devices.
        os.environ.setdefault("LOCAL_SIZE", str(world.local_size))
    try:
        import deepspeed
        from deepspeed.comm.torch import TorchBackend
    except ImportError as error:
        raise ConfigError(f"{wanted_by} needs pip install 'nbaccel[deepspeed]' ({error})") from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if world.device.type == "cpu":
        # Its collectives through shared memory are compiled at first use, for half a minute; gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # torch 2.13 renamed these, and the older names warn at every call.
    for asks, newer in (
        ("get_all_gather_function", "all_gather_single"),
        ("get_reduce_scatter_function", "reduce_scatter_single"),
    ):
        if (function := getattr(dist, newer, None)) is not None:
            setattr(TorchBackend, asks, staticmethod(lambda function=function: function))
    return deepspeed


def end_engine(engine: Any) -> None:
    """Takes its hooks off the parameters, and the model out of what DeepSpeed keeps until the process ends."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    engine.destroy()
    FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module is not engine.module]
    # a cache of all engines together, behind a wrapper that has no name for it; another one's is filled anew
    cached = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(cached).nonlocals["func"].cache_clear()
