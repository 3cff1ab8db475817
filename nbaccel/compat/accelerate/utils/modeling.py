"""Tensors of models one by one, and the memory there is for them; `nbaccel` places whole models."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nbaccel
from nbaccel import find_tied_parameters, retie_parameters
from nbaccel.compat.accelerate.big_modeling import dtype_named, load_checkpoint_in_model
from nbaccel.compat.accelerate.names import look_up
from nbaccel.core.offload.limits import memory_limits
from nbaccel.core.offload.sources import open_checkpoint
from nbaccel.core.save_model import byte_count
from nbaccel.errors import ConfigError

__all__ = [
    "convert_file_size_to_int",
    "find_tied_parameters",
    "get_balanced_memory",
    "get_max_memory",
    "infer_auto_device_map",
    "load_checkpoint_in_model",
    "load_state_dict",
    "named_module_tensors",
    "retie_parameters",
    "set_module_tensor_to_device",
]

MaxMemory = Mapping[int | str, int | str] | None
convert_file_size_to_int = byte_count


def get_max_memory(max_memory: MaxMemory = None) -> dict[int | str, int]:
    """Bytes by place, accelerators by number: what is given, else nine tenths of what is free."""
    return {_numbered(place): size for place, size in memory_limits(max_memory).items()}


def _numbered(place: str) -> int | str:
    """accelerate's name of a place: 0 for "cuda:0"."""
    return int(place[5:]) if place.startswith("cuda:") else place


def infer_auto_device_map(
    model: nn.Module,
    max_memory: MaxMemory = None,
    no_split_module_classes: Collection[str | type] | None = None,
    dtype: str | torch.dtype | None = None,
    special_dtypes: Mapping[str, str | torch.dtype] | None = None,
    verbose: bool = False,
    clean_result: bool = True,
    offload_buffers: bool = False,
    fallback_allocation: bool = False,
    **options: Any,
) -> dict[str, int | str]:
    """Where each part of the model should lie, accelerators by number; `options` are those of `nbaccel`'s function.

    The last four of accelerate's arguments say how it goes about it. They are taken and change nothing: the map is
    as short as can be, and every part that fits somewhere gets a place.
    """
    special = {name: dtype_named(one) for name, one in (special_dtypes or {}).items()}
    found = nbaccel.infer_auto_device_map(
        model, max_memory, no_split_module_classes, dtype_named(dtype), special, **options
    )
    return {name: _numbered(place) for name, place in found.items()}


def get_balanced_memory(
    model: nn.Module,
    max_memory: MaxMemory = None,
    no_split_module_classes: Collection[str | type] | None = None,
    dtype: Any = None,
    special_dtypes: Any = None,
    low_zero: bool = False,
) -> dict[int | str, int]:
    """`get_max_memory(max_memory)`: within these limits `infer_auto_device_map` divides evenly by itself.

    Raises:
        ConfigError: the first device is to be kept free.
    """
    if low_zero:
        raise ConfigError(
            "get_balanced_memory(low_zero=True) does not exist here: give the first device less in max_memory, or "
            "infer_auto_device_map(kv_cache=...) the memory that generation needs"
        )
    return get_max_memory(max_memory)


def load_state_dict(
    checkpoint_file: str | Path, device_map: Mapping[str, int | str | torch.device] | None = None
) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, each where `device_map` puts it or a module above it; else on the CPU."""
    places = {**(device_map or {})}
    return {
        name: stored.read().to(_place(name, places))
        for name, stored in open_checkpoint(checkpoint_file).items()
        if _place(name, places) != "disk"
    }


def _place(name: str, places: Mapping[str, int | str | torch.device]) -> int | str | torch.device:
    while name and name not in places:
        name = name.rpartition(".")[0]
    return places.get(name, "cpu")


def named_module_tensors(
    module: nn.Module,
    include_buffers: bool = True,
    recurse: bool = False,
    remove_non_persistent: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """A module's parameters and buffers, with `recurse` those of the modules below too."""
    yield from module.named_parameters(recurse=recurse)
    if include_buffers:
        for name, buffer in module.named_buffers(recurse=recurse):
            owner, _, own = name.rpartition(".")
            if not (remove_non_persistent and own in module.get_submodule(owner)._non_persistent_buffers_set):
                yield name, buffer


def set_module_tensor_to_device(
    module: nn.Module,
    tensor_name: str,
    device: int | str | torch.device,
    value: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    non_blocking: bool = False,
) -> None:
    """Puts a parameter or buffer onto a device, with the value given, in its own dtype unless another is asked.

    Raises:
        ConfigError: it has no value, is not there, or is of another shape.
    """
    owner_name, _, attribute = tensor_name.rpartition(".")
    owner = module.get_submodule(owner_name)
    old = {**owner._parameters, **owner._buffers}.get(attribute)
    if old is None:
        raise ConfigError(f"{type(module).__name__} has no parameter or buffer {tensor_name!r}")
    if value is None and old.is_meta and torch.device(device).type != "meta":
        raise ConfigError(f"{tensor_name} has no value (it is on the meta device): give one")
    if value is not None and value.shape != old.shape:
        raise ConfigError(f"{tensor_name} is {tuple(old.shape)}, and its value is {tuple(value.shape)}")
    new = (old if value is None else value).detach().to(device, dtype or old.dtype, non_blocking=non_blocking)
    if attribute in owner._buffers:
        owner._buffers[attribute] = new
    else:
        owner._parameters[attribute] = nn.Parameter(new, requires_grad=old.requires_grad)


def __getattr__(name: str) -> Any:
    return look_up(__name__, name)
