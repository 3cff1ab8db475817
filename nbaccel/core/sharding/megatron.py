"""Parameters that megatron-core's layers have divided over ranks: put together, and cut again.

Its layers mark them: `partition_dim` is the dimension, and with a `partition_stride` of n the whole is n times the
ranks' pieces in turn. What is not marked, every rank of the group has whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from nbaccel.core.checkpoint import Entries, ModelState, OptimizerState, Saved
from nbaccel.core.checkpoint.modules import differences
from nbaccel.errors import CheckpointError

__all__ = [
    "DividedModelState",
    "DividedOptimizerState",
    "is_divided",
    "part_of",
    "whole_of",
    "whole_state_dict",
]


def is_divided(parameter: Tensor) -> bool:
    """Whether each rank of a tensor-parallel group has a part of it."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


@torch.no_grad()
def whole_of(part: Tensor, parameter: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The whole, on the CPU, of a tensor that is divided as `parameter` is. Called by the group's ranks together."""
    if not is_divided(parameter):
        return part.detach().cpu().clone()
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.detach().contiguous(), group=group)
    dim, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    pieces = [one.cpu().chunk(stride, dim) for one in parts]
    return torch.cat([pieces[rank][turn] for turn in range(stride) for rank in range(group.size())], dim)


def part_of(whole: Tensor, parameter: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of a whole tensor."""
    if not is_divided(parameter):
        return whole
    dim, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    pieces = whole.chunk(stride * group.size(), dim)
    return torch.cat(pieces[group.rank() :: group.size()], dim)


def whole_shape(parameter: Tensor, group: dist.ProcessGroup) -> torch.Size:
    """The shape of the whole."""
    shape = list(parameter.shape)
    if is_divided(parameter):
        shape[parameter.partition_dim] *= group.size()  # type: ignore[attr-defined]
    return torch.Size(shape)


def whole_state_dict(module: nn.Module, group: dist.ProcessGroup) -> dict[str, Any]:
    """The module's state dict with whole tensors. Called by the group's ranks together."""
    return {
        name: whole_of(value, value, group) if isinstance(value, Tensor) else value
        for name, value in module.state_dict(keep_vars=True).items()
        if value is not None  # the extra state that megatron-core's layers do not have
    }


@final
class DividedModelState:
    """A module of such layers."""

    def __init__(self, module: nn.Module, group: dist.ProcessGroup) -> None:
        self._module, self._group = module, group

    def entries(self) -> Entries:
        inner = ModelState(self._module).entries()
        whole = whole_state_dict(self._module, self._group)
        return replace(inner, tensors={name: whole[name] for name in inner.tensors}, plain={})

    def _tensors(self) -> dict[str, Tensor]:
        state = self._module.state_dict(keep_vars=True)
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}

    def targets(self, saved: Saved) -> dict[str, Tensor]:
        shapes = {name: whole_shape(tensor, self._group) for name, tensor in self._tensors().items()}
        found = differences(shapes, saved.shapes)
        wrong = [n for n, shape in shapes.items() if not found and saved.shapes[n] != shape]
        if wrong:
            found = f"{wrong[0]} is {tuple(saved.shapes[wrong[0]])} there and {tuple(shapes[wrong[0]])} in the model"
        if found:
            raise CheckpointError(f"this is another model's checkpoint: {found}")
        return {name: torch.empty(shape, dtype=saved.dtypes[name]) for name, shape in shapes.items()}

    @torch.no_grad()
    def finish(self, tensors: Mapping[str, Tensor], saved: Saved) -> None:
        own = self._tensors()
        for name, value in tensors.items():
            own[name].copy_(part_of(value, own[name], self._group))


@final
class DividedOptimizerState:
    """An optimizer of such a module's parameters."""

    def __init__(self, optimizer: Optimizer, module: nn.Module, group: dist.ProcessGroup) -> None:
        self._inner, self._group = OptimizerState(optimizer, [module]), group
        self._parameters = dict(module.named_parameters())

    def _parameter(self, entry: str) -> Tensor:
        """The one that "state.<name>.<key>" belongs to."""
        return self._parameters[entry.removeprefix("state.").rpartition(".")[0]]

    def entries(self) -> Entries:
        inner = self._inner.entries()
        whole = {}
        for entry, value in inner.tensors.items():
            parameter = self._parameter(entry)
            follows = value.shape == parameter.shape  # else one number, such as the step
            whole[entry] = whole_of(value, parameter, self._group) if follows else value
        return replace(inner, tensors=whole)

    def targets(self, saved: Saved) -> dict[str, Tensor]:
        wanted = self._inner.targets(saved)
        return {entry: torch.empty(saved.shapes[entry], dtype=saved.dtypes[entry]) for entry in wanted}

    def finish(self, tensors: Mapping[str, Tensor], saved: Saved) -> None:
        parts = {}
        for entry, value in tensors.items():
            parameter = self._parameter(entry)
            follows = value.shape == whole_shape(parameter, self._group)
            parts[entry] = part_of(value, parameter, self._group).contiguous() if follows else value
        self._inner.finish(parts, saved)
