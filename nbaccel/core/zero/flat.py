"""The flat float32 tensors that ZeRO steps: which parameters lie in them, and how whole values get there.

DeepSpeed lays parameters one after the other and keeps, of each rank's part, one tensor per parameter group in stages 1
and 2, and one per sub-group in stage 3. The user's optimizer has these for parameters: its moments are as long, and of
what is one number, as Adam's count of steps, there is one for all of them. The names used here are DeepSpeed's own and
private; its version is pinned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nbaccel.core.zero.swapping import state_in_memory

__all__ = ["Flat", "flats", "part_of", "whole_shape", "write_part"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Flat:
    """One of them."""

    tensor: Tensor
    """This rank's part. Empty while it is on the disk."""
    parameters: Sequence[nn.Parameter]
    """Those that lie in it; on this rank perhaps only pieces of some. Parameters that do not learn lie in none."""


def flats(zero: Any) -> list[Flat]:
    """All of them, in DeepSpeed's order."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3
        pairs = zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
    else:
        pairs = zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True)
    return [Flat(tensor=tensor, parameters=parameters) for tensor, parameters in pairs]


def whole_shape(value: Tensor) -> torch.Size:
    """The shape of a tensor that may be a parameter in shards."""
    shape: torch.Size = getattr(value, "ds_shape", value.shape)
    return shape


def part_of(value: Tensor, count: int) -> Tensor:
    """This rank's `count` numbers of a whole value, as ZeRO-3 divides it: the last part is filled with zeros."""
    start = count * dist.get_rank()
    part = value.flatten()[start : start + count]
    return nn.functional.pad(part, (0, count - part.numel())) if part.numel() < count else part


@torch.no_grad()
def write_part(parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
    """A whole value, or this rank's part of it in stage 3, into a float32 copy (None) or optimizer state `key`."""
    held: Any = parameter
    if hasattr(held, "ds_tensor"):
        if held.requires_grad:
            count = held.ds_tensor.ds_numel
            part = value.float() if value.numel() == count else part_of(value.float(), count)
            _write_sharded(held, part, key)
        return
    mapping = getattr(held, "_hp_mapping", None)
    if mapping is not None:
        address = mapping.lp_fragment_address
        mapping.get_hp_fragment(key).copy_(value.flatten().narrow(0, address.start, address.numel))


def _write_sharded(parameter: Any, part: Tensor, key: str | None) -> None:
    # DeepSpeed's own setter asks for the size of a parameter that is on the disk, and takes that of its stand-in.
    zero = parameter._z3_optimizer
    sub_group, start, count = zero.grad_position[zero.get_param_id(parameter)]
    with state_in_memory(zero, sub_group):
        flat = zero.fp32_partitioned_groups_flat[sub_group]
        whole = flat if key is None else zero.optimizer.state[flat][key]
        whole.narrow(0, start, count).copy_(part)
