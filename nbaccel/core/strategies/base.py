"""The seam between the training loop and how a model is spread over the ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Strategy"]


class Strategy(ABC):
    """How models are spread. One per Accelerator; it holds no model, only how to treat each."""

    name: str
    """As in `RunConfig.strategy`."""

    @abstractmethod
    def wrap(self, module: nn.Module) -> nn.Module:
        """The module to call in the loop, on its device, with equal parameters on all ranks."""

    @abstractmethod
    def unwrap(self, module: nn.Module) -> nn.Module:
        """The user's module inside what `wrap` gave; any other module as it is."""

    @abstractmethod
    def set_sync(self, module: nn.Module, synchronize: bool) -> None:
        """Whether the next forward and backward of `module` end with gradients equal on all ranks."""

    @abstractmethod
    def no_sync(self, module: nn.Module) -> AbstractContextManager[Any]:
        """A context in which gradients stay on their rank."""

    @abstractmethod
    def sync_in_backward(self, module: nn.Module, outputs: list[Tensor]) -> None:
        """Makes the next backward synchronise although its forward ran under `no_sync`.

        `outputs` are what backward will start from; they show which parameters were used.
        """

    @abstractmethod
    def join(self, modules: list[nn.Module]) -> AbstractContextManager[Any]:
        """A context in which ranks may have unequal numbers of batches."""

    @abstractmethod
    def clip_grad_norm(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float) -> Tensor:
        """Clips gradients to a total norm over the whole model; returns the norm before clipping, 0-d."""

    @abstractmethod
    def full_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """The whole state dict under the user's names."""


def trainable(module: nn.Module) -> bool:
    """Whether any parameter of `module` wants a gradient."""
    return any(p.requires_grad for p in module.parameters())


def clip_local_norm(parameters: Iterable[Tensor], max_norm: float, norm_type: float) -> Tensor:
    """torch's clipping, for strategies under which every rank holds all of every gradient."""
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)
