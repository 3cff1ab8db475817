"""What takes a dispatched model's hooks off, and one model's weights back to the CPU; others are refused, by name."""

from __future__ import annotations

from typing import Any, TypeVar, final

import torch
from torch import nn

from nbaccel import remove_hooks
from nbaccel.compat.accelerate.names import look_up
from nbaccel.compat.accelerate.utils.memory import clear_device_cache
from nbaccel.compat.accelerate.utils.operations import send_to_device

__all__ = ["UserCpuOffloadHook", "remove_hook_from_module", "remove_hook_from_submodules"]

M = TypeVar("M", bound=nn.Module)


@final
class UserCpuOffloadHook:
    """Brings `model` to `device` when it is called, where it stays until `offload`.

    Args:
        previous: that of the model that ran before, which is then taken off the device.
    """

    def __init__(self, model: nn.Module, device: torch.device, previous: UserCpuOffloadHook | None) -> None:
        self.model = model.to("cpu")
        self._device, self._previous = device, previous
        self._handle = model.register_forward_pre_hook(self._bring, with_kwargs=True)

    def _bring(self, model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if self._previous is not None:
            self._previous.offload()
        model.to(self._device)
        return send_to_device(args, self._device), send_to_device(kwargs, self._device)

    def offload(self) -> None:
        """Takes the model to the CPU."""
        self.model.to("cpu")
        clear_device_cache()

    def remove(self) -> None:
        """Leaves the model where it is from now on."""
        self._handle.remove()


def remove_hook_from_module(module: M, recurse: bool = False) -> M:
    """A dispatched model as a plain one again; what is not dispatched stays as it is."""
    remove_hooks(module)
    return module


def remove_hook_from_submodules(module: nn.Module) -> None:
    """The same."""
    remove_hooks(module)


def __getattr__(name: str) -> Any:
    return look_up(__name__, name)
