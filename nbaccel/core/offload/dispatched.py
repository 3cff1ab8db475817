"""What a model is while it is dispatched: its own class, with the few methods that have to know."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast, final

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from nbaccel.core.offload.blocks import Absent, Block
from nbaccel.core.offload.hooks import Readahead, Streamer
from nbaccel.core.offload.plan import Plan
from nbaccel.errors import ConfigError

__all__ = ["Dispatch", "dispatch_of", "enter_class", "is_dispatched", "real_state", "remove_hooks"]

M = TypeVar("M", bound=nn.Module)
_ATTRIBUTE = "_nbaccel_dispatch"
_HOOKS = ("_forward_hooks", "_forward_hooks_always_called", "_forward_pre_hooks", "_state_dict_hooks")
_HOOKS_WITH = ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """What was done to a model, so that it can be undone."""

    plan: Plan
    device: torch.device
    """Where what is streamed runs."""
    blocks: Sequence[Block]
    handles: Sequence[RemovableHandle]
    workers: Sequence[Streamer | Readahead]


class _Methods:
    """Mixed into the class of a dispatched model, before its own."""

    def device_map_table(self) -> str:
        """Module, bytes, estimated compute, place and why."""
        return dispatch_of(cast("nn.Module", self)).plan.table()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        warnings.warn(
            "this model is dispatched: its weights are where its device map puts them, and .to(), .cuda(), "
            ".half() and the like change nothing. remove_hooks(model) makes it a plain model again",
            UserWarning,
            stacklevel=3,
        )
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        if dispatch_of(cast("nn.Module", self)).blocks:
            raise ConfigError(
                "the weights of a dispatched model are not here to be overwritten: load them with "
                "load_checkpoint_and_dispatch, or call remove_hooks(model) first"
            )
        return super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled and copied as the plain model with its real weights."""
        return _itself, (_plain_copy(cast("nn.Module", self)),)


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


def enter_class(model: nn.Module, dispatch: Dispatch) -> None:
    """Gives `model` the methods of a dispatched one. It stays an instance of its class."""
    object.__setattr__(model, _ATTRIBUTE, dispatch)
    model.__class__ = _dispatched(type(model))


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
        for weight in block.weights:
            parameter = nn.Parameter(weight.real(), requires_grad=weight.learns)
            for slot in weight.slots:
                slot.put(parameter)
    model.__class__ = type(model).__mro__[2]
    object.__delattr__(model, _ATTRIBUTE)
    return model


def _dispatched(cls: type[nn.Module]) -> type[nn.Module]:
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
    weights: dict[nn.Module, dict[str, Any]] = {}
    for block in blocks:
        for weight in block.weights:
            for slot in weight.slots:
                weights.setdefault(slot.owner, {})[slot.attribute] = weight

    def fill(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for attribute, weight in weights[module].items():
            if prefix + attribute in state:
                state[prefix + attribute] = weight.real()

    return [m.register_state_dict_post_hook(fill) for m in weights]  # type: ignore[no-untyped-call]


def _plain_copy(model: nn.Module) -> nn.Module:
    """The same tree of modules without our hooks, with real weights; tensors are shared with `model`."""
    dispatch = dispatch_of(model)
    ours = {handle.id for handle in dispatch.handles}
    absent = {}
    for block in dispatch.blocks:
        for weight in block.weights:
            parameter = nn.Parameter(weight.real(), requires_grad=weight.learns)
            absent.update({(slot.owner, slot.attribute): parameter for slot in weight.slots})
    made: dict[nn.Module, nn.Module] = {}

    def copy_of(module: nn.Module) -> nn.Module:
        if module in made:
            return made[module]
        cls: Any = type(module).__mro__[2] if module is model else type(module)
        new: nn.Module = cls.__new__(cls)
        made[module] = new
        state = {key: value for key, value in module.__dict__.items() if key != _ATTRIBUTE}
        for name in (*_HOOKS, *_HOOKS_WITH):
            if name in state:
                state[name] = type(state[name])((k, v) for k, v in state[name].items() if k not in ours)
        state["_parameters"] = type(state["_parameters"])(
            (name, absent.get((module, name), value)) for name, value in module._parameters.items()
        )
        state["_modules"] = type(state["_modules"])(
            (name, None if child is None else copy_of(child)) for name, child in module._modules.items()
        )
        if "_flat_weights" in state:  # of recurrent modules
            names = state["_flat_weights_names"]
            state["_flat_weights"] = [state["_parameters"].get(name) for name in names]
        new.__dict__.update(state)
        return new

    return copy_of(model)


def is_dispatched(model: nn.Module) -> bool:
    """Whether the model, or a part of it, is dispatched already."""
    return any(_ATTRIBUTE in module.__dict__ for module in model.modules()) or any(
        isinstance(parameter, Absent) for parameter in model.parameters()
    )
