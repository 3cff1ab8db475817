"""Putting a model's tensors where a plan wants them, and the hooks onto its modules."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from nbaccel.core.offload.blocks import Absent, Block, Slot, Weight
from nbaccel.core.offload.direct import direct_reader
from nbaccel.core.offload.dispatched import Dispatch, enter_class, real_state
from nbaccel.core.offload.hooks import Readahead, Streamer, Unit, answer_on, compute_on, return_to_caller
from nbaccel.core.offload.limits import free_memory
from nbaccel.core.offload.parts import listed
from nbaccel.core.offload.plan import HOST, Plan, executing
from nbaccel.core.offload.scratch import write_scratch
from nbaccel.core.offload.weights import Loaded, Stored
from nbaccel.errors import CheckpointError, ConfigError

__all__ = ["Matched", "in_memory", "install", "match"]

M = TypeVar("M", bound=nn.Module)
_COPIED = 64 << 10
"""Bytes up to which a mapped tensor that is not aligned is copied: it costs nothing and computes as usual."""
_READ_AHEAD = 256 << 10
"""Bytes from which it is worth asking whether a mapped tensor is in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """A model's tensors, each with where its values are. None: keeps the value it has."""

    parameters: Mapping[int, Stored]
    """By id of the parameter."""
    buffers: Mapping[str, Stored]


def in_memory(model: nn.Module) -> Matched:
    """A model's own values.

    Raises:
        ConfigError: it has parameters without memory.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    empty = [name for name, tensor in [*named, *model.named_buffers()] if tensor.is_meta]
    if empty:
        raise ConfigError(
            f"{listed(empty)} have no values (they are on the meta device): use load_checkpoint_and_dispatch"
        )
    return Matched(parameters={id(p): Loaded(p, on_disk=False) for _, p in named}, buffers={})


def match(model: nn.Module, stored: Mapping[str, Stored], where: str, *, strict: bool) -> Matched:
    """A checkpoint's tensors by the model's names; a tied parameter may have any of its names there.

    Raises:
        CheckpointError: something is missing, of another shape, or with `strict` left over.
    """
    names: dict[int, list[str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in tensors.items():
        names.setdefault(id(parameter), []).append(name)
        shapes[name] = tuple(parameter.shape)
    buffers = dict(model.named_buffers(remove_duplicate=False))
    kept = {name for name in buffers if not _persistent(model, name)}
    shapes |= {name: tuple(buffer.shape) for name, buffer in buffers.items() if name not in kept}
    found = {key: next((n for n in group if n in stored), None) for key, group in names.items()}
    missing = [names[key][0] for key, name in found.items() if name is None]
    missing += [n for n, b in buffers.items() if b.is_meta and (n in kept or n not in stored)]
    unexpected = [name for name in stored if name not in shapes and name not in kept]
    wrong = [
        f"{name} is {stored[name].shape} there and {shape} in the model"
        for name, shape in shapes.items()
        if name in stored and stored[name].shape != shape
    ]
    problems = [f"missing there: {listed(missing)}"] if missing else []
    problems += [f"of another shape: {listed(wrong, 3)}"] if wrong else []
    if unexpected and (strict or problems):
        problems.append(f"not in the model: {listed(unexpected)}")
    if problems and (missing or wrong or strict):
        raise CheckpointError(f"{where} is not of this {type(model).__name__}: {'; '.join(problems)}")
    if unexpected:
        warnings.warn(
            f"{where} has tensors the model does not have: {listed(unexpected)}", UserWarning, stacklevel=3
        )
    return Matched(
        parameters={key: stored[name] for key, name in found.items() if name is not None},
        buffers={name: stored[name] for name in buffers if name in stored and name not in kept},
    )


def _persistent(model: nn.Module, name: str) -> bool:
    owner, _, attribute = name.rpartition(".")
    return attribute not in model.get_submodule(owner)._non_persistent_buffers_set


def install(
    model: M,
    plan: Plan,
    values: Matched,
    *,
    dtype: torch.dtype | None,
    folder: Path | None,
    main_device: torch.device | None = None,
) -> M:
    """Does what the plan says. The model itself is returned, dispatched."""
    device = main_device or torch.device(executing(plan.places)[0])
    weights = _weights(plan, values, dtype)
    _write_what_is_in_no_file(weights, plan, type(model).__name__, folder)
    installing = _Installing(plan, device)
    for owner in sorted(weights, key=lambda found: found.weight.stored.position()):
        installing.place(owner)
    installing.place_buffers(values.buffers, dtype)
    streamer = installing.streamer()
    readahead = installing.readahead()
    handles = installing.hooks(model, streamer, readahead)
    blocks = installing.blocks
    handles += real_state(blocks)
    workers = [worker for worker in (streamer, readahead) if worker is not None]
    enter_class(model, Dispatch(plan=plan, device=device, blocks=blocks, handles=handles, workers=workers))
    return model


@dataclass(slots=True, eq=False)
class _Owned:
    """A weight, and the parts that use it."""

    weight: Weight
    parts: list[int]


def _weights(plan: Plan, values: Matched, dtype: torch.dtype | None) -> list[_Owned]:
    """Every parameter once, with all its names."""
    slots: dict[int, dict[str, Slot]] = {}
    users: dict[int, list[int]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for index, part in enumerate(plan.parts):
        for owner, attribute, name, parameter in part.parameters:
            parameters[id(parameter)] = parameter
            slots.setdefault(id(parameter), {})[name] = Slot(owner, attribute, name)
            if users.setdefault(id(parameter), []) != [index]:
                users[id(parameter)].append(index)
    made = []
    for key, parameter in parameters.items():
        wanted = dtype if dtype is not None and parameter.dtype.is_floating_point else parameter.dtype
        weight = Weight(values.parameters[key], wanted, tuple(slots[key].values()), parameter.requires_grad)
        made.append(_Owned(weight, users[key]))
    return made


def _write_what_is_in_no_file(weights: Sequence[_Owned], plan: Plan, model: str, folder: Path | None) -> None:
    """Weights for the disk that are in memory; and, where there is a folder for it, in no file to be mapped."""
    to_write = {}
    for owned in weights:
        stored = owned.weight.stored
        on_disk = plan.places[owned.parts[0]] == "disk"
        if on_disk and (not stored.on_disk or (folder is not None and not stored.mappable)):
            to_write[owned.weight.slots[0].name] = owned.weight
    if not to_write:
        return
    if folder is None:
        raise ConfigError(
            f"{listed(list(to_write))} are to be on the disk and are in no file yet: give an offload_folder"
        )
    written = write_scratch({name: (w.stored, w.dtype) for name, w in to_write.items()}, folder, model)
    for name, weight in to_write.items():
        weight.stored = written[name]


class _Installing:
    """A dispatch under way."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._plan, self._device = plan, device
        self._streamed: dict[int, list[Weight]] = {}
        self._shared: dict[Weight, list[int]] = {}
        self._mapped: dict[int, list[torch.Tensor]] = {}
        self._units: list[Unit] = []
        self._mapped_units: list[Unit] = []
        self.blocks: list[Block] = []

    def _runs_on(self, index: int) -> torch.device:
        """The device a part computes on: tables of embeddings on the host where they lie there."""
        part, place = self._plan.parts[index], self._plan.places[index]
        if place not in HOST:
            return torch.device(place)
        return torch.device("cpu") if part.cost.rows and not part.ties else self._device

    def place(self, owned: _Owned) -> None:
        """Puts one weight where it is to be."""
        weight, first = owned.weight, owned.parts[0]
        place, device = self._plan.places[first], self._runs_on(first)
        if place == "disk" and device.type == "cpu":
            view = _mapped(weight)
            if view is not None:
                self._set(weight, view)
                for index in owned.parts if view.numel() * view.element_size() >= _READ_AHEAD else ():
                    self._mapped.setdefault(index, []).append(view)
                return
        if place not in HOST or (place == "cpu" and device.type == "cpu"):
            self._set(weight, _read(weight, device))
        elif len(owned.parts) == 1:
            self._streamed.setdefault(first, []).append(weight)
        else:
            self._shared[weight] = owned.parts

    def _set(self, weight: Weight, tensor: torch.Tensor) -> None:
        parameter = nn.Parameter(tensor, requires_grad=weight.learns)
        for slot in weight.slots:
            slot.put(parameter)

    def place_buffers(self, stored: Mapping[str, Stored], dtype: torch.dtype | None) -> None:
        """Puts every buffer where its part computes."""
        for index, part in enumerate(self._plan.parts):
            device = self._runs_on(index)
            for owner, attribute, name, buffer in part.buffers:
                wanted = dtype if dtype is not None and buffer.dtype.is_floating_point else buffer.dtype
                value = stored[name].read() if name in stored else buffer
                owner._buffers[attribute] = value.to(device, wanted)

    def streamer(self) -> Streamer | None:
        """Packs what is streamed into blocks, one for a part and one for each weight that several parts use."""
        of_part = {index: [self._block(weights)] for index, weights in self._streamed.items()}
        for weight, indices in self._shared.items():
            block = self._block([weight])
            for index in indices:
                of_part.setdefault(index, []).append(block)
        if not of_part:
            return None
        for index in sorted(of_part):
            part = self._plan.parts[index]
            self._units.append(Unit(part.name, part.module, tuple(of_part[index])))
            if self._plan.places[index] == "cpu" and self._device.type == "cuda":
                self._pin(of_part[index])
        largest = max(block.num_bytes for block in self.blocks)
        from_disk = sum(block.num_bytes for block in self.blocks if block.host is None)
        reader = direct_reader(self._device, from_disk, free_memory())
        return Streamer(self._units, self._device, max(self._plan.room or 2 * largest, largest), reader)

    def _block(self, weights: Sequence[Weight]) -> Block:
        block = Block(weights)
        block.absent = tuple(Absent.of(weight, self._device) for weight in weights)
        block.take_away()
        self.blocks.append(block)
        return block

    def _pin(self, blocks: Sequence[Block]) -> None:
        """The host's share is kept where the device can copy from by itself."""
        for block in blocks:
            if block.host is None:
                block.host = torch.empty(block.num_bytes, dtype=torch.uint8, pin_memory=True)
                block.fill(block.host)
                for weight in block.weights:
                    weight.stored = Loaded(weight.within(block.host), on_disk=False)

    def readahead(self) -> Readahead | None:
        """For what is mapped."""
        for index, tensors in sorted(self._mapped.items()):
            part = self._plan.parts[index]
            self._mapped_units.append(Unit(part.name, part.module, mapped=tuple(tensors)))
        return Readahead(self._mapped_units) if len(self._mapped_units) > 1 else None

    def hooks(
        self, model: nn.Module, streamer: Streamer | None, readahead: Readahead | None
    ) -> list[torch.utils.hooks.RemovableHandle]:
        """Those of the units, and those that bring inputs to where a part runs when there are several devices."""
        handles = []
        # Prepended: what is attached last runs first. Weights first, then inputs.
        if any(self._runs_on(index).type != "cpu" for index in range(len(self._plan.parts))):
            for index, part in enumerate(self._plan.parts):
                device = self._runs_on(index)
                handles.append(compute_on(part.module, device))
                if device != self._device and device.type == "cpu":
                    handles.append(answer_on(part.module, self._device))
            handles += [compute_on(model, self._device), *return_to_caller(model)]
        if streamer is not None:
            handles += [handle for unit in self._units for handle in streamer.hooks(unit)]
        if readahead is not None:
            handles += [handle for unit in self._mapped_units for handle in readahead.hooks(unit)]
        return handles


def _read(weight: Weight, device: torch.device) -> torch.Tensor:
    """In memory of its own on `device`, in its dtype."""
    stored = weight.stored
    if device.type == "cpu":
        view = stored.view() if stored.dtype != weight.dtype or not stored.on_disk else None
        return (stored.read() if view is None else view).to(weight.dtype)
    view = stored.view()
    return (stored.read() if view is None else view).to(device, weight.dtype)


def _mapped(weight: Weight) -> torch.Tensor | None:
    """Its values in the file's mapping, or copied when small and not aligned; None where neither can be."""
    if weight.stored.dtype != weight.dtype:
        return None
    view = weight.stored.view()
    if view is not None and view.data_ptr() % 64 and view.numel() * view.element_size() <= _COPIED:
        return view.clone()
    return view
