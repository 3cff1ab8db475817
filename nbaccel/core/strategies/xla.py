"""Data parallel on XLA devices: gradients are averaged inside the compiled step.

A step is traced, compiled and run as one graph: forward, backward, the all-reduce and the optimizer's step, cut by
one `torch_xla.sync()` after the optimizer. Micro-steps before it add to the same graph. Every rank must trace
the same graph, so a parameter has to be used on all ranks or on none. Sources: torch_xla 2.9
`core/xla_model.py` (`reduce_gradients`, `optimizer_step`).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, final

import torch_xla.core.xla_model as xm
from torch import Tensor, nn
from torch.optim import Optimizer

from nbaccel.core.comm.collectives import broadcast_module
from nbaccel.core.strategies.base import DataAxis, Strategy, clip_local_norm
from nbaccel.core.world import World
from nbaccel.core.xla.lazy import Traced, on_cpu, upload
from nbaccel.errors import ConfigError

__all__ = ["XLA"]


@final
class XLA(Strategy):
    """Every rank holds the model on its XLA device; gradients are averaged at the end of each backward."""

    name = "xla"

    def __init__(self, world: World) -> None:
        self._world = world
        self._local: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        """Models whose next backward stays on its rank."""
        self._traced = Traced(world.device)
        self.upload = partial(upload, device=world.device)

    @property
    def data_axis(self) -> DataAxis:
        return DataAxis(rank=self._world.rank, size=self._world.size)

    def wrap(
        self, module: nn.Module, optimizers: Sequence[Optimizer], *, place: bool
    ) -> tuple[nn.Module, list[Optimizer]]:
        if place:
            self._traced.move(module)
        if self._world.size > 1:
            broadcast_module(module, world=self._world)
        self._traced.watch(module)
        return module, [self.adopt(optimizer) for optimizer in optimizers]

    def adopt(self, optimizer: Optimizer) -> Optimizer:
        return self._traced.adopt(optimizer)

    def set_sync(self, module: nn.Module, synchronize: bool) -> None:
        if synchronize:
            self._local.discard(module)
        else:
            self._local.add(module)

    @contextmanager
    def no_sync(self, module: nn.Module) -> Iterator[None]:
        before = module in self._local
        self.set_sync(module, False)
        try:
            yield
        finally:
            self.set_sync(module, not before)

    def sync_in_backward(self, module: nn.Module, outputs: list[Tensor]) -> None:
        self.set_sync(module, True)

    def backward(self, loss: Tensor, modules: Sequence[nn.Module], options: Mapping[str, Any]) -> None:
        self._traced.backward(loss, options)
        if self._world.size > 1:
            self._average([p for m in modules if m not in self._local for p in m.parameters()])

    def _average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average the gradients over the ranks; of what is equal already (an earlier backward of this step) the
        average is the same."""
        own = [p for p in parameters if p.grad is not None]
        # Copies, which cost nothing once compiled: written in place, what autograd has added up itself is
        # partly read back as it was before.
        grads = [p.grad.detach().clone() for p in own if p.grad is not None]
        if grads:
            xm.all_reduce(xm.REDUCE_SUM, grads, scale=1.0 / self._world.size)
            for parameter, grad in zip(own, grads, strict=True):
                parameter.grad = grad

    def join(self, modules: list[nn.Module]) -> AbstractContextManager[Any]:
        if self._world.size > 1:
            raise ConfigError(
                "join_uneven_inputs cannot go with strategy 'xla': every rank runs the same compiled step. Use "
                "even_batches=True."
            )
        return contextlib.nullcontext()

    def clip_grad_norm(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float) -> Tensor:
        return clip_local_norm(parameters, max_norm, norm_type)

    def full_state_dict(self, module: nn.Module, *, rank_zero_only: bool) -> dict[str, Any]:
        return on_cpu(module)
