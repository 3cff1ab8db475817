"""What a model is while it is dispatched: its own class, with the few methods that have to know."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast, final

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from nbaccel.core.model.hooks import Hook, uncompiled
from nbaccel.core.nested import map_leaves
from nbaccel.core.offload.absent import Absent, Weight
from nbaccel.core.offload.blocks import Block
from nbaccel.core.offload.hooks import Streamer
from nbaccel.core.offload.plan import Plan
from nbaccel.core.offload.readahead import Readahead
from nbaccel.errors import ConfigError

__all__ = [
    "Dispatch",
    "Unmoved",
    "dispatch_of",
    "dispatched_class",
    "enter_class",
    "is_dispatched",
    "real_state",
    "remove_hooks",
    "unmoved",
]

M = TypeVar("M", bound=nn.Module)
_ATTRIBUTE = "_nbaccel_dispatch"
_HOOKS = ("_forward_hooks", "_forward_hooks_always_called", "_forward_pre_hooks", "_state_dict_hooks")
_HOOKS_WITH = ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
_HELD_IN = (dict, OrderedDict, list, tuple)
"""Where a module may keep its parameters and other modules."""
_UNMOVED = (
    "this model is dispatched: its weights are where its device map puts them, and .to(), .cuda(), .half() and the "
    "like change nothing. remove_hooks(model) makes it a plain model again"
)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """What was done to a model, so that it can be undone."""

    plan: Plan
    device: torch.device
    """Where what is streamed runs."""
    blocks: Sequence[Block]
    handles: Sequence[RemovableHandle | Unmoved]
    workers: Sequence[Streamer | Readahead]

    @property
    def streamer(self) -> Streamer | None:
        return next((worker for worker in self.workers if isinstance(worker, Streamer)), None)


class _Methods:
    """Mixed into the class of a dispatched model, before its own."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not that of the model's class: it may want arguments, and was called for that class already."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A slice of a Sequential has its class, and is not dispatched.
        dispatch = self.__dict__.get(_ATTRIBUTE)
        run = super().__call__  # type: ignore[misc]
        if dispatch is None or dispatch.streamer is None:
            return run(*args, **kwargs)
        return _streamed_pass(dispatch.streamer, run, args, kwargs)

    def device_map_table(self) -> str:
        """Module, bytes, estimated compute, place and why."""
        return dispatch_of(cast("nn.Module", self)).plan.table()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        warnings.warn(_UNMOVED, UserWarning, stacklevel=3)
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        dispatch = self.__dict__.get(_ATTRIBUTE)
        if dispatch is not None and dispatch.blocks:
            raise ConfigError(
                "the weights of a dispatched model are not here to be overwritten: load them with "
                "load_checkpoint_and_dispatch, or call remove_hooks(model) first"
            )
        return super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled and copied as the plain model with its real weights."""
        return _itself, (_plain_copy(cast("nn.Module", self)),)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """As its own class is copied, which may have a way of its own."""
        return copy.deepcopy(_plain_copy(cast("nn.Module", self)), memo)


@final
class Unmoved:
    """Stands for `_apply`, which .to(), .half() and the like come down to, of a part with streamed weights: torch's
    would read all of them and keep what it has read."""

    def __init__(self, part: nn.Module) -> None:
        self._part = part
        part.__dict__["_apply"] = self

    def __call__(self, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
        warnings.warn(_UNMOVED, UserWarning, stacklevel=3)
        return self._part

    def remove(self) -> None:
        """Makes the part have its class's again."""
        if self._part.__dict__.get("_apply") is self:
            del self._part.__dict__["_apply"]

    def __reduce__(self) -> Any:
        """In a copied or pickled part, its class's."""
        return getattr, (self._part, "_apply")


@uncompiled
def _streamed_pass(streamer: Streamer, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    with streamer.whole_pass():
        return run(*args, **kwargs)


def _itself(model: nn.Module) -> nn.Module:
    """What a pickled dispatched model is called back with."""
    return model


def dispatch_of(model: nn.Module) -> Dispatch:
    """What was done to a dispatched model.

    Raises:
        ConfigError: it is not dispatched.
    """
    found = model.__dict__.get(_ATTRIBUTE)
    if not isinstance(found, Dispatch):
        raise ConfigError(f"this {type(model).__name__} is not dispatched")
    return found


def enter_class(model: nn.Module, cls: type[nn.Module], dispatch: Dispatch) -> None:
    """Makes `model` one of a `dispatched_class`. It stays an instance of its own."""
    object.__setattr__(model, _ATTRIBUTE, dispatch)
    model.__class__ = cls


def remove_hooks(model: M) -> M:
    """Makes a dispatched model a plain one again, which it returns. What is not dispatched stays as it is.

    Weights that were streamed are in the host's memory afterwards, or mapped from their file where nothing
    had to be converted; the others stay where they are.
    """
    if not isinstance(model.__dict__.get(_ATTRIBUTE), Dispatch):
        return model
    dispatch = dispatch_of(model)
    for handle in dispatch.handles:
        handle.remove()
    for worker in dispatch.workers:
        worker.close()
    for block in dispatch.blocks:
        block.end()
    model.__class__ = type(model).__mro__[2]
    object.__delattr__(model, _ATTRIBUTE)
    return model


def dispatched_class(cls: type[nn.Module]) -> type[nn.Module]:
    """`cls` with our methods before its own, under its own name."""
    namespace: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    if isinstance(getattr(cls, "device", None), property):
        # Hugging Face's models answer with the device of their first parameter, which may not be there.
        namespace["device"] = property(lambda self: dispatch_of(self).device)
    return type(cls.__name__, (_Methods, cls), namespace)


def real_state(blocks: Sequence[Block]) -> list[RemovableHandle]:
    """Hooks that put the real weights into every state dict, that of a part of the model too."""
    weights: dict[nn.Module, dict[str, tuple[Block, Weight]]] = {}
    for block in blocks:
        for weight in block.weights:
            for slot in weight.slots:
                weights.setdefault(slot.owner, {})[slot.attribute] = block, weight

    def fill(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for attribute, (block, weight) in weights[module].items():
            if prefix + attribute in state and block.has(module._parameters[attribute]):
                state[prefix + attribute] = weight.real()

    return [m.register_state_dict_post_hook(Hook(fill)) for m in weights]  # type: ignore[no-untyped-call]


def unmoved(model: nn.Module, blocks: Sequence[Block]) -> list[Unmoved]:
    """For every part of the model that has streamed weights; the model's own class sees to the whole of it.

    What is pickled in a way of its own, such as an fx.GraphModule, is left: its stand-ins refuse to be replaced.
    """
    owners = {slot.owner for block in blocks for weight in block.weights for slot in weight.slots}
    parts = [part for part in model.modules() if part is not model and not owners.isdisjoint(part.modules())]
    return [Unmoved(part) for part in parts if type(part).__reduce__ is object.__reduce__]


def _plain_copy(model: nn.Module) -> nn.Module:
    """The same tree of modules without our hooks, with real weights; tensors are shared with `model`."""
    made: dict[nn.Module, nn.Module] = {}
    real: dict[Absent, nn.Parameter] = {}
    for module in model.modules():
        cls: Any = type(module)
        made[module] = object.__new__(cls.__mro__[2] if issubclass(cls, _Methods) else cls)

    def plain(value: Any) -> Any:
        if isinstance(value, Absent):
            if value not in real:
                real[value] = nn.Parameter(value.weight.real(), requires_grad=value.requires_grad)
            return real[value]
        return made.get(value, value) if isinstance(value, nn.Module) else value

    for module, new in made.items():
        hooks = [module.__dict__.get(key, {}) for key in _HOOKS]
        ours = {k for held in hooks for k, hook in held.items() if isinstance(hook, Hook)}
        for key, value in module.__dict__.items():
            if key in _HOOKS or key in _HOOKS_WITH:
                new.__dict__[key] = type(value)((k, v) for k, v in value.items() if k not in ours)
            elif key != _ATTRIBUTE and not isinstance(value, Unmoved):
                new.__dict__[key] = map_leaves(plain, value) if type(value) in _HELD_IN else plain(value)
    return made[model]


def is_dispatched(model: nn.Module) -> bool:
    """Whether the model, or a part of it, is dispatched already."""
    return any(_ATTRIBUTE in module.__dict__ for module in model.modules()) or any(
        isinstance(parameter, Absent) for parameter in model.parameters()
    )
