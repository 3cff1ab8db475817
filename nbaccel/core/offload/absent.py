"""What stands where a weight is while its layer does not run."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import nn

from nbaccel.core.nested import leaves, map_leaves
from nbaccel.core.offload.weights import Stored
from nbaccel.errors import ConfigError

__all__ = ["Absent", "Slot", "Weight"]


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """One name of a weight: an attribute of a module."""

    owner: nn.Module
    attribute: str
    name: str

    @property
    def held(self) -> nn.Parameter | None:
        """What the module has under that name now."""
        return self.owner._parameters.get(self.attribute)

    def put(self, parameter: nn.Parameter) -> None:
        """Makes `parameter` what the module has under that name."""
        if type(self.owner).__setattr__ is nn.Module.__setattr__:
            self.owner._parameters[self.attribute] = parameter
        else:  # recurrent modules keep lists of their weights up to date there
            setattr(self.owner, self.attribute, parameter)

    def exchange(self, old: nn.Parameter, new: nn.Parameter) -> None:
        """Puts `new` where `old` is. What somebody else has put there meanwhile stays, and is used."""
        if self.held is old:
            self.put(new)


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
    """Stands where a weight is while its layer does not run: its shape, type and device, without memory.

    A model that uses a layer's weight without calling the layer still works: whatever computes with this
    gets the weight itself, read for that one call. Nothing can be written to it: it would be lost.
    """

    weight: Weight
    runs_on: torch.device
    addressed: torch.Tensor | None
    """Its values, once somebody has asked where in memory they are."""

    @staticmethod
    def of(weight: Weight, device: torch.device) -> Absent:
        """The stand-in of `weight`, computed with on `device`."""
        made: Absent = torch.Tensor._make_wrapper_subclass(
            Absent, weight.stored.shape, dtype=weight.dtype, device=device, requires_grad=weight.learns
        )
        made.weight, made.runs_on, made.addressed = weight, device, None
        return made

    def values(self) -> torch.Tensor:
        """Those of the weight, where it is computed with."""
        return self.weight.real().to(self.runs_on)

    def present(self, values: torch.Tensor) -> nn.Parameter:
        """The parameter with these values that stands here for a while, and is not trained."""
        # A parameter again: torch chooses between its kernels by that.
        made = nn.Parameter(values, requires_grad=self.requires_grad)
        if made.requires_grad and not made.is_inference():
            made.register_hook(partial(_refuse_gradient, self.weight.slots[0].name))  # type: ignore[no-untyped-call]
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if func is torch._has_compatible_shallow_copy_type and isinstance(args[0], Absent):
            # What nn.Module._apply asks before it puts something in a parameter's place.
            raise ConfigError(
                f"{args[0].weight.slots[0].name} is streamed: .to(), .cuda(), .half() and the like cannot change it; "
                "remove_hooks(model) first"
            )
        _refuse_write(next(_written(func, name, args, kwargs), None))
        if func == _IS_META:
            return True  # as of any weight without values
        if func in _BARE:
            return args[0].values()
        elif name in _ADDRESS:
            args = map_leaves(_addressed, args)
        elif func not in _DESCRIBING and name not in _DESCRIBING_METHODS:
            args, kwargs = map_leaves(_real, args), map_leaves(_real, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """What computes with it below `__torch_function__`, as torch.func does with what it has wrapped."""
        if func._schema.is_mutable and isinstance(args[0], Absent):
            _refuse_write(args[0])
        values = partial(map_leaves, lambda value: value.values() if isinstance(value, Absent) else value)
        return func(*values(args), **values(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """A plain parameter, as of a model in memory."""
        made = nn.Parameter(self.values().clone(), requires_grad=self.requires_grad)
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as a plain parameter."""
        real = nn.Parameter(self.values(), requires_grad=self.requires_grad)
        return real.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def _getters(*names: str) -> frozenset[Any]:
    """As `__torch_function__` is given them: all are called `__get__`."""
    return frozenset(getattr(torch.Tensor, name).__get__ for name in names if hasattr(torch.Tensor, name))


(_IS_META,) = _getters("is_meta")
_DESCRIBING = _getters(
    *("shape", "dtype", "layout", "ndim", "itemsize", "nbytes"),
    *("requires_grad", "is_leaf", "grad", "grad_fn", "retains_grad", "output_nr", "_version", "_base"),
    *("device", "is_cpu", "is_cuda", "is_sparse", "is_sparse_csr", "is_quantized", "is_mkldnn", "is_nested"),
    "_backward_hooks",
)
"""What can be said of a weight without having its values."""
_DESCRIBING_METHODS = frozenset(
    {
        "__hash__",
        "__repr__",
        "__len__",
        "get_device",
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "stride",
    }
    | {"element_size", "storage_offset", "is_floating_point", "is_complex", "is_contiguous", "is_inference"}
    | {"__set__", "__delete__", "requires_grad_", "retain_grad"}
)
_BARE = _getters("data") | {torch.Tensor.detach, torch.detach}
_ADDRESS = frozenset({"data_ptr", "untyped_storage", "_typed_storage", "storage", "const_data_ptr"})
_SETTERS = frozenset(getattr(torch.Tensor, name).__set__ for name in ("requires_grad", "grad"))
_HOOKING = frozenset({"register_hook", "register_post_accumulate_grad_hook"})


def _written(func: Any, name: str, args: Any, kwargs: Any) -> Iterator[Absent]:
    """The stand-ins that a function would write to: in place, to `out`, or by being set."""
    targets: list[Any] = [kwargs["out"]] if "out" in kwargs else []
    if name == "__set__":
        in_place = func not in _SETTERS
    elif name.startswith("__"):
        in_place = name == "__setitem__" or name in _IN_PLACE_OPERATORS
    else:
        in_place = (name.endswith("_") and name not in _DESCRIBING_METHODS) or name in _HOOKING
    if (in_place or kwargs.get("inplace") is True) and args:
        targets.append(args[0])
    return (value for target in targets for _, value in leaves(target) if isinstance(value, Absent))


_IN_PLACE_OPERATORS = frozenset(
    f"__i{name}__"
    for name in [
        "add",
        "sub",
        "mul",
        "truediv",
        "div",
        "floordiv",
        "mod",
        "pow",
        "matmul",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
    ]
)


def _real(value: Any) -> Any:
    return value.present(value.values()) if isinstance(value, Absent) else value


def _addressed(value: Any) -> Any:
    """The values, kept from now on: an address has to stay valid."""
    if not isinstance(value, Absent):
        return value
    if value.addressed is None:
        value.addressed = value.values()
    return value.addressed


def _refuse_write(written: Absent | None) -> None:
    if written is not None:
        raise ConfigError(
            f"{written.weight.slots[0].name} is streamed: what is written to it would be lost; "
            "remove_hooks(model) first"
        )


def _refuse_gradient(name: str, gradient: torch.Tensor) -> None:
    raise ConfigError(f"{name} is streamed: it cannot be trained; remove_hooks(model) first")
