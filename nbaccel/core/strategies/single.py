"""One process: the model as it is, on its device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nbaccel.core.strategies.base import DataAxis, Strategy, clip_local_norm

__all__ = ["Single"]


@final
class Single(Strategy):
    """Nothing to spread."""

    name = "single"
    plain = replicates = True

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def data_axis(self) -> DataAxis:
        return DataAxis(rank=0, size=1)

    def wrap(
        self, module: nn.Module, optimizers: Sequence[Optimizer], *, place: bool
    ) -> tuple[nn.Module, list[Optimizer]]:
        return module.to(self._device) if place else module, list(optimizers)

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

    def full_state_dict(self, module: nn.Module, *, rank_zero_only: bool) -> dict[str, Any]:
        return module.state_dict()
