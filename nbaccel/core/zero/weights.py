"""The model inside a ZeRO engine as whole tensors under the user's names, so that it moves to and from every strategy.

Whole tensors are on the CPU of every rank while a checkpoint is written or read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from nbaccel.core.checkpoint import Entries, Saved
from nbaccel.core.checkpoint.modules import differences
from nbaccel.core.load_model import find_weights, tied_names
from nbaccel.core.zero.changes import Changes
from nbaccel.core.zero.flat import part_of, whole_shape, write_part
from nbaccel.core.zero.swapping import is_on_disk, rewrite
from nbaccel.errors import CheckpointError
from nbaccel.whole import whole

__all__ = ["ZeroModelState", "load_weights", "whole_state_dict"]


def whole_state_dict(module: nn.Module, *, keep: bool = True) -> dict[str, Any]:
    """The module's state dict with whole tensors, in float32 where there is such a copy, tied ones the same object.

    Called by all ranks together. Ranks that do not `keep` it get an empty one.
    """
    full: dict[int, Tensor | None] = {}
    found: dict[str, Any] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, nn.Parameter):
            if id(value) not in full:
                full[id(value)] = whole(value, keep=keep)
            found[name] = full[id(value)]
        else:
            found[name] = value.detach().clone() if isinstance(value, Tensor) else value
    return found if keep else {}


@torch.no_grad()
def load_weights(module: nn.Module, folder: str | Path, *, strict: bool) -> str:
    """Fills the engine's module from safetensors files, one tensor after another. See `load_model`."""
    state = module.state_dict(keep_vars=True)
    shapes = {name: whole_shape(value) for name, value in state.items() if isinstance(value, Tensor)}
    found = find_weights(shapes, tied_names(module), folder, model=module, strict=strict)
    for name in found.names:
        value = torch.empty(shapes[name], dtype=found.dtype(name))
        found.read({name: value})
        _write(state[name], value)
    return found.said


@final
class ZeroModelState:
    """A module whose parameters a ZeRO optimizer holds."""

    def __init__(self, module: nn.Module, changes: Changes) -> None:
        self._module, self._changes = module, changes

    def entries(self) -> Entries:
        self._changes.take_over()
        state = whole_state_dict(self._module)
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        named = {name for name, _ in self._module.named_parameters(remove_duplicate=False)}
        return Entries(
            tensors=tensors,
            plain={name: value for name, value in state.items() if name not in tensors},
            of_rank_zero=tensors.keys() - named,
        )

    def targets(self, saved: Saved) -> dict[str, Tensor]:
        state = self._module.state_dict(keep_vars=True)
        found = differences(state, [*saved.shapes, *saved.plain])
        if found:
            raise CheckpointError(f"this is another model's checkpoint: {found}")
        shapes = {name: whole_shape(value) for name, value in state.items() if isinstance(value, Tensor)}
        wrong = [name for name, shape in shapes.items() if saved.shapes.get(name) != shape]
        if wrong:
            raise CheckpointError(
                f"this is another model's checkpoint: {wrong[0]} is {tuple(saved.shapes[wrong[0]])} there and "
                f"{tuple(shapes[wrong[0]])} in the model"
            )
        return {name: torch.empty(shape, dtype=saved.dtypes[name]) for name, shape in shapes.items()}

    @torch.no_grad()
    def finish(self, tensors: Mapping[str, Tensor], saved: Saved) -> None:
        state = self._module.state_dict(keep_vars=True)
        for name, value in tensors.items():
            _write(state[name], value)
        self._changes.note()


def _write(current: Tensor, value: Tensor) -> None:
    """A whole value into a parameter, its float32 copy, and this rank's part of either; or into a buffer."""
    if not isinstance(current, nn.Parameter):
        current.copy_(value)
        return
    held: Any = current
    if hasattr(held, "ds_tensor"):
        part = part_of(value, held.ds_tensor.ds_numel)
        if is_on_disk(held):
            rewrite(held, part)
        else:
            held.ds_tensor.copy_(part.to(held.ds_tensor))
        if held.numel() == held.ds_numel:  # small ones stay whole
            held.copy_(value.to(held))
    else:
        held.copy_(value.to(held))
    if held.requires_grad:
        write_part(held, value, None)
