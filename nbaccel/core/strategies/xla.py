"""Data parallel on XLA devices: gradients are averaged inside the compiled step.

A step is traced, compiled and run as one graph: forward, backward, the all-reduce and the optimizer's step, cut by
one `torch_xla.sync()` after the optimizer. Micro-steps before it add to the same graph. Every rank must trace
the same graph, so a parameter has to be used on all ranks or on none. Sources: torch_xla 2.9
`core/xla_model.py` (`reduce_gradients`, `optimizer_step`), docs on tied weights (`.to` makes new parameters).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, final

import torch
import torch_xla
import torch_xla.core.xla_model as xm
from torch import Tensor, nn
from torch.optim import Optimizer

from nbaccel.core.checkpoint import ModelState, OptimizerState, Sharded
from nbaccel.core.collectives import broadcast_module
from nbaccel.core.strategies.base import DataAxis, Strategy, clip_local_norm, scale_whole_gradients
from nbaccel.core.tied import find_tied_parameters, retie_parameters
from nbaccel.core.world import World
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
        self._moved: dict[int, tuple[Tensor, nn.Parameter]] = {}
        """The parameter on the device for each of the user's, which is kept so that its id stays its own."""
        self._cut: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    @property
    def data_axis(self) -> DataAxis:
        return DataAxis(rank=self._world.rank, size=self._world.size)

    def wrap(
        self, module: nn.Module, optimizers: Sequence[Optimizer], *, place: bool
    ) -> tuple[nn.Module, list[Optimizer]]:
        if place:
            self._moved.update(_move(module, self._world.device))
        if self._world.size > 1:
            broadcast_module(module, world=self._world)
        torch_xla.sync()
        return module, [self.adopt(optimizer) for optimizer in optimizers]

    def adopt(self, optimizer: Optimizer) -> Optimizer:
        self._point_at_moved(optimizer)
        if optimizer not in self._cut:
            self._cut.add(optimizer)
            optimizer.register_step_post_hook(_cut_graph)
        return optimizer

    def _point_at_moved(self, optimizer: Optimizer) -> None:
        """Let it step the parameters that are on the device, in place of those it was made with."""
        for group in optimizer.param_groups:
            for at, parameter in enumerate(group["params"]):
                if id(parameter) in self._moved:
                    group["params"][at] = moved = self._moved[id(parameter)][1]
                    state = optimizer.state.pop(parameter, {})
                    if state:
                        optimizer.state[moved] = {key: _beside(value, moved) for key, value in state.items()}

    def unwrap(self, module: nn.Module) -> nn.Module:
        return module

    def set_sync(self, module: nn.Module, synchronize: bool) -> None:
        if synchronize:
            self._local.discard(module)
        else:
            self._local.add(module)

    def no_sync(self, module: nn.Module) -> AbstractContextManager[Any]:
        return self._kept_local(module)

    @contextmanager
    def _kept_local(self, module: nn.Module) -> Iterator[None]:
        before = module in self._local
        self.set_sync(module, False)
        try:
            yield
        finally:
            self.set_sync(module, not before)

    def sync_in_backward(self, module: nn.Module, outputs: list[Tensor]) -> None:
        self.set_sync(module, True)

    def backward(self, loss: Tensor, modules: Sequence[nn.Module], options: Mapping[str, Any]) -> None:
        loss.backward(**options)  # type: ignore[no-untyped-call]
        if self._world.size == 1:
            return
        grads = [
            p.grad for m in modules if m not in self._local for p in m.parameters() if p.grad is not None
        ]
        if grads:
            # an average of what is equal already (an earlier backward of this step) changes nothing
            xm.all_reduce(xm.REDUCE_SUM, grads, scale=1.0 / self._world.size)

    def scale_gradients(self, modules: Sequence[nn.Module], ratio: float | Tensor) -> None:
        scale_whole_gradients(modules, ratio)

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
        return {name: value.cpu() for name, value in module.state_dict().items()}

    def model_state(self, module: nn.Module) -> Sharded:
        return ModelState(module)

    def optimizer_state(self, optimizer: Optimizer, modules: Sequence[nn.Module]) -> Sharded:
        return OptimizerState(optimizer, modules)


def _move(module: nn.Module, device: torch.device) -> dict[int, tuple[Tensor, nn.Parameter]]:
    """Move a module in place, its ties kept; each new parameter by the id of the old one, with that one."""
    tied, old = find_tied_parameters(module), dict(module.named_parameters())
    module.to(device)
    retie_parameters(module, tied)
    new = dict(module.named_parameters())
    return {
        id(parameter): (parameter, new[name]) for name, parameter in old.items() if new[name] is not parameter
    }


def _beside(value: Any, parameter: nn.Parameter) -> Any:
    """A part of an optimizer's state where its parameter is; step counts stay on the CPU."""
    moves = isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim > 0
    return value.to(parameter.device) if moves else value


def _cut_graph(*_: Any) -> None:
    """Compile and run what was traced; the host goes on at once."""
    torch_xla.sync()
