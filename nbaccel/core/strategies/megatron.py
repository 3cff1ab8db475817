"""Models made of megatron-core's tensor-parallel layers: gradients averaged over the ranks that have the same part.

megatron-core does the dividing and the talking within a copy of the model, from the process groups that are made here
when the Accelerator is. The model is built after that, by the user, of its layers.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from nbaccel.core.checkpoint import OptimizerState, Sharded
from nbaccel.core.load_model import find_weights, tied_names
from nbaccel.core.sharding.dtensors import combine_norms
from nbaccel.core.sharding.megatron import (
    DividedModelState,
    DividedOptimizerState,
    is_divided,
    part_of,
    whole_shape,
    whole_state_dict,
)
from nbaccel.core.sharding.replicas import set_up_anew
from nbaccel.core.strategies.base import DataAxis, Strategy, trainable
from nbaccel.core.world import World
from nbaccel.errors import ConfigError
from nbaccel.layout import copy_ranks
from nbaccel.parallel import Megatron

__all__ = ["MegatronCore"]


@final
class MegatronCore(Strategy):
    """Copies of a model, each divided over neighbouring ranks by megatron-core."""

    name = "megatron"
    alike = False

    def __init__(self, world: World, *, options: Megatron) -> None:
        size = copy_ranks("megatron", options.size, world.size)
        self._world = world
        groups = _groups(size)
        self._tensor: dist.ProcessGroup = groups.get_tensor_model_parallel_group()
        self._data: dist.ProcessGroup = groups.get_data_parallel_group()

    @property
    def data_axis(self) -> DataAxis:
        return DataAxis(rank=self._data.rank(), size=self._data.size())

    def wrap(
        self, module: nn.Module, optimizers: Sequence[Optimizer], *, place: bool
    ) -> tuple[nn.Module, list[Optimizer]]:
        if isinstance(module, DistributedDataParallel):
            return module, list(optimizers)
        _refuse(module)
        if place:
            module = module.to(self._world.device)
        self._share(module)
        if self._data.size() > 1 and trainable(module):
            module = self._averaging(module)
        return module, list(optimizers)

    def _averaging(self, module: nn.Module) -> DistributedDataParallel:
        return DistributedDataParallel(
            module, process_group=self._data, gradient_as_bucket_view=True, init_sync=False
        )

    def learns_otherwise(self, module: nn.Module, changed: Sequence[str]) -> None:
        if isinstance(module, DistributedDataParallel):
            set_up_anew(module, self._averaging(module.module))
        elif self._data.size() > 1 and trainable(module):
            raise ConfigError(
                f"{changed[0]!r} learns now, and nothing of this model did when it was prepared: its gradients would "
                "not be averaged. Prepare it again, after free_memory()"
            )

    @torch.no_grad()
    def _share(self, module: nn.Module) -> None:
        """The same values in all copies, and within one where its ranks have the whole."""
        for tensor in [*module.parameters(), *module.buffers()]:
            if not is_divided(tensor):
                dist.broadcast(tensor.data, src=dist.get_global_rank(self._tensor, 0), group=self._tensor)
            dist.broadcast(tensor.data, src=dist.get_global_rank(self._data, 0), group=self._data)

    def unwrap(self, module: nn.Module) -> nn.Module:
        return module.module if isinstance(module, DistributedDataParallel) else module

    def set_sync(self, module: nn.Module, synchronize: bool) -> None:
        if isinstance(module, DistributedDataParallel):
            module.require_backward_grad_sync = synchronize

    def no_sync(self, module: nn.Module) -> AbstractContextManager[Any]:
        return module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext()

    def sync_in_backward(self, module: nn.Module, outputs: list[Tensor]) -> None:
        if isinstance(module, DistributedDataParallel):
            module.require_backward_grad_sync = True
            module.require_forward_param_sync = True
            module.reducer.prepare_for_backward([])  # as DDP's forward does when it expects to synchronise

    def join(self, modules: list[nn.Module]) -> AbstractContextManager[Any]:
        raise ConfigError(
            "join_uneven_inputs cannot go with strategy 'megatron', whose ranks compute each step together. Use a "
            "prepared loader, which gives all ranks equally many batches"
        )

    @torch.no_grad()
    def clip_grad_norm(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float) -> Tensor:
        listed = [p for p in parameters if p.grad is not None]
        if not listed:
            return torch.tensor(0.0)
        parts = [p.grad for p in listed if p.grad is not None and is_divided(p)]
        whole = [p.grad for p in listed if p.grad is not None and not is_divided(p)]
        norm = torch.nn.utils.get_total_norm(parts, norm_type).float().to(self._world.device)
        norms = [combine_norms(norm, norm_type, [self._tensor])]
        norms.append(torch.nn.utils.get_total_norm(whole, norm_type).float().to(self._world.device))
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
        torch.nn.utils.clip_grads_with_norm_(listed, max_norm, total)
        return total

    def full_state_dict(self, module: nn.Module, *, rank_zero_only: bool) -> dict[str, Any]:
        whole = whole_state_dict(self.unwrap(module), self._tensor)
        return whole if self._world.is_main or not rank_zero_only else {}

    @torch.no_grad()
    def load_weights(self, module: nn.Module, folder: str | Path, *, strict: bool) -> str:
        inner = self.unwrap(module)
        state = inner.state_dict(keep_vars=True)
        own = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        shapes = {name: whole_shape(value, self._tensor) for name, value in own.items()}
        found = find_weights(shapes, tied_names(inner), folder, strict=strict)
        for name in found.names:
            value = torch.empty(shapes[name], dtype=found.dtype(name))
            found.read({name: value})
            own[name].copy_(part_of(value, own[name], self._tensor))
        return found.said

    def model_state(self, module: nn.Module) -> Sharded:
        return DividedModelState(self.unwrap(module), self._tensor)

    def optimizer_state(self, optimizer: Optimizer, modules: Sequence[nn.Module]) -> Sharded:
        if len(modules) != 1:
            return OptimizerState(optimizer, [self.unwrap(module) for module in modules])
        return DividedOptimizerState(optimizer, self.unwrap(modules[0]), self._tensor)


def _groups(size: int) -> Any:
    """megatron-core's process groups, made anew: those of an earlier run of a session are gone."""
    try:
        groups = importlib.import_module("megatron.core.parallel_state")
    except ImportError as error:
        raise ConfigError(f"strategy 'megatron' needs pip install megatron-core ({error})") from error
    if groups.model_parallel_is_initialized():
        groups.destroy_model_parallel()
    groups.initialize_model_parallel(tensor_model_parallel_size=size)
    return groups


def _refuse(module: nn.Module) -> None:
    if not any(is_divided(p) for p in module.parameters()):
        raise ConfigError(
            f"strategy 'megatron' divides nothing of a {type(module).__name__}, which has none of megatron-core's "
            "tensor-parallel layers: build it of them after the Accelerator, or use strategy=TensorParallel(...)"
        )
    for name, inner in module.named_modules():
        config = getattr(inner, "config", None)
        for option, why in _UNTRIED.items():
            if getattr(config, option, False):
                place = name or type(module).__name__
                raise ConfigError(f"{place}: {option} cannot go with strategy 'megatron': {why}")


_UNTRIED = {
    "sequence_parallel": "gradients of what every rank has whole would have to be added up; leave it off",
    "gated_linear_unit": "its two halves are stored so that another number of ranks would read them wrongly",
    "gradient_accumulation_fusion": "it needs CUDA kernels and keeps gradients elsewhere",
}
"""Options of megatron-core's configuration."""
