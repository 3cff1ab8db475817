"""Putting a model's tensors where a plan wants them, and the hooks onto its modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from nbaccel.core.offload.absent import Slot, Weight
from nbaccel.core.offload.blocks import Block
from nbaccel.core.offload.direct import direct_reader
from nbaccel.core.offload.dispatched import Dispatch, dispatched_class, enter_class, real_state, unmoved
from nbaccel.core.offload.hooks import Streamer, answer_on, compute_on, return_to_caller
from nbaccel.core.offload.limits import free_memory
from nbaccel.core.offload.matched import Matched
from nbaccel.core.offload.meta import like_parameter
from nbaccel.core.offload.parts import listed
from nbaccel.core.offload.plan import HOST, Plan
from nbaccel.core.offload.readahead import Readahead
from nbaccel.core.offload.scratch import write_scratch
from nbaccel.core.offload.units import Unit
from nbaccel.core.offload.weights import Loaded, Stored
from nbaccel.errors import ConfigError

__all__ = ["install"]

M = TypeVar("M", bound=nn.Module)
_COPIED = 64 << 10
"""Bytes up to which a mapped tensor that is not aligned is copied: it costs nothing and computes as usual."""
_READ_AHEAD = 256 << 10
"""Bytes from which it is worth asking whether a mapped tensor is in memory."""


def install(
    model: M,
    plan: Plan,
    values: Matched,
    *,
    dtype: torch.dtype | None,
    folder: Path | None,
) -> M:
    """Does what the plan says. The model itself is returned, dispatched.

    Raises:
        ConfigError: a tensor cannot be where it is to be.
    """
    cls = dispatched_class(type(model))  # before anything is moved: a class may refuse to have one below it
    device = torch.device(plan.main)
    weights = _weights(plan, values, dtype)
    installing = _Installing(plan, device)
    installing.check(weights)
    _write_what_is_in_no_file(weights, plan, type(model).__name__, folder)
    try:
        for owned in sorted(weights, key=lambda found: found.weight.stored.position()):
            installing.place(owned, values)
        installing.place_buffers(values.buffers, dtype)
        streamer = installing.streamer()
        readahead = installing.readahead()
        handles = installing.hooks(model, streamer, readahead)
    except BaseException:
        for block in installing.blocks:
            block.end()
        raise
    handles += real_state(installing.blocks)
    workers = [worker for worker in (streamer, readahead) if worker is not None]
    dispatch = Dispatch(
        plan=plan,
        device=device,
        blocks=installing.blocks,
        handles=[*handles, *unmoved(model, installing.blocks)],
        workers=workers,
    )
    enter_class(model, cls, dispatch)
    return model


@dataclass(slots=True, eq=False)
class _Owned:
    """A weight, and the parts that use it."""

    weight: Weight
    parts: list[int]

    @property
    def parameter(self) -> nn.Parameter:
        """What the model has for it; not kept, because it may be as large as the weight."""
        found = self.weight.slots[0].held
        assert found is not None
        return found


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

    def check(self, weights: Sequence[_Owned]) -> None:
        """That all which is to be streamed can be.

        Raises:
            ConfigError: what is sparse, quantized or made of other tensors would have to be streamed.
        """
        wrong = [
            owned.weight.slots[0].name
            for owned in weights
            if not owned.weight.stored.plain and not self._stays(owned.parts[0])
        ]
        if wrong:
            raise ConfigError(
                f"{listed(wrong)} cannot be on the disk, nor on the host for an accelerator: only plain tensors "
                "are streamed, not sparse or quantized ones. Give them a place where they can stay"
            )

    def _stays(self, index: int) -> bool:
        """Whether a part's weights are all the time where it computes."""
        place = self._plan.places[index]
        return place not in HOST or (place == "cpu" and self._runs_on(index).type == "cpu")

    def place(self, owned: _Owned, values: Matched) -> None:
        """Puts one weight where it is to be."""
        weight, first = owned.weight, owned.parts[0]
        place, device = self._plan.places[first], self._runs_on(first)
        if values.own and self._stays(first) and owned.parameter.device == device:
            return  # it is there: the same parameter, for whatever else has it, such as an optimizer
        if place == "disk" and device.type == "cpu":
            view = _mapped(weight)
            if view is not None:
                self._set(owned, view)
                for index in owned.parts if view.numel() * view.element_size() >= _READ_AHEAD else ():
                    self._mapped.setdefault(index, []).append(view)
                return
        if self._stays(first):
            self._set(owned, _read(weight, device))
        elif len(owned.parts) == 1:
            self._streamed.setdefault(first, []).append(weight)
        else:
            self._shared[weight] = owned.parts

    def _set(self, owned: _Owned, tensor: torch.Tensor) -> None:
        parameter = like_parameter(owned.parameter, tensor)
        for slot in owned.weight.slots:
            slot.put(parameter)

    def place_buffers(self, stored: Mapping[int, Stored], dtype: torch.dtype | None) -> None:
        """Puts every buffer where its part computes, one that several modules share once on each device.

        Only what the checkpoint has is converted: what a model computes for itself, such as the frequencies of
        rotary positions, it computes in the type it needs.
        """
        placed: dict[tuple[int, torch.device], torch.Tensor] = {}
        buffers = [(index, found) for index, part in enumerate(self._plan.parts) for found in part.buffers]
        for index, (owner, attribute, _, buffer) in buffers:
            key = id(buffer), self._runs_on(index)
            if key not in placed:
                value, wanted = buffer, buffer.dtype
                if key[0] in stored:
                    value = stored[key[0]].read()
                    wanted = dtype if dtype is not None and wanted.is_floating_point else wanted
                placed[key] = value.to(key[1], wanted)
            owner._buffers[attribute] = placed[key]

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
        block = Block(weights, self._device)
        self.blocks.append(block)
        block.begin()
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
