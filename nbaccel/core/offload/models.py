"""What users call: a device map, and a model dispatched by one, from memory or from a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from nbaccel.core.model.renamed import as_transformers
from nbaccel.core.offload.dispatch import install
from nbaccel.core.offload.dispatched import is_dispatched
from nbaccel.core.offload.given import places_given
from nbaccel.core.offload.limits import accelerators, memory_limits, num_bytes, place_name
from nbaccel.core.offload.machine import Machine, measured
from nbaccel.core.offload.matched import in_memory, match
from nbaccel.core.offload.operations import count_operations
from nbaccel.core.offload.parts import Part, listed, parts_of
from nbaccel.core.offload.placing import Mode, plan_placement
from nbaccel.core.offload.plan import Plan, executing, plan_given
from nbaccel.core.offload.sources import by_names, for_model, open_checkpoint
from nbaccel.errors import ConfigError

__all__ = [
    "cpu_offload",
    "disk_offload",
    "dispatch_model",
    "infer_auto_device_map",
    "load_checkpoint_and_dispatch",
]

M = TypeVar("M", bound=nn.Module)
MaxMemory = Mapping[int | str, int | str] | None
DeviceMap = Mode | Mapping[str, int | str | torch.device]


def infer_auto_device_map(
    model: nn.Module,
    max_memory: MaxMemory = None,
    no_split_module_classes: Collection[str | type] | None = None,
    dtype: torch.dtype | None = None,
    special_dtypes: Mapping[str, torch.dtype] | None = None,
    *,
    mode: Mode = "auto",
    tokens: int = 1,
    batch: Any = None,
    kv_cache: int | str = 0,
    offload_folder: str | Path | None = None,
) -> dict[str, str]:
    """Where each part of `model` should lie: "cuda:0", …, "cpu" or "disk", by name of the highest module
    below which everything lies in one place.

    Args:
        max_memory: bytes, or "20GB", by place; only these places and the disk are used. None: nine tenths
            of what is free on each accelerator and in main memory.
        no_split_module_classes: classes that stay in one place, or their names; None: what the model names itself.
        dtype: what the weights will be held in, if not as they are; `special_dtypes` by name of a parameter.
        mode: "auto" and "balanced" divide a model that fits onto the accelerators evenly, and otherwise give
            the fast memory to what saves most time per byte; "sequential" fills one place after the other. "auto"
            leaves out small or slow accelerators where a pass is shorter without them.
        tokens: per forward pass, of the whole batch; with many, compute hides the copying of weights.
        batch: what the model is called with (a tensor, a tuple of arguments or a mapping of keywords): operations
            and tokens are then counted, in a pass without numbers. Worth it for convolutions, whose operations
            depend on the size of the image.
        kv_cache: memory kept free on the devices that compute, as for generation.
        offload_folder: whose disk's speed counts.

    Raises:
        ConfigError: something fits nowhere; the message says what and by how much.
    """
    _check_model(model)
    _check_types(dtype, *(special_dtypes or {}).values())
    unknown = (special_dtypes or {}).keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    if unknown:
        raise ConfigError(f"special_dtypes names {listed(sorted(unknown))}, which this model does not have")
    folder = _folder(offload_folder)
    plan = _planned(
        model,
        mode,
        max_memory,
        no_split_module_classes,
        dtype,
        tokens,
        batch,
        kv_cache,
        folder,
        special_dtypes,
    )
    return plan.device_map


def load_checkpoint_and_dispatch(
    model: M,
    checkpoint: str | Path,
    device_map: DeviceMap = "auto",
    max_memory: MaxMemory = None,
    no_split_module_classes: Collection[str | type] | None = None,
    offload_folder: str | Path | None = None,
    dtype: torch.dtype | None = None,
    *,
    strict: bool = False,
    tokens: int = 1,
    batch: Any = None,
    kv_cache: int | str = 0,
) -> M:
    """Fills `model`, mostly made under `init_empty_weights`, from a checkpoint, tensor by tensor, each where the
    device map puts it, and returns it ready to run.

    Args:
        checkpoint: a safetensors or torch file, an index, or a folder with them or with a checkpoint of
            torch.distributed. What is on the "disk" stays in a safetensors or torch file: nothing is written. A
            Hugging Face model's is read as its `from_pretrained` reads it: names that transformers renames, the
            base model's prefix that is there or not, tensors made of others; a line says what was done.
        device_map: how to place it (`infer_auto_device_map`), or the places by name.
        offload_folder: for what is to be on the disk and is in no file that can be mapped.
        dtype: of all floating-point tensors; None: the model's own.
        strict: tensors that only the checkpoint has are an error instead of a warning.

    Raises:
        CheckpointError: a file is damaged, or tensors are missing or of another shape.
        ConfigError: the device map does not fit the model, or the model its limits.
    """
    _check_model(model)
    _not_twice(model)
    _check_types(dtype)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    opened = open_checkpoint(checkpoint)
    renamed = as_transformers(model, model.state_dict().keys(), opened)
    if said := str(renamed):
        print(f"{checkpoint} is {said}", flush=True)
    stored = for_model(names | {name for name, _ in model.named_buffers()}, by_names(renamed, opened))
    values = match(model, stored, str(checkpoint), strict=strict)
    folder = _folder(offload_folder)
    source = Path(checkpoint).expanduser()
    plan = _planned(
        model,
        device_map,
        max_memory,
        no_split_module_classes,
        dtype,
        tokens,
        batch,
        kv_cache,
        folder or source.parent,
    )
    return install(model, plan, values, dtype=dtype, folder=folder)


def dispatch_model(
    model: M,
    device_map: DeviceMap = "auto",
    *,
    max_memory: MaxMemory = None,
    no_split_module_classes: Collection[str | type] | None = None,
    main_device: int | str | torch.device | None = None,
    offload_folder: str | Path | None = None,
    tokens: int = 1,
    batch: Any = None,
    kv_cache: int | str = 0,
) -> M:
    """Places a model that is in memory, and returns it ready to run; `remove_hooks` undoes it.

    Args:
        main_device: where what lies on the CPU or the disk runs; None: the first accelerator of the map,
            else the CPU.
        offload_folder: where weights for the "disk" are written, as one safetensors file.

    Raises:
        CheckpointError: the offload folder cannot be written, or its disk is full.
        ConfigError: the device map does not fit the model, or the model its limits.
    """
    _check_model(model)
    _not_twice(model)
    values = in_memory(model)
    folder = _folder(offload_folder)
    main = None if main_device is None else place_name(main_device)
    if main == "disk":
        raise ConfigError("nothing runs on the disk: name the accelerator, or 'cpu'")
    plan = _planned(
        model,
        device_map,
        max_memory,
        no_split_module_classes,
        None,
        tokens,
        batch,
        kv_cache,
        folder,
        main=main,
    )
    return install(model, plan, values, dtype=None, folder=folder)


def cpu_offload(model: M, execution_device: int | str | torch.device | None = None) -> M:
    """All weights in main memory; each layer's go to `execution_device`, the first accelerator, while it runs."""
    return dispatch_model(model, {"": "cpu"}, main_device=_execution(execution_device))


def disk_offload(
    model: M, offload_folder: str | Path, execution_device: int | str | torch.device | None = None
) -> M:
    """All weights in a file in `offload_folder`; each layer's go to `execution_device` while it runs."""
    return dispatch_model(
        model, {"": "disk"}, main_device=_execution(execution_device), offload_folder=offload_folder
    )


def _execution(given: int | str | torch.device | None) -> int | str | torch.device:
    return next(iter(accelerators()), "cpu") if given is None else given


def _folder(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given).expanduser()


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{model!r:.80} is no model: give a torch.nn.Module")
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ConfigError(f"{listed(lazy)} have no shape yet: call the model once before it is placed")


def _check_types(*dtypes: torch.dtype | None) -> None:
    for dtype in dtypes:
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ConfigError(f"{dtype!r} is no type for weights; write one like torch.bfloat16")


def _not_twice(model: nn.Module) -> None:
    if is_dispatched(model):
        raise ConfigError("this model, or a part of it, is dispatched already: remove_hooks(model) first")


def _planned(
    model: nn.Module,
    device_map: DeviceMap,
    max_memory: MaxMemory,
    no_split: Collection[str | type] | None,
    dtype: torch.dtype | None,
    tokens: int,
    batch: Any,
    kv_cache: int | str,
    folder: Path | None,
    special_dtypes: Mapping[str, torch.dtype] | None = None,
    main: str | None = None,
) -> Plan:
    if isinstance(device_map, str):
        parts = parts_of(model, no_split=no_split, dtype=dtype, special_dtypes=special_dtypes)
        tokens = tokens if batch is None else count_operations(parts, model, batch)
        return _auto(parts, max_memory, device_map, tokens, kv_cache, folder, main)
    if not isinstance(device_map, Mapping):
        raise ConfigError(f"device_map is {device_map!r}; write 'auto', or the place of each module by name")
    if max_memory is not None:
        raise ConfigError(
            "max_memory limits what is placed by itself; the device map given places everything"
        )
    wrong = [name for name in device_map if not isinstance(name, str)]
    if wrong:
        raise ConfigError(
            f"the device map names {wrong[0]!r}: write the place of each module by its name, {{'': 'cpu'}} for all"
        )
    named = {name: place_name(place) for name, place in device_map.items()}
    parts = parts_of(model, no_split=no_split, dtype=dtype, divided=named)
    places = places_given(named, parts, model)
    tokens = tokens if batch is None else count_operations(parts, model, batch)
    devices = executing(named.values())
    main = main or devices[0]
    machine = _machine(list({main: None, **dict.fromkeys(devices)}), folder)
    return plan_given(parts, places, machine, main=main, tokens=tokens)


def _auto(
    parts: list[Part],
    max_memory: MaxMemory,
    mode: Mode,
    tokens: int,
    kv_cache: int | str,
    folder: Path | None,
    main: str | None,
) -> Plan:
    if mode not in get_args(Mode):
        named = ", ".join(map(repr, get_args(Mode)))
        raise ConfigError(
            f"{mode!r} is no way to place a model: write {named}, or a device map {{'': {mode!r}}}"
        )
    if type(tokens) is not int or tokens < 0:
        raise ConfigError(f"tokens is {tokens!r}; write how many a forward pass has")
    limits = memory_limits(max_memory)
    if main in limits and main != "cpu":
        limits = {main: limits[main], **limits}
    machine = _machine(executing(limits), folder)
    reserved = num_bytes(kv_cache, of="kv_cache")
    return plan_placement(parts, limits, machine, mode=mode, tokens=tokens, kv_cache=reserved, main=main)


def _machine(devices: list[str], folder: Path | None) -> Machine:
    return measured([device for device in devices if device != "cpu"], folder)
