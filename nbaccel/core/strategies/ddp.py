"""DistributedDataParallel: the whole model on every rank, gradients averaged during backward."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast, final
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from nbaccel.core.comm.collectives import broadcast_module
from nbaccel.core.model.composed import share_composed
from nbaccel.core.sharding.replicas import set_up_anew
from nbaccel.core.strategies.base import (
    DataAxis,
    Strategy,
    clip_local_norm,
    refuse_divided,
    trainable,
)
from nbaccel.core.world import World
from nbaccel.errors import ConfigError
from nbaccel.parallel import DDPOptions

__all__ = ["DDP", "DDPOptions"]

# torch 2.13 renamed it.
_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


@final
class DDP(Strategy):
    """Every rank holds the model; backward averages gradients over the ranks."""

    name = "ddp"
    replicates = True

    def __init__(self, world: World, *, options: DDPOptions, accumulates: bool) -> None:
        if options.static_graph and accumulates:
            raise ConfigError(
                "static_graph=True cannot go with gradient_accumulation_steps above 1: torch fails when the "
                "first backward does not synchronise. Leave static_graph off."
            )
        self._world = world
        self._options = options
        self.apart: set[nn.Module] = set()
        self._wrapped: WeakSet[DistributedDataParallel] = WeakSet()
        self._retained = False
        """Whether the last backward has left its graph to another one."""

    @property
    def data_axis(self) -> DataAxis:
        return DataAxis(rank=self._world.rank, size=self._world.size)

    def wrap(
        self, module: nn.Module, optimizers: Sequence[Optimizer], *, place: bool
    ) -> tuple[nn.Module, list[Optimizer]]:
        return self._wrap(module, place), list(optimizers)

    def _wrap(self, module: nn.Module, place: bool) -> nn.Module:
        if isinstance(module, DistributedDataParallel):
            return module
        refuse_divided(module.named_parameters(), self.name)
        if place:
            module = module.to(self._world.device)
        if not trainable(module):
            broadcast_module(module, world=self._world)
            return module
        share_composed(module, self._world)
        wrapped = self._made_of(module, place=place, share=True, views=self._may_view(module))
        self._wrapped.add(wrapped)
        return wrapped

    def _may_view(self, module: nn.Module) -> bool:
        """Whether the gradients of `module` can lie in buckets of its own. Those of parameters that it shares with a
        model wrapped before cannot, and are taken out of the other's."""
        own = set(module.parameters())
        others = [one for one in self._wrapped if not own.isdisjoint(one.parameters())]
        for other in others:
            if other.gradient_as_bucket_view:
                place = bool(other.device_ids)
                set_up_anew(other, self._made_of(other.module, place=place, share=False, views=False))
        return self._options.gradient_as_bucket_view and not others

    def _made_of(
        self, module: nn.Module, *, place: bool, share: bool, views: bool
    ) -> DistributedDataParallel:
        options = self._options
        indexed = self._world.device.type != "cpu" and place
        # torch 2.13 warns whoever names an old option, its default too
        rare: dict[str, Any] = {} if options.broadcast_buffers else {_BUFFERS: False}
        wrapped = DistributedDataParallel(
            module,
            device_ids=[self._world.device] if indexed else None,
            **rare,
            bucket_cap_mb=options.bucket_cap_mb,
            find_unused_parameters=options.find_unused_parameters,
            static_graph=options.static_graph,
            gradient_as_bucket_view=views,
            init_sync=share,
        )
        _register_hook(wrapped, options)
        return wrapped

    def learns_otherwise(self, module: nn.Module, changed: Sequence[str]) -> None:
        if isinstance(module, DistributedDataParallel):
            # buffers that are each rank's own stay so
            fresh = self._made_of(
                module.module,
                place=bool(module.device_ids),
                share=self._options.broadcast_buffers,
                views=module.gradient_as_bucket_view,
            )
            set_up_anew(module, fresh)
        elif trainable(module):
            raise ConfigError(
                f"{changed[0]!r} learns now, and nothing of this model did when it was prepared: DDP was not put "
                "around it. Prepare it again, after free_memory()"
            )

    def unwrap(self, module: nn.Module) -> nn.Module:
        return module.module if isinstance(module, DistributedDataParallel) else module

    def set_sync(self, module: nn.Module, synchronize: bool) -> None:
        if isinstance(module, DistributedDataParallel) and module not in self.apart:
            # What DDP.no_sync sets, without making a context manager in every micro-step.
            module.require_backward_grad_sync = synchronize

    def no_sync(self, module: nn.Module) -> AbstractContextManager[Any]:
        if not isinstance(module, DistributedDataParallel):
            return contextlib.nullcontext()
        if self._options.static_graph:
            raise ConfigError("no_sync cannot go with static_graph=True; leave static_graph off")
        return self._part(module)

    @contextlib.contextmanager
    def _part(self, module: DistributedDataParallel) -> Iterator[None]:
        """torch's `no_sync`, which accumulation windows inside do not end."""
        outermost = module not in self.apart
        with module.no_sync():
            self.apart.add(module)
            try:
                yield
            finally:
                if outermost:
                    self.apart.discard(module)

    def sync_in_backward(self, module: nn.Module, outputs: list[Tensor]) -> None:
        if isinstance(module, DistributedDataParallel) and module not in self.apart:
            module.require_backward_grad_sync = True
            module.require_forward_param_sync = True
            # What DDP's forward does when it expects to synchronise; this one had run without.
            module.reducer.prepare_for_backward(outputs if self._options.find_unused_parameters else [])

    def backward(self, loss: Tensor, modules: Sequence[nn.Module], options: Mapping[str, Any]) -> None:
        if self._retained:
            for module in modules:
                if isinstance(module, DistributedDataParallel) and module.require_backward_grad_sync:
                    _expect_another(module.reducer, loss)
        self._retained = bool(options.get("retain_graph") or options.get("create_graph"))
        loss.backward(**options)  # type: ignore[no-untyped-call]

    def join(self, modules: list[nn.Module]) -> AbstractContextManager[Any]:
        from torch.distributed.algorithms.join import Join

        joinable: list[Any] = [m for m in modules if isinstance(m, DistributedDataParallel)]
        return Join(joinable) if joinable else contextlib.nullcontext()

    def clip_grad_norm(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float) -> Tensor:
        return clip_local_norm(parameters, max_norm, norm_type)

    def full_state_dict(self, module: nn.Module, *, rank_zero_only: bool) -> dict[str, Any]:
        return self.unwrap(module).state_dict()


def _expect_another(reducer: Any, loss: Tensor) -> None:
    """Lets a backward average its gradients although the one before it on the same forward has done so: torch averages
    in one backward for each forward, and those of another would stay on their rank."""
    try:
        reducer._rebuild_buckets()  # as before a forward: what the first backward ever has noted is for one
    except RuntimeError:  # the backward before has reached a part only, and this one brings the rest
        return
    reducer.prepare_for_backward([loss])


def _register_hook(module: DistributedDataParallel, options: DDPOptions) -> None:
    if options.comm_hook in ("fp16", "bf16"):
        dtype = torch.float16 if options.comm_hook == "fp16" else torch.bfloat16
        module.register_comm_hook(dtype, _send_as)
    elif options.comm_hook == "power_sgd":
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

        state = powerSGD_hook.PowerSGDState(
            process_group=None,
            matrix_approximation_rank=options.power_sgd_rank,
            start_powerSGD_iter=max(2, options.power_sgd_start),
        )
        module.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


# No postponed annotation: DDP compares the hook's with the classes themselves.
def _send_as(dtype: torch.dtype, bucket):  # type: ignore[no-untyped-def]
    """Averages a bucket in `dtype`. torch's own bf16 hook wants CUDA; this one serves every backend."""
    buffer = bucket.buffer()
    sent = buffer.to(dtype).div_(dist.get_world_size())
    future = dist.all_reduce(sent, async_op=True).get_future()

    def widen(done: torch.futures.Future[Any]) -> Tensor:
        value = done.value()
        buffer.copy_(value[0] if isinstance(value, list) else value)
        return cast(Tensor, buffer)

    return future.then(widen)
