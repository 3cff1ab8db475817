"""One process for all devices of the host: arrays are sharded over a mesh, and XLA divides the computation (SPMD).

The user's program is that of one process with the batch of all devices. Each parameter is sharded along its longest
dimension that divides by the number of devices, as under FSDP, and so are its gradient and the optimizer's state;
batches are sharded along their first dimension. Where a layer needs a parameter whole, or gradients their sum, XLA's
partitioner puts the collective. Sources: torch_xla 2.9 `distributed/spmd`; Xu et al. 2021, "GSPMD".
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, final

import torch_xla
from torch import Tensor, nn
from torch.optim import Optimizer

from nbaccel.core.model.hooks import Hook
from nbaccel.core.nested import leaves
from nbaccel.core.strategies.base import DataAxis, Strategy, clip_local_norm
from nbaccel.core.world import World
from nbaccel.core.xla.lazy import Traced, on_cpu

__all__ = ["XLASharded"]

_AXIS = "devices"


@final
class XLASharded(Strategy):
    """Parameters and batches are sharded over the process's XLA devices."""

    name = "xla"

    def __init__(self, world: World) -> None:
        spmd: Any = importlib.import_module("torch_xla.distributed.spmd")
        numpy: Any = importlib.import_module("numpy")
        self._num_devices = int(torch_xla._XLAC._xla_num_runtime_devices())
        self._mesh = spmd.Mesh(numpy.arange(self._num_devices), (self._num_devices,), (_AXIS,))
        self._spmd = spmd
        self._traced = Traced(world.device)
        self.upload = self._upload_shards

    @property
    def data_axis(self) -> DataAxis:
        return DataAxis(rank=0, size=1)

    def wrap(
        self, module: nn.Module, optimizers: Sequence[Optimizer], *, place: bool
    ) -> tuple[nn.Module, list[Optimizer]]:
        if place:
            self._traced.move(module)
        for parameter in module.parameters():
            self._shard(parameter, _longest(parameter, self._num_devices))
        module.register_forward_pre_hook(Hook(self._shard_batch), with_kwargs=True)
        self._traced.watch(module)
        return module, [self.adopt(optimizer) for optimizer in optimizers]

    def _shard_batch(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """What no loader of ours has brought, or what was computed since; the same again is no work."""
        for _, leaf in leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.device.type == "xla":
                self._shard(leaf, self._batch_dim(leaf))

    def _batch_dim(self, tensor: Tensor) -> int | None:
        """The first, where it divides by the number of devices."""
        return 0 if tensor.ndim and tensor.shape[0] % self._num_devices == 0 else None

    def _shard(self, tensor: Tensor, dim: int | None) -> None:
        """`dim` None: every device holds all of it."""
        if dim is not None:
            self._spmd.mark_sharding(tensor, self._mesh, _along(dim, tensor.ndim))

    def _upload_shards(self, tensors: list[Tensor]) -> list[Tensor]:
        return self._traced.upload(tensors, [self._sharding(t, self._batch_dim(t)) for t in tensors])

    def _sharding(self, tensor: Tensor, dim: int | None) -> Any:
        if dim is None:
            return None
        return self._spmd.ShardingSpec(self._mesh, _along(dim, tensor.ndim)).xla_spec(tensor)

    def adopt(self, optimizer: Optimizer) -> Optimizer:
        return self._traced.adopt(optimizer)

    def set_sync(self, module: nn.Module, synchronize: bool) -> None:
        pass

    def no_sync(self, module: nn.Module) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def sync_in_backward(self, module: nn.Module, outputs: list[Tensor]) -> None:
        pass

    def backward(self, loss: Tensor, modules: Sequence[nn.Module], options: Mapping[str, Any]) -> None:
        self._traced.backward(loss, options)

    def join(self, modules: list[nn.Module]) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def clip_grad_norm(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float) -> Tensor:
        return clip_local_norm(parameters, max_norm, norm_type)

    def full_state_dict(self, module: nn.Module, *, rank_zero_only: bool) -> dict[str, Any]:
        return on_cpu(module)


def _along(dim: int, ndim: int) -> tuple[str | None, ...]:
    """torch_xla's word for: sharded along `dim`, whole along the others."""
    return tuple(_AXIS if at == dim else None for at in range(ndim))


def _longest(tensor: Tensor, parts: int) -> int | None:
    """The longest dimension that divides into `parts`; None without one."""
    fitting = [dim for dim, size in enumerate(tensor.shape) if size and size % parts == 0]
    return max(fitting, key=lambda dim: tensor.shape[dim], default=None)
