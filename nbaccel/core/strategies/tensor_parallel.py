"""Tensor parallelism alone: every rank sees the same data and computes a part of each layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, final

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from nbaccel.core.model.composed import refuse_composed
from nbaccel.core.model.materialise import materialise
from nbaccel.core.sharding.dtensors import (
    clip_sharded_norm,
    clip_sharded_value,
    gather_state_dict,
    lay_out_loaded,
    point_optimizer,
    present,
    refuse_hooks,
    refuse_undivided,
    share_values,
)
from nbaccel.core.sharding.tensor_plan import divide, draw_alike, styles_of
from nbaccel.core.strategies.base import DataAxis, Strategy
from nbaccel.core.world import World
from nbaccel.errors import ConfigError
from nbaccel.parallel import TensorParallel

__all__ = ["TensorParallelism"]


@final
class TensorParallelism(Strategy):
    """All ranks share one copy of the model; gradients need no averaging, for there is one batch."""

    name = "tensor_parallel"

    def __init__(self, world: World, *, options: TensorParallel) -> None:
        self._world, self._options = world, options
        self._mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("tensor",))
        self._replaced = WeakTensorKeyDictionary()
        """The divided parameter of each that the user's optimizers may still hold."""

    @property
    def data_axis(self) -> DataAxis:
        return DataAxis(rank=0, size=1)

    def wrap(
        self, module: nn.Module, optimizers: Sequence[Optimizer], *, place: bool
    ) -> tuple[nn.Module, list[Optimizer]]:
        if any(isinstance(p, DTensor) for p in module.parameters()):
            self._refuse_half_divided(module)
            return module, list(optimizers)
        refuse_composed(module, self.name)
        for optimizer in optimizers:
            refuse_undivided(optimizer, self.name)
        styles = styles_of(module, self._options, self._world.size)
        parts = [(name, one) for name, one in module.named_modules() if one in styles]
        refuse_hooks(
            ((f"{name}.{own}", p) for name, one in parts for own, p in one.named_parameters()), self.name
        )
        before = dict(module.named_parameters(remove_duplicate=False))
        materialise(module, module, self._world.device)
        share_values(module.modules(), self._world)
        draw_alike(self._mesh)
        divide(module.modules(), styles, module, self._mesh)
        after = dict(module.named_parameters(remove_duplicate=False))
        self._replaced.update({old: after[name] for name, old in before.items() if old is not after[name]})
        for optimizer in optimizers:
            point_optimizer(optimizer, self._replaced)
        for one in module.modules():
            one.register_load_state_dict_pre_hook(lay_out_loaded)  # type: ignore[no-untyped-call]
        return module, list(optimizers)

    def _refuse_half_divided(self, module: nn.Module) -> None:
        """What is divided already, by this strategy or the user, is taken as it is, if it is all that a plan names."""
        if isinstance(self._options.plan, str):
            return
        styles = styles_of(module, self._options, self._world.size)
        for name, parameter in module.named_parameters():
            owner = module.get_submodule(name.rpartition(".")[0])
            if owner in styles and not isinstance(parameter, DTensor):
                raise ConfigError(
                    f"{name} is to be divided by the plan, and is not, where other parameters of the model are divided "
                    "already: give prepare a model of which nothing is, or of which all is that the plan names"
                )

    def adopt(self, optimizer: Optimizer) -> Optimizer:
        point_optimizer(optimizer, self._replaced)
        if any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"]):
            refuse_undivided(optimizer, self.name)
        return optimizer

    def forget(self) -> None:
        self._replaced = WeakTensorKeyDictionary()

    def set_sync(self, module: nn.Module, synchronize: bool) -> None:
        pass

    def no_sync(self, module: nn.Module) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def sync_in_backward(self, module: nn.Module, outputs: list[Tensor]) -> None:
        pass

    def join(self, modules: list[nn.Module]) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def clip_grad_norm(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float) -> Tensor:
        return clip_sharded_norm(present(parameters, self._replaced), max_norm, norm_type)

    def clip_grad_value(self, parameters: Iterable[Tensor], clip_value: float) -> None:
        clip_sharded_value(present(parameters, self._replaced), clip_value)

    def full_state_dict(self, module: nn.Module, *, rank_zero_only: bool) -> dict[str, Any]:
        return gather_state_dict(module, keep=self._world.is_main or not rank_zero_only)
