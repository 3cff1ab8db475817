"""What sharded strategies do with parameters, gradients and states that are DTensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from nbaccel.core.checkpoint.divided import lay_out_as
from nbaccel.core.world import World
from nbaccel.errors import ConfigError
from nbaccel.whole import whole

__all__ = [
    "clip_sharded_norm",
    "clip_sharded_value",
    "combine_norms",
    "gather_state_dict",
    "lay_out_loaded",
    "point_optimizer",
    "present",
    "refuse_hooks",
    "refuse_undivided",
    "share_values",
]

_Divided = tuple[DeviceMesh | None, tuple[int, ...]]
"""A mesh, and those of its dimensions over which a tensor is divided."""
_UNDIVIDED = {
    "LBFGS": "looks for one step along all parameters together",
    "Adafactor": "keeps sums over whole rows and columns of each matrix",
}
"""Optimizers that are wrong, or fail, where a rank has parts of the parameters; and why."""


@torch.no_grad()
def share_values(modules: Iterable[nn.Module], world: World) -> None:
    """Rank 0's values of the modules' own parameters and buffers, moved to the device; all ranks together."""
    found: dict[int, Tensor] = {}
    for module in modules:
        own = [*module._parameters.values(), *module._buffers.values()]
        found.update((id(tensor), tensor) for tensor in own if tensor is not None)
    for tensor in found.values():
        tensor.data = tensor.data.to(world.device).contiguous()
        # in place, as bytes: no second copy of a large model's block, and every dtype travels
        dist.broadcast(tensor.data.reshape(-1).view(torch.uint8), src=0)


def point_optimizer(optimizer: Optimizer, replaced: Mapping[Tensor, Tensor]) -> None:
    """Lets `optimizer` step what its parameters were replaced with; others stay.

    Raises:
        ConfigError: it has stepped the old ones already.
    """
    moved = [p for group in optimizer.param_groups for p in group["params"] if p in replaced]
    if any(p in optimizer.state for p in moved):
        raise ConfigError(
            f"the {type(optimizer).__name__} has stepped before it was prepared, and its state belongs to parameters "
            "that are sharded now; prepare it fresh, and go on from a checkpoint with load_state"
        )
    for group in optimizer.param_groups:
        group["params"] = [replaced.get(p, p) for p in group["params"]]


def refuse_undivided(optimizer: Optimizer, strategy: str, names: Iterable[str] = _UNDIVIDED) -> None:
    """For strategies that give each rank's optimizer its parts only.

    Args:
        names: those of `_UNDIVIDED` that the strategy's parts are too little for.

    Raises:
        ConfigError: it needs whole parameters.
    """
    kinds = {kind.__name__ for kind in type(optimizer).__mro__}
    for name in names:
        if name in kinds:
            raise ConfigError(
                f"{name} cannot go with strategy {strategy!r}: it {_UNDIVIDED[name]}, of which each rank has a part "
                "here. Use strategy 'ddp', or an optimizer that treats each number by itself (AdamW, SGD, …)"
            )


def refuse_hooks(named: Iterable[tuple[str, Tensor]], strategy: str) -> None:
    """For strategies that put others in place of these parameters, on which their hooks would not be.

    Raises:
        ConfigError: one has a hook on its gradient.
    """
    for name, parameter in named:
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise ConfigError(
                f"{name} has a hook on its gradient, which would not be called: strategy {strategy!r} puts another "
                "parameter in its place. Change gradients between backward and step (acc.clip_grad_value_, or p.grad, "
                "of which each rank has a part), register_post_accumulate_grad_hook after prepare, or use strategy "
                "'ddp'"
            )


def present(parameters: Iterable[Tensor], replaced: Mapping[Tensor, Tensor]) -> Iterator[Tensor]:
    """The parameters that there are now for those that were listed before they were divided: only they have
    gradients."""
    return (replaced.get(parameter, parameter) for parameter in parameters)


@torch.no_grad()
def clip_sharded_norm(parameters: Iterable[Tensor], max_norm: float, norm_type: float) -> Tensor:
    """Clips gradients, of which each rank holds a part, to a total norm; returns the norm before, 0-d.

    The parts are measured and scaled as the plain tensors they are: operations on DTensors cost a dispatch for each.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.tensor(0.0)
    parts: dict[_Divided, list[Tensor]] = {}
    for grad in grads:
        part, divided = _part_of(grad)
        parts.setdefault(divided, []).append(part)
    norms = [_norm_over_ranks(listed, norm_type, divided) for divided, listed in parts.items()]
    total: Tensor = torch.linalg.vector_norm(
        torch.stack([norm.to(norms[0].device) for norm in norms]), norm_type
    )
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    places: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        own = grad.to_local() if isinstance(grad, DTensor) else grad
        places.setdefault(own.device, []).append(own)
    for device, listed in places.items():
        torch._foreach_mul_(listed, factor.to(device))
    return total


def _part_of(grad: Tensor) -> tuple[Tensor, _Divided]:
    """This rank's part of a gradient, summed where it was left to be, and over what it is divided."""
    if not isinstance(grad, DTensor):
        return grad, (None, ())
    grad = _summed(grad)
    dims = tuple(dim for dim, place in enumerate(grad.placements) if not place.is_replicate())
    return grad.to_local(), (grad.device_mesh, dims)


def _summed(grad: DTensor) -> DTensor:
    """The gradient, summed over the ranks where each has its own summand."""
    if not any(place.is_partial() for place in grad.placements):
        return grad
    return grad.redistribute(placements=[Replicate() if p.is_partial() else p for p in grad.placements])


@torch.no_grad()
def clip_sharded_value(parameters: Iterable[Tensor], clip_value: float) -> None:
    """Clips each number of gradients of which each rank holds a part."""
    for parameter in parameters:
        if isinstance(parameter.grad, DTensor):
            parameter.grad = _summed(parameter.grad)  # a summand may be large where the sum is not
            parameter.grad.to_local().clamp_(-clip_value, clip_value)
        elif parameter.grad is not None:
            parameter.grad.clamp_(-clip_value, clip_value)


def _norm_over_ranks(parts: Sequence[Tensor], norm_type: float, divided: _Divided) -> Tensor:
    """The norm of tensors of which all ranks together hold each number once."""
    mesh, dims = divided
    held = [part for part in parts if part.numel()]  # a rank may have no row of a small one
    norm = torch.nn.utils.get_total_norm(held, norm_type).float()
    if mesh is None or not dims:
        return norm
    return combine_norms(norm.to(mesh.device_type), norm_type, [mesh.get_group(dim) for dim in dims])


def combine_norms(norm: Tensor, norm_type: float, groups: Iterable[dist.ProcessGroup]) -> Tensor:
    """The norm of what the ranks of each group hold together, from that of each rank's part, which is overwritten."""
    if math.isinf(norm_type):
        for group in groups:
            dist.all_reduce(norm, dist.ReduceOp.MAX, group=group)
        return norm
    total = norm.pow_(norm_type)
    for group in groups:
        dist.all_reduce(total, group=group)
    return total.pow_(1 / norm_type)


@torch.no_grad()
def gather_state_dict(module: nn.Module, *, keep: bool) -> dict[str, Any]:
    """The whole state dict, on the CPU, one tensor after another; ranks that do not `keep` get an empty one.

    Called by all ranks together. Names of a tied parameter share one tensor.
    """
    names: dict[int, str] = {}
    first: dict[str, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first[name] = names.setdefault(id(parameter), name)
    state: dict[str, Any] = {}
    for name, value in module.state_dict().items():
        tied_to = first.get(name, name)
        if tied_to != name and tied_to in state:
            state[name] = state[tied_to]
            continue
        state[name] = whole(value, keep=keep) if isinstance(value, Tensor) else value
    return state if keep else {}


def lay_out_loaded(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lets a module's `load_state_dict` take whole tensors, as `gather_state_dict` gives them: each rank keeps its
    part. A pre-hook of it."""
    for name, own in (*module._parameters.items(), *module._buffers.items()):
        given = state.get(prefix + name)
        if isinstance(given, Tensor) and not isinstance(given, DTensor):
            state[prefix + name] = lay_out_as(own, given)
