"""Modules built without memory, or straight on a device."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules import module as hooks
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["init_empty_weights", "init_on_device", "like_parameter"]


@contextmanager
def init_empty_weights(include_buffers: bool = False) -> Iterator[None]:
    """Modules made inside have their parameters on the meta device: shapes and types, no memory.

    Buffers keep their values unless `include_buffers`: what is computed at construction (rotary tables,
    masks) often is in no checkpoint. Parameters that are tied inside stay tied. Only the calling thread's
    modules are concerned.
    """
    with init_on_device(torch.device("meta"), include_buffers=include_buffers):
        yield


@contextmanager
def init_on_device(device: torch.device | str, include_buffers: bool = False) -> Iterator[None]:
    """Modules made inside have each parameter moved to `device` as soon as it is registered.

    With `include_buffers` the buffers too, and whatever else is made inside without a device of its own.
    """
    target, thread = torch.device(device), threading.get_ident()
    moved = WeakIdKeyDictionary()  # one parameter under two names stays one

    # torch's own annotations say that these hooks return nothing
    def parameter(module: nn.Module, name: str, value: nn.Parameter | None) -> Any:
        if value is None or threading.get_ident() != thread or is_lazy(value) or value.device == target:
            return None
        if value not in moved:
            with torch.no_grad():
                tensor = value.detach().to(target)
            moved[value] = like_parameter(value, tensor)
        return moved[value]

    def buffer(module: nn.Module, name: str, value: torch.Tensor | None) -> Any:
        if value is None or threading.get_ident() != thread or is_lazy(value):
            return None
        return value.to(target)

    with ExitStack() as stack:
        handle = hooks.register_module_parameter_registration_hook(parameter)
        stack.callback(handle.remove)
        if include_buffers:
            handle = hooks.register_module_buffer_registration_hook(buffer)
            stack.callback(handle.remove)
            stack.enter_context(target)
        yield


def like_parameter(value: nn.Parameter, tensor: torch.Tensor) -> nn.Parameter:
    """A parameter of the numbers in `tensor`, else as `value`: its class, its attributes, whether it learns."""
    if type(value) is nn.Parameter or type(value) is type(tensor):
        new = nn.Parameter(tensor, requires_grad=value.requires_grad)
    else:
        new = cast("nn.Parameter", tensor.as_subclass(type(value)).requires_grad_(value.requires_grad))
    if new is not tensor:
        new.__dict__.update(value.__dict__)
    return new
