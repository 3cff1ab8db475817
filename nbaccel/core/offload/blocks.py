"""What is moved together: the weights of one layer, packed into one buffer, so that one copy brings them all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import nn

from nbaccel.core.offload.absent import Absent, Weight
from nbaccel.core.offload.weights import Stored

__all__ = ["Block", "Buffer", "Buffers"]

Read = Callable[[Stored, torch.Tensor], bool]
"""Writes a stored tensor into memory, or says False."""
_ALIGNMENT = 64  # bytes: what vector instructions and torch's own allocations have


@final
class Buffer:
    """Memory that blocks are brought to in turn."""

    __slots__ = ("left", "memory", "num_bytes")

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.memory: torch.Tensor | None = None
        self.left: list[torch.cuda.Event] = []
        """What has to have happened before it may be filled again."""


@final
class Buffers:
    """Buffers that are used again, of at most `budget` bytes unless there is no other way."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._taken = 0
        self._free: list[Buffer] = []
        self._lock = threading.Lock()

    def take(self, num_bytes: int, *, must: bool) -> Buffer | None:
        """A buffer of that size; None when it would exceed the budget, unless it `must` be."""
        with self._lock:
            if not must and self._taken + num_bytes > self._budget:
                return None
            self._taken += num_bytes
            for buffer in self._free:
                if buffer.num_bytes == num_bytes:
                    self._free.remove(buffer)
                    return buffer
            while self._free and self._kept() + num_bytes > self._budget:
                for event in self._free.pop(0).left:
                    event.synchronize()
            return Buffer(num_bytes)

    def give_back(self, buffer: Buffer) -> None:
        """It is filled again only after the events in `left`."""
        with self._lock:
            self._taken -= buffer.num_bytes
            if self._kept() + buffer.num_bytes <= self._budget:
                self._free.append(buffer)
                return
        for event in buffer.left:
            event.synchronize()

    def _kept(self) -> int:
        return self._taken + sum(buffer.num_bytes for buffer in self._free)


@dataclass(slots=True, eq=False)
class Block:
    """Weights that come and go together."""

    weights: Sequence[Weight]
    device: torch.device
    """Where they are computed with."""
    num_bytes: int = field(init=False)
    absent: tuple[Absent, ...] = field(init=False)
    host: torch.Tensor | None = None
    """Packed and pinned in the host's memory, if it stays there."""
    _present: tuple[nn.Parameter, ...] = ()

    def __post_init__(self) -> None:
        offset = 0
        for weight in self.weights:
            weight.offset = offset
            offset += -(-weight.num_bytes // _ALIGNMENT) * _ALIGNMENT
        self.num_bytes = offset
        self.absent = tuple(Absent.of(weight, self.device) for weight in self.weights)

    def begin(self) -> None:
        """Makes the modules have nothing but the stand-ins."""
        for absent in self.absent:
            for slot in absent.weight.slots:
                slot.put(absent)

    def end(self) -> None:
        """Makes the modules have the weights for good."""
        self.take_away()  # what an interrupted pass has left
        for absent in self.absent:
            parameter = nn.Parameter(absent.weight.real(), requires_grad=absent.requires_grad)
            for slot in absent.weight.slots:
                slot.exchange(absent, parameter)

    def fill(self, memory: torch.Tensor, read: Read | None = None) -> None:
        """Writes all weights into memory of the host; by `read` those that it can."""
        with torch.no_grad():
            for weight in self.weights:
                target = weight.within(memory)
                if read is None or not read(weight.stored, target):
                    target.copy_(weight.real())

    def put(self, memory: torch.Tensor) -> None:
        """Makes the modules use the weights in `memory`."""
        self._present = tuple(absent.present(absent.weight.within(memory)) for absent in self.absent)
        for absent, parameter in zip(self.absent, self._present, strict=True):
            for slot in absent.weight.slots:
                slot.exchange(absent, parameter)

    def take_away(self) -> None:
        """Makes the modules forget the weights, if they have been put."""
        for absent, parameter in zip(self.absent, self._present, strict=False):
            for slot in absent.weight.slots:
                slot.exchange(parameter, absent)
        self._present = ()

    def is_used(self) -> bool:
        """Whether a module has one of its weights: each may have been given others, as by torch.func."""
        present = zip(self.absent, self._present, strict=False)
        return any(slot.held is parameter for absent, parameter in present for slot in absent.weight.slots)

    def has(self, parameter: nn.Parameter | None) -> bool:
        """Whether that is one of its weights, or stands for one."""
        return any(parameter is one for one in (*self.absent, *self._present))
