"""fp16's gradient scaler among several optimizers: whose gradients are still scaled, and when the scale changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from nbaccel.errors import ConfigError

__all__ = ["Scaling"]


@final
class Scaling:
    """Scales losses, and takes the scale off each optimizer's gradients once between two changes of it."""

    def __init__(self, scaler: torch.amp.GradScaler, rank: int) -> None:
        self.scaler = scaler
        self._rank = rank
        self._unscaled: dict[int, Optimizer] = {}
        self._update_due = False

    @contextmanager
    def scaled(self, loss: Tensor) -> Iterator[Tensor]:
        """The scaled loss, for a backward inside the context.

        Raises:
            ConfigError: it added to gradients that the scale was taken off already.
        """
        self.update()
        added: list[str] = []
        hooks = [
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                partial(_note, added, type(optimizer).__name__)
            )
            for optimizer in self._unscaled.values()
            for parameter in _parameters(optimizer)
            if parameter.requires_grad
        ]
        try:
            yield self.scaler.scale(loss)
        finally:
            for hook in hooks:
                hook.remove()
        if added:
            raise ConfigError(
                f"backward on rank {self._rank} has added gradients with fp16's scale to those that the "
                f"{added[0]} optimizer is to step, which the scale was taken off by clipping or "
                "unscale_gradients. Make every backward of an optimizer before its gradients are clipped; where a "
                "step is left out, call the optimizer's zero_grad()"
            )

    def unscale(self, optimizers: Sequence[Optimizer], parameters: Sequence[Tensor] | None = None) -> None:
        """Takes the scale off the gradients of these optimizers; with `parameters`, of those that hold any of them."""
        if parameters is not None and len(optimizers) > 1:
            given = {id(parameter) for parameter in parameters}
            # All, where a strategy steps others than the model's own.
            optimizers = [o for o in optimizers if any(id(p) in given for p in _parameters(o))] or optimizers
        for optimizer in optimizers:
            # One without gradients gets them in another backward, which scales them.
            has_any = any(parameter.grad is not None for parameter in _parameters(optimizer))
            if has_any and id(optimizer) not in self._unscaled:
                self.scaler.unscale_(optimizer)
                self._unscaled[id(optimizer)] = optimizer

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
        """The optimizer's step, unless its gradients have overflown."""
        result = self.scaler.step(optimizer, *([] if closure is None else [closure]))
        self._update_due = True
        return result

    def zeroed(self, optimizer: Optimizer) -> None:
        """Its gradients are gone, perhaps without a step: the next ones are scaled."""
        self._update_due |= id(optimizer) in self._unscaled

    def update(self) -> None:
        """The change of scale that is due, if one is: late, when all optimizers have stepped, for it forgets whose
        gradients were unscaled."""
        if self._update_due:
            self._update_due = False
            self._unscaled.clear()
            self.scaler.update()

    def drop(self) -> None:
        """Gradients that were unscaled, and were to be stepped, are not."""
        self._update_due |= bool(self._unscaled)
        self.update()


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _note(added: list[str], name: str, _: Tensor) -> None:
    added.append(name)
