"""Models larger than memory; most of it is the same in `nbaccel`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from nbaccel import (
    cpu_offload,
    disk_offload,
    dispatch_model,
    init_empty_weights,
    init_on_device,
    load_checkpoint_and_dispatch,
    remove_hooks,
)
from nbaccel.compat.accelerate.hooks import UserCpuOffloadHook
from nbaccel.core.offload.sources import for_model, open_checkpoint
from nbaccel.core.world import join

__all__ = [
    "cpu_offload",
    "cpu_offload_with_hook",
    "disk_offload",
    "dispatch_model",
    "init_empty_weights",
    "init_on_device",
    "load_checkpoint_and_dispatch",
    "load_checkpoint_in_model",
]

M = TypeVar("M", bound=nn.Module)


def cpu_offload_with_hook(
    model: M,
    execution_device: int | str | torch.device | None = None,
    prev_module_hook: UserCpuOffloadHook | None = None,
) -> tuple[M, UserCpuOffloadHook]:
    """A model that is on the CPU until it is called and on the device until its hook's `offload`, with that hook.

    Args:
        execution_device: None: that of this rank.
        prev_module_hook: that of the model before, which goes to the CPU when this one is called.
    """
    device = join().device if execution_device is None else torch.device(execution_device)
    return model, UserCpuOffloadHook(model, device, prev_module_hook)


def load_checkpoint_in_model(
    model: nn.Module,
    checkpoint: str | Path,
    device_map: Mapping[str, int | str | torch.device] | None = None,
    offload_folder: str | Path | None = None,
    dtype: torch.dtype | None = None,
    *,
    strict: bool = False,
) -> None:
    """Fills a model from a checkpoint, which `load_checkpoint_and_dispatch` does in one go with `dispatch_model`.

    Args:
        device_map: where each tensor goes; what is to be on the disk is in main memory until `dispatch_model` writes
            it. None: the tensors are filled where they are, and those without memory on the CPU.

    Raises:
        CheckpointError: a file is damaged, or is of another model.
    """
    if device_map is None and dtype is None and not any(tensor.is_meta for tensor in model.parameters()):
        stored = for_model(model.state_dict().keys(), open_checkpoint(checkpoint))
        model.load_state_dict({name: one.read() for name, one in stored.items()}, strict=strict)
        return
    places = {"": "cpu"} if device_map is None else device_map
    filled = load_checkpoint_and_dispatch(
        model, checkpoint, places, offload_folder=offload_folder, dtype=dtype, strict=strict
    )
    remove_hooks(filled)
