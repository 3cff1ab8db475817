"""Data parallel on XLA devices: gradients are averaged inside the compiled step.

Those of `Accelerator.backward` are averaged behind it; those of a plain `loss.backward()`, where no backward of ours
comes by, before they are clipped or stepped.

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

import torch.distributed as dist
import torch_xla.core.xla_model as xm
from torch import Tensor, nn
from torch.optim import Optimizer

from nbaccel.core.comm.collectives import broadcast_module
from nbaccel.core.strategies.base import DataAxis, Strategy, clip_local_norm
from nbaccel.core.world import World
from nbaccel.core.xla.lazy import Traced, on_cpu
from nbaccel.errors import ConfigError

__all__ = ["XLA"]


@final
class XLA(Strategy):
    """Every rank holds the model on its XLA device, and the optimizers step with gradients averaged over the ranks."""

    name = "xla"
    replicates = True

    def __init__(self, world: World) -> None:
        self._world = world
        self._local: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        """Models whose next backward stays on its rank, because it does not end a window."""
        self.apart: set[nn.Module] = set()
        """Models within `no_sync`, which accumulation windows inside do not end."""
        self._unshared: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
        """Whether a model has gradients of this rank alone; in the order of wrapping, which is every rank's."""
        self._traced = Traced(world.device)
        self.upload = self._traced.upload

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
            self._unshared[module] = False
            self._note_gradients(module, module.parameters())
        self._traced.watch(module)
        return module, [self.adopt(optimizer) for optimizer in optimizers]

    def adopt(self, optimizer: Optimizer) -> Optimizer:
        if self._world.size > 1:
            optimizer.register_step_pre_hook(self._before_step)
        return self._traced.adopt(optimizer)

    def learns_otherwise(self, module: nn.Module, changed: Sequence[str]) -> None:
        if self._world.size > 1:
            self._note_gradients(module, (p for name, p in module.named_parameters() if name in changed))

    def _note_gradients(self, module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.requires_grad:
                hook = partial(_note, self._unshared, weakref.ref(module))
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def _before_step(self, *_: Any) -> None:
        self._average([module for module, unshared in self._unshared.items() if unshared])

    def set_sync(self, module: nn.Module, synchronize: bool) -> None:
        if synchronize:
            self._local.discard(module)
        else:
            self._local.add(module)

    @contextmanager
    def no_sync(self, module: nn.Module) -> Iterator[None]:
        outermost = module not in self.apart
        self.apart.add(module)
        try:
            yield
        finally:
            if outermost:
                self.apart.discard(module)

    def sync_in_backward(self, module: nn.Module, outputs: list[Tensor]) -> None:
        self.set_sync(module, True)

    def backward(self, loss: Tensor, modules: Sequence[nn.Module], options: Mapping[str, Any]) -> None:
        self._traced.backward(loss, options)
        if self._world.size > 1:
            self._average(modules)

    def _average(self, modules: Sequence[nn.Module]) -> None:
        """Average the gradients over the ranks, but where they are to stay on theirs; of what is equal already (an
        earlier backward of this step) the average is the same."""
        shared = [module for module in modules if module not in self._local and module not in self.apart]
        self._unshared.update(dict.fromkeys(shared, False))
        own = [p for module in shared for p in module.parameters() if p.grad is not None]
        # Copies, which cost nothing once compiled: written in place, what autograd has added up itself is
        # partly read back as it was before.
        grads = [p.grad.detach().clone() for p in own if p.grad is not None]
        if grads:
            xm.all_reduce(xm.REDUCE_SUM, grads, scale=1.0 / self._world.size)
            for parameter, grad in zip(own, grads, strict=True):
                parameter.grad = grad

    def add_over_ranks(self, total: Tensor) -> dist.Work | None:
        if total.device.type == "cpu":
            work: dist.Work | None = dist.all_reduce(total, async_op=True)
            return work
        xm.all_reduce(xm.REDUCE_SUM, [total])  # a part of the step's graph, which nothing has to wait for
        return None

    def join(self, modules: list[nn.Module]) -> AbstractContextManager[Any]:
        if self._world.size > 1:
            raise ConfigError(
                "join_uneven_inputs cannot go with strategy 'xla': every rank runs the same compiled step. Use "
                "even_batches=True."
            )
        return contextlib.nullcontext()

    def clip_grad_norm(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float) -> Tensor:
        self._before_step()
        return clip_local_norm(parameters, max_norm, norm_type)

    def clip_grad_value(self, parameters: Iterable[Tensor], clip_value: float) -> None:
        self._before_step()
        nn.utils.clip_grad_value_(parameters, clip_value)

    def full_state_dict(self, module: nn.Module, *, rank_zero_only: bool) -> dict[str, Any]:
        return on_cpu(module)


def _note(
    unshared: weakref.WeakKeyDictionary[nn.Module, bool], module: weakref.ref[nn.Module], _: Tensor
) -> None:
    """After a gradient was added up. Does not hold the module, whose parameter holds this."""
    there = module()
    if there is not None:
        unshared[there] = True
