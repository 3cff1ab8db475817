"""Models larger than memory: the functions of `nbaccel` with accelerate's arguments.

Of these, `offload_buffers`, `skip_keys`, `preload_module_classes`, `force_hooks`, `offload_state_dict`,
`full_state_dict` and `broadcast_from_rank0` say how accelerate's hooks and its loading go about it. They are taken and
change nothing: buffers stay where their module runs, inputs go to where they are needed, a layer whose weights are used
without calling it works, and every rank maps the files. What else is given goes to the function of `nbaccel`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from nbaccel import init_empty_weights, init_on_device, remove_hooks
from nbaccel.compat.accelerate.hooks import UserCpuOffloadHook
from nbaccel.core import offload
from nbaccel.core.offload.limits import accelerators
from nbaccel.core.offload.sources import for_model, open_checkpoint
from nbaccel.core.world import join
from nbaccel.errors import ConfigError

__all__ = [
    "cpu_offload",
    "cpu_offload_with_hook",
    "disk_offload",
    "dispatch_model",
    "dtype_named",
    "init_empty_weights",
    "init_on_device",
    "load_checkpoint_and_dispatch",
    "load_checkpoint_in_model",
]

M = TypeVar("M", bound=nn.Module)
Place = int | str | torch.device
_HOW = {
    *("offload_buffers", "skip_keys", "preload_module_classes", "force_hooks", "offload_state_dict"),
    *("full_state_dict", "broadcast_from_rank0"),
}
_ELSEWHERE = ("state_dict", "offload_index")


def cpu_offload(
    model: M, execution_device: Place | None = None, offload_buffers: bool = False, **options: Any
) -> M:
    """All weights in main memory; each layer's go to `execution_device`, the first accelerator, while it runs."""
    return offload.cpu_offload(model, execution_device, **_ours(options))


def disk_offload(
    model: M,
    offload_dir: str | Path | None = None,
    execution_device: Place | None = None,
    offload_buffers: bool = False,
    *,
    offload_folder: str | Path | None = None,
    **options: Any,
) -> M:
    """All weights in a file in `offload_dir`; each layer's go to `execution_device` while it runs.

    Raises:
        ConfigError: there is no folder.
    """
    folder = offload_dir if offload_folder is None else offload_folder
    if folder is None:
        raise ConfigError("disk_offload writes the weights to a folder: give offload_dir")
    return offload.disk_offload(model, folder, execution_device, **_ours(options))


def dispatch_model(
    model: M,
    device_map: str | Mapping[str, Place] = "auto",
    main_device: Place | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    offload_dir: str | Path | None = None,
    offload_index: Mapping[str, str] | None = None,
    **options: Any,
) -> M:
    """Places a model that is in memory, and returns it ready to run.

    Raises:
        ConfigError: its weights are to come from `state_dict` or `offload_index`.
    """
    kept = _ours({**options, "state_dict": state_dict, "offload_index": offload_index})
    kept = {"offload_folder": offload_dir, **kept}
    return offload.dispatch_model(model, _map(device_map), main_device=main_device, **kept)


def load_checkpoint_and_dispatch(
    model: M,
    checkpoint: str | Path,
    device_map: str | Mapping[str, Place] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    no_split_module_classes: Collection[str | type] | None = None,
    offload_folder: str | Path | None = None,
    offload_buffers: bool = False,
    dtype: str | torch.dtype | None = None,
    *,
    strict: bool = False,
    **options: Any,
) -> M:
    """Fills `model` from a checkpoint and places it; without a `device_map` it is a plain model on the CPU."""
    if device_map is None:
        load_checkpoint_in_model(model, checkpoint, None, offload_folder, dtype, strict=strict)
        return model
    return offload.load_checkpoint_and_dispatch(
        model,
        checkpoint,
        _map(device_map),
        max_memory,
        no_split_module_classes,
        offload_folder,
        dtype_named(dtype),
        strict=strict,
        **_ours(options),
    )


def _ours(options: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of the options for the function of `nbaccel`."""
    elsewhere = [name for name in _ELSEWHERE if options.get(name) is not None]
    if elsewhere:
        raise ConfigError(
            f"{elsewhere[0]} does not exist here: load_checkpoint_and_dispatch takes weights from files, and "
            "dispatch_model those that the model has"
        )
    return {name: value for name, value in options.items() if name not in _HOW and name not in _ELSEWHERE}


def _map(given: str | Mapping[str, Place]) -> Any:
    """A device map as `nbaccel` takes it; "balanced_low_0" where there is no first device to keep free of several."""
    if given != "balanced_low_0":
        return given
    if len(accelerators()) > 1:
        raise ConfigError(
            "device_map='balanced_low_0' does not exist here: write 'balanced', and give the first device less in "
            "max_memory, or kv_cache=... the memory that generation needs"
        )
    return "balanced"


def dtype_named(given: str | torch.dtype | None) -> Any:
    """ "float16" and "torch.float16" are torch.float16; anything else stays, to be refused there."""
    return getattr(torch, given.removeprefix("torch."), given) if isinstance(given, str) else given


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
    dtype: str | torch.dtype | None = None,
    *,
    strict: bool = False,
    **options: Any,
) -> None:
    """Fills a model from a checkpoint, which `load_checkpoint_and_dispatch` does in one go with `dispatch_model`.

    Args:
        device_map: where each tensor goes; what is to be on the disk is in main memory until `dispatch_model` writes
            it. None: the tensors are filled where they are, and those without memory on the CPU.

    Raises:
        CheckpointError: a file is damaged, or is of another model.
    """
    kept = {"dtype": dtype_named(dtype), **_ours(options)}
    if device_map is None and dtype is None and not any(tensor.is_meta for tensor in model.parameters()):
        stored = for_model(model.state_dict().keys(), open_checkpoint(checkpoint))
        model.load_state_dict({name: one.read() for name, one in stored.items()}, strict=strict)
        return
    places = {"": "cpu"} if device_map is None else device_map
    filled = offload.load_checkpoint_and_dispatch(
        model, checkpoint, places, offload_folder=offload_folder, strict=strict, **kept
    )
    remove_hooks(filled)
