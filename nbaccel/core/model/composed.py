"""Tensors made of others: quantised weights, which are values and scales behind the face of one tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nbaccel.core.world import World
from nbaccel.errors import ConfigError
from nbaccel.whole import is_dtensor

__all__ = ["is_composed", "parts_of", "refuse_composed", "share_composed"]


def is_composed(tensor: Tensor) -> bool:
    """Whether what holds the numbers are other tensors."""
    return not is_dtensor(tensor) and bool(is_traceable_wrapper_subclass(tensor))


def parts_of(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors a composed one is made of, with their names; writes to them go through."""
    for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]  # of every composed one
        inner: Tensor = getattr(tensor, name)
        if is_composed(inner):
            yield from ((f"{name}.{below}", part) for below, part in parts_of(inner))
        else:
            yield name, inner


def refuse_composed(module: nn.Module, strategy: str) -> None:
    """For strategies that divide tensors, or send them as they lie in memory.

    Raises:
        ConfigError: a parameter is made of other tensors.
    """
    for name, parameter in module.named_parameters():
        if is_composed(parameter):
            raise ConfigError(
                f"{name} is a {type(parameter).__name__}, which strategy {strategy!r} cannot divide; quantised weights "
                "with adapters beside them are trained under strategy 'ddp'"
            )


@torch.no_grad()
def share_composed(module: nn.Module, world: World) -> None:
    """Rank 0's values for the frozen composed tensors of `module`, which DDP is told to leave alone: it would send
    them as plain memory. Called by all ranks together.

    Raises:
        ConfigError: one of them wants a gradient, which DDP would not average.
    """
    named = [*module.named_parameters(), *module.named_buffers()]
    found = {name: tensor for name, tensor in named if is_composed(tensor)}
    if not found:
        return
    learns = [name for name, tensor in found.items() if tensor.requires_grad]
    if learns:
        raise ConfigError(
            f"{learns[0]} is a {type(found[learns[0]]).__name__} that wants a gradient, which strategy 'ddp' cannot "
            "average; freeze quantised weights (requires_grad_(False)) and train adapters beside them"
        )
    for tensor in found.values():
        for _, part in parts_of(tensor):
            sent = part.contiguous().to(world.device)
            dist.broadcast(sent.reshape(-1).view(torch.uint8), src=0)
            part.copy_(sent)
    ignored = {*getattr(module, "_ddp_params_and_buffers_to_ignore", ()), *found}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, sorted(ignored))  # type: ignore[no-untyped-call]
