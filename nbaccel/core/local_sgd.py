"""LocalSGD: ranks train on their own for some optimizer steps, then average their parameters.

Gradients never travel; every `local_sgd_steps` steps the parameters do, once (Stich, "Local SGD Converges Fast
and Communicates Little", arXiv:1805.09767). Ranks still take equally many steps, and agree on stops and saves
at one of them as ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor, nn

from nbaccel.core.accelerator import Accelerator
from nbaccel.errors import ConfigError

__all__ = ["LocalSGD"]

_BUCKET = 2**25  # bytes averaged at once


@final
class LocalSGD:
    """A block in which `model`'s gradients stay on their rank and its parameters are averaged instead.

        with LocalSGD(accelerator=acc, model=model, local_sgd_steps=8) as local_sgd:
            for batch in loader:
                ...
                optimizer.step()
                local_sgd.step()

    A `save_state` inside averages first, the optimizers' state too, so that what is saved is one model and a run
    that goes on from it is the one that was not interrupted. The end of the block averages once more, unless an
    exception ends it: the other ranks may not come.

    Args:
        model: as `prepare` gave it back.
        local_sgd_steps: optimizer steps from one average to the next.
        enabled: False trains as without.

    Raises:
        ConfigError: the strategy does not leave the whole model on every rank; fp16, whose overflows would let
            ranks take different numbers of steps; a count below 1.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, local_sgd_steps: int, enabled: bool = True
    ) -> None:
        if isinstance(local_sgd_steps, bool) or not isinstance(local_sgd_steps, int) or local_sgd_steps < 1:
            raise ConfigError(f"local_sgd_steps is {local_sgd_steps!r}; it must be an int of at least 1")
        if enabled and accelerator.use_distributed and not accelerator.strategy.replicates:
            raise ConfigError(
                f"LocalSGD cannot go with strategy {accelerator.strategy.name!r}: ranks that hold parts of one model "
                "cannot train apart; use strategy 'ddp'"
            )
        if enabled and accelerator.mixed_precision == "fp16":
            raise ConfigError(
                "LocalSGD cannot go with mixed_precision='fp16': ranks skip steps that overflow, each its own; use "
                "'bf16'"
            )
        self._accelerator, self._model, self._every = accelerator, model, local_sgd_steps
        self._enabled = enabled and accelerator.use_distributed
        self._stack = ExitStack()
        self._local_steps = 0
        """Optimizer steps since the last average."""

    def __enter__(self) -> LocalSGD:
        if self._enabled:
            self._stack.enter_context(self._accelerator.no_sync(self._model))
            hook = self._accelerator.register_save_state_pre_hook(self._before_save)
            self._stack.callback(hook.remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._stack:
            if self._enabled and kind is None and self._local_steps:
                self._average()

    def step(self) -> None:
        """After `optimizer.step()`, in every micro-step and on every rank; averages when it is time."""
        if not (self._enabled and self._accelerator.sync_gradients):
            return
        self._local_steps += 1
        if self._local_steps == self._every:
            self._average()

    def _average(self) -> None:
        self._local_steps = 0
        self._share([p for p in self._model.parameters() if p.requires_grad])

    def _before_save(self, *_: Any) -> None:
        self._average()
        for optimizer in self._accelerator.optimizers:
            held = [p for group in optimizer.param_groups for p in group["params"]]
            self._share([v for p in held for v in optimizer.state.get(p, {}).values() if _is_moment(v)])

    @torch.no_grad()
    def _share(self, tensors: Iterable[Tensor]) -> None:
        """Puts the mean over the ranks into each."""
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            means = self._accelerator.reduce(flat, "mean").split([tensor.numel() for tensor in bucket])
            for tensor, mean in zip(bucket, means, strict=True):
                tensor.copy_(mean.view_as(tensor))


def _is_moment(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device that travel together."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        alike = not bucket or (tensor.dtype, tensor.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (size + tensor.nbytes > _BUCKET or not alike):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
