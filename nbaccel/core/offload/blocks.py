"""What is moved together: the weights of one layer, packed into one buffer, so that one copy brings them all."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import nn

from nbaccel.core.nested import map_leaves
from nbaccel.core.offload.weights import Stored

__all__ = ["Absent", "Block", "Buffer", "Buffers", "Slot", "Weight"]

Read = Callable[[Stored, torch.Tensor], bool]
"""Writes a stored tensor into memory, or says False."""
_ALIGNMENT = 64  # bytes: what vector instructions and torch's own allocations have


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """One name of a weight: an attribute of a module."""

    owner: nn.Module
    attribute: str
    name: str

    def put(self, parameter: nn.Parameter) -> None:
        """Makes `parameter` what the module has under that name."""
        if type(self.owner).__setattr__ is nn.Module.__setattr__:
            self.owner._parameters[self.attribute] = parameter
        else:  # recurrent modules keep lists of their weights up to date there
            setattr(self.owner, self.attribute, parameter)


@dataclass(slots=True, eq=False)
class Weight:
    """A parameter that is not where it is used: stored once, under all its names."""

    stored: Stored
    dtype: torch.dtype
    slots: tuple[Slot, ...]
    learns: bool
    offset: int = 0
    """Of its first byte in its block."""
    _last: weakref.ref[torch.Tensor] | None = None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.stored.shape) * self.dtype.itemsize

    def real(self) -> torch.Tensor:
        """Its values on the CPU, without a copy where that is possible; the same tensor while it is in use."""
        last = None if self._last is None else self._last()
        if last is not None:
            return last
        view = self.stored.view()
        found = (self.stored.read() if view is None else view).to(self.dtype)
        self._last = weakref.ref(found)
        return found

    def within(self, buffer: torch.Tensor) -> torch.Tensor:
        """Its part of a block's buffer."""
        part = buffer[self.offset : self.offset + self.num_bytes]
        return part.view(self.dtype).view(self.stored.shape)


@final
class Absent(nn.Parameter):
    """Stands where a weight is while its layer does not run: its shape and type, on the meta device.

    A model that uses a layer's weight without calling the layer still works: whatever computes with this
    gets the weight itself, read for that one call.
    """

    fetch: Callable[[], torch.Tensor]

    @staticmethod
    def of(weight: Weight, device: torch.device) -> Absent:
        """The stand-in of `weight`, computed with on `device`."""
        empty = torch.empty(weight.stored.shape, dtype=weight.dtype, device="meta")
        made: Absent = torch.Tensor._make_subclass(Absent, empty, weight.learns)
        # A parameter again: torch chooses between its kernels by that.
        made.fetch = lambda: nn.Parameter(weight.real().to(device), requires_grad=weight.learns)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ not in _DESCRIBING:
            args, kwargs = map_leaves(_real, args), map_leaves(_real, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


_DESCRIBING = frozenset(
    {
        "__get__",
        "__set__",
        "__hash__",
        "__repr__",
        "__len__",
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
    }
    | {"stride", "element_size", "storage_offset", "is_floating_point", "is_complex", "is_contiguous"}
    | {"requires_grad_", "detach", "data_ptr", "get_device", "untyped_storage"}
)
"""What can be said of a weight without having its values."""


def _real(value: Any) -> Any:
    return value.fetch() if isinstance(value, Absent) else value


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
    num_bytes: int = field(init=False)
    host: torch.Tensor | None = None
    """Packed and pinned in the host's memory, if it stays there."""
    absent: tuple[Absent, ...] = ()

    def __post_init__(self) -> None:
        offset = 0
        for weight in self.weights:
            weight.offset = offset
            offset += -(-weight.num_bytes // _ALIGNMENT) * _ALIGNMENT
        self.num_bytes = offset

    def fill(self, memory: torch.Tensor, read: Read | None = None) -> None:
        """Writes all weights into memory of the host; by `read` those that it can."""
        with torch.no_grad():
            for weight in self.weights:
                target = weight.within(memory)
                if read is None or not read(weight.stored, target):
                    target.copy_(weight.real())

    def put(self, memory: torch.Tensor) -> None:
        """Makes the modules use the weights in `memory`."""
        for weight in self.weights:
            parameter = nn.Parameter(weight.within(memory), requires_grad=weight.learns)
            for slot in weight.slots:
                slot.put(parameter)

    def take_away(self) -> None:
        """Makes the modules forget the weights."""
        for weight, absent in zip(self.weights, self.absent, strict=True):
            for slot in weight.slots:
                slot.put(absent)
