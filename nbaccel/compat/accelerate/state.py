"""What accelerate keeps in shared state, read where it really is: each object is a view, made anew.

There is nothing to reset. The one thing these classes cannot find by themselves is the Accelerator in use:
the newest is remembered, as long as somebody else holds it.
"""

from __future__ import annotations

import weakref
from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed as dist

from nbaccel import core
from nbaccel.compat.accelerate.names import look_up
from nbaccel.compat.accelerate.utils.dataclasses import DistributedType
from nbaccel.config import RunConfig
from nbaccel.core.comm.collectives import barrier
from nbaccel.core.data import ShardedLoader
from nbaccel.core.processes import Processes
from nbaccel.core.world import World, join, read_environment

__all__ = [
    "AcceleratorState",
    "GradientState",
    "PartialState",
    "asked",
    "is_initialized",
    "remember",
    "type_of",
]

_made: weakref.WeakValueDictionary[str, core.Accelerator] = weakref.WeakValueDictionary()


def remember(accelerator: core.Accelerator) -> None:
    """Makes it the one that `AcceleratorState()` and `GradientState()` tell about."""
    _made["newest"] = accelerator


def is_initialized() -> bool:
    """Whether there is an Accelerator."""
    return "newest" in _made


def asked(cpu: bool, timeout: timedelta | None) -> RunConfig:
    """What the process group and the device are asked to be."""
    values = {
        "device": "cpu" if cpu else None,
        "collective_timeout": None if timeout is None else timeout.total_seconds(),
    }
    return RunConfig.from_mapping({k: v for k, v in values.items() if v is not None}, place="the script")


def type_of(world: World, strategy: str | None = None) -> DistributedType:
    """How the ranks are spread, by accelerate's name for it."""
    kinds = {"fsdp": DistributedType.FSDP, "deepspeed": DistributedType.DEEPSPEED}
    if world.device.type == "xla":
        return DistributedType.XLA
    if world.size == 1:
        return DistributedType.NO
    if strategy in kinds:
        return kinds[strategy]
    kind = "GPU" if world.device.type == "cuda" else world.device.type.upper()
    return DistributedType(f"MULTI_{kind}")


@final
class PartialState(Processes):
    """Where this process is among the ranks; joins them if nothing has yet."""

    def __init__(
        self, cpu: bool = False, *, backend: str | None = None, timeout: timedelta | None = None
    ) -> None:
        self.world = join(asked(cpu, timeout))
        self.debug = False
        """Collectives are checked whatever it is."""

    @property
    def default_device(self) -> torch.device:
        return self.world.device

    @property
    def backend(self) -> str | None:
        return self.world.backend

    @property
    def distributed_type(self) -> DistributedType:
        return type_of(self.world)

    @property
    def initialized(self) -> bool:
        return True

    def set_device(self) -> None:
        """Done already."""

    def wait_for_everyone(self) -> None:
        """Waits until every rank is here."""
        barrier(self.world)

    def destroy_process_group(self, group: Any = None) -> None:
        """Takes the process group down, if there is one."""
        if dist.is_initialized():
            dist.destroy_process_group(group)

    @staticmethod
    def _reset_state() -> None:
        """Nothing is shared."""

    def __repr__(self) -> str:
        world = self.world
        return (
            f"{self.distributed_type.value}: rank {world.rank} of {world.size}, local rank {world.local_rank}, "
            f"device {world.device}, backend {world.backend}"
        )


@final
class AcceleratorState:
    """A `PartialState` and what the Accelerator in use computes in."""

    def __init__(
        self,
        mixed_precision: str | None = None,
        cpu: bool = False,
        accelerator: core.Accelerator | None = None,
    ) -> None:
        self._accelerator = accelerator if accelerator is not None else _made.get("newest")
        self._place = PartialState(cpu)
        self._asked = mixed_precision

    @property
    def mixed_precision(self) -> str:
        """In force; what was asked, before there is an Accelerator."""
        if self._accelerator is not None:
            return self._accelerator.mixed_precision
        return self._asked or read_environment().config.mixed_precision or "no"

    @property
    def distributed_type(self) -> DistributedType:
        """How the ranks are spread, by accelerate's name for it."""
        one = self._accelerator
        return self._place.distributed_type if one is None else type_of(one.world, one.strategy.name)

    @property
    def deepspeed_plugin(self) -> None:
        """None: what DeepSpeed was asked stands in `Accelerator().config.deepspeed`."""

    fsdp_plugin = deepspeed_plugin

    @property
    def is_fsdp2(self) -> bool:
        """Whether models are sharded by FSDP."""
        return self.distributed_type is DistributedType.FSDP

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_place":
            raise AttributeError(name)
        return getattr(self._place, name)

    @staticmethod
    def _reset_state(reset_partial_state: bool = False) -> None:
        """Nothing is shared."""

    def __repr__(self) -> str:
        return f"{self._place!r}, mixed precision {self.mixed_precision}"


@final
class GradientState:
    """Where the loop of the Accelerator in use is in its accumulation window."""

    def __init__(self, accelerator: core.Accelerator | None = None) -> None:
        self._loop = None
        accelerator = accelerator if accelerator is not None else _made.get("newest")
        if accelerator is not None:
            self._loop = accelerator._loop

    @property
    def num_steps(self) -> int:
        """Micro-steps per optimizer step."""
        return 1 if self._loop is None else self._loop.length

    @property
    def sync_gradients(self) -> bool:
        """Whether this micro-step ends its window."""
        return self._loop is None or self._loop.window.sync

    @property
    def adjust_scheduler(self) -> bool:
        """Always: schedulers step with the optimizer."""
        return True

    @property
    def plugin_kwargs(self) -> dict[str, int]:
        """What a GradientAccumulationPlugin would say."""
        return {"num_steps": self.num_steps}

    @property
    def dataloader_references(self) -> list[ShardedLoader | None]:
        """The loaders that are being iterated, within each other, after a None."""
        return [None, *([] if self._loop is None else self._loop.loaders)]

    @property
    def active_dataloader(self) -> ShardedLoader | None:
        """The loader whose batch is in hand."""
        return None if self._loop is None else self._loop.loader

    @property
    def in_dataloader(self) -> bool:
        """Whether a prepared loader is being iterated."""
        return self.active_dataloader is not None

    @property
    def end_of_dataloader(self) -> bool:
        """Whether the batch in hand is its loader's last."""
        loader = self.active_dataloader
        return loader is not None and loader.at_end

    @property
    def remainder(self) -> int:
        """Real samples in the last batch of all ranks, where samples are repeated to fill it; else -1."""
        loader = self.active_dataloader
        if loader is None or not (loader.at_end and loader.even_batches):
            return -1
        return loader.global_batch_samples or -1

    @staticmethod
    def _reset_state() -> None:
        """Nothing is shared."""


def __getattr__(name: str) -> Any:
    return look_up(__name__, name)
