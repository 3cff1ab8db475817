"""States of a user's own objects that hold DTensors, as an average of sharded weights does: whole in the checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from nbaccel.core.nested import leaves, map_tensors
from nbaccel.whole import is_dtensor

__all__ = ["gather_divided", "holds_divided", "lay_out_as"]


def holds_divided(state: Any) -> bool:
    """Whether a tensor in `state` is divided over the ranks."""
    return any(is_dtensor(leaf) for _, leaf in leaves(state))


@torch.no_grad()
def gather_divided(state: Any, *, keep: bool) -> Any:
    """`state` with whole tensors in main memory in place of DTensors, one after another. Called by all ranks together,
    of which those that do not `keep` it get empty ones."""

    def gathered(tensor: torch.Tensor) -> torch.Tensor:
        if not is_dtensor(tensor):
            return tensor
        whole = tensor.full_tensor()
        return whole.detach().cpu() if keep else torch.empty(0)

    return map_tensors(gathered, state)


def lay_out_as(present: Any, state: Any) -> Any:
    """`state` divided over the ranks wherever `present` is, each rank keeping its own part; the rest as it is."""
    if is_dtensor(present) and isinstance(state, torch.Tensor) and state.shape == present.shape:
        return _part_of(present, state)
    if isinstance(present, Mapping) and isinstance(state, Mapping):
        made: Any = copy.copy(state)
        made.update({key: lay_out_as(present[key], state[key]) for key in state if key in present})
        return made
    if isinstance(present, (list, tuple)) and type(state) in (list, tuple) and len(state) == len(present):
        return type(state)(lay_out_as(one, other) for one, other in zip(present, state, strict=True))
    return state


@torch.no_grad()
def _part_of(present: Any, whole: torch.Tensor) -> Any:
    made: Any = torch.empty_like(present, dtype=whole.dtype)
    for chunk in present.__create_chunk_list__():
        part = whole
        for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            part = part.narrow(dim, offset, size)
        made.to_local().copy_(part)
    return made
