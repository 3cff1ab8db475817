"""One process: the model as it is, on its device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, final

import torch
from torch import Tensor, nn

from nbaccel.core.strategies.base import Strategy, clip_local_norm

__all__ = ["Single"]


@final
class Single(Strategy):
    """Nothing to spread. `device` None leaves modules where they are."""

    name = "single"

    def __init__(self, device: torch.device | None) -> None:
        self._device = device

    def wrap(self, module: nn.Module) -> nn.Module:
        return module if self._device is None else module.to(self._device)

    def unwrap(self, module: nn.Module) -> nn.Module:
        return module

    def set_sync(self, module: nn.Module, synchronize: bool) -> None:
        pass

    def no_sync(self, module: nn.Module) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def sync_in_backward(self, module: nn.Module, outputs: list[Tensor]) -> None:
        pass

    def join(self, modules: list[nn.Module]) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def clip_grad_norm(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float) -> Tensor:
        return clip_local_norm(parameters, max_norm, norm_type)

    def full_state_dict(self, module: nn.Module) -> dict[str, Any]:
        return module.state_dict()
