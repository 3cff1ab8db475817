"""FSDP2: parameters, gradients and optimizer state in shards, gathered block by block where they are used."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, final
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from nbaccel.core.model.blocks import find_blocks, keep_ties_together, owners
from nbaccel.core.model.composed import refuse_composed
from nbaccel.core.model.materialise import give_back_memory, materialise
from nbaccel.core.model.recompute import recompute_in_backward
from nbaccel.core.sharding.context import make_context_mesh
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
from nbaccel.core.strategies.base import DataAxis, Strategy, refuse_divided
from nbaccel.core.world import World
from nbaccel.errors import ConfigError
from nbaccel.layout import context_ranks, shard_ranks, tensor_ranks
from nbaccel.parallel import FSDP

__all__ = ["FullyShardedDataParallel"]


@final
class FullyShardedDataParallel(Strategy):
    """Each rank keeps its shard of everything; modules are changed in place.

    Args:
        dtype: what the mixed precision computes in; None for float32.
    """

    name = "fsdp"

    def __init__(
        self,
        world: World,
        *,
        options: FSDP,
        dtype: torch.dtype | None,
    ) -> None:
        self._world, self._options, self._tensor = world, options, options.tensor_parallel
        tensor_size = 1 if self._tensor is None else tensor_ranks(self._tensor, world.size)
        share = tensor_size
        if options.context_parallel is not None:
            size = context_ranks(options.context_parallel.size, world.size, tensor_size)
            self.context_mesh = make_context_mesh(world, size, tensor_size)
            share *= size
        self._axis = DataAxis(rank=world.rank // share, size=world.size // share)
        self._mesh, self._tensor_mesh = _make_meshes(world, options, tensor_size)
        self._policy = _policy(options, dtype)
        self._replaced = WeakTensorKeyDictionary()
        """The sharded parameter of each that the user's optimizers may still hold."""
        self._parts: list[FSDPModule] = []
        """What is gathered at a time, of all models."""
        self._shards: dict[Tensor, str] = {}
        """The sharded parameters of all models with their names; a gathered module names whole ones in their place."""
        self._watched: WeakSet[Optimizer] = WeakSet()
        """Optimizers before whose steps nothing stays gathered."""

    @property
    def data_axis(self) -> DataAxis:
        return self._axis

    def wrap(
        self, module: nn.Module, optimizers: Sequence[Optimizer], *, place: bool
    ) -> tuple[nn.Module, list[Optimizer]]:
        if isinstance(module, FSDPModule):
            return module, list(optimizers)
        if not place and self._world.device.type != "cpu":
            raise ConfigError(
                "device_placement=False cannot go with strategy 'fsdp', whose shards lie on the device"
            )
        self._refuse_shared(module)
        refuse_divided(module.named_parameters(), self.name)
        refuse_composed(module, self.name)
        for optimizer in optimizers:
            refuse_undivided(optimizer, self.name)
        styles: dict[nn.Module, ParallelStyle] = {}
        if self._tensor is not None and self._tensor_mesh is not None:
            styles = styles_of(module, self._tensor, self._tensor_mesh.size())
            draw_alike(self._tensor_mesh)
        blocks = self._blocks(module)
        parts = [*self._norms(module), *reversed(blocks), *self._embeddings(module, blocks), module]
        parts = list(dict.fromkeys(parts))
        refuse_hooks(module.named_parameters(), self.name)
        _refuse_unfit(module, parts)
        for part in parts:
            self._shard(part, module, styles, optimizers)
            give_back_memory()
        self._follow(module, parts, optimizers)
        if self._options.activation_checkpointing:
            for block in blocks or [module]:
                recompute_in_backward(block)
        self._prefetch(blocks)
        if callable(getattr(module, "generate", None)):
            # It may call what is in the model and never the model itself, as an adapter's does, or an encoder first.
            register_fsdp_forward_method(module, "generate")
        return module, list(optimizers)

    def adopt(self, optimizer: Optimizer) -> Optimizer:
        point_optimizer(optimizer, self._replaced)
        if any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"]):
            refuse_undivided(optimizer, self.name)
            self._watch(optimizer)
        return optimizer

    def forget(self) -> None:
        self._replaced = WeakTensorKeyDictionary()
        self._parts.clear()
        self._shards.clear()

    # What torch leaves gathered ----------------------------------------------------------------------

    def _follow(self, module: nn.Module, parts: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> None:
        """After a forward torch leaves the root gathered (every part, if `sharding` says so) for the backward that
        follows. If none does, as in an evaluation, later forwards would compute with the weights of before a step,
        and the module's parameters would be whole ones, which have no gradients."""
        self._parts += [part for part in parts if isinstance(part, FSDPModule)]
        self._shards.update({shard: name for name, shard in module.named_parameters()})
        module.register_forward_hook(self._after_forward)
        for one in module.modules():
            one.register_load_state_dict_pre_hook(self._before_loading)  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            self._watch(optimizer)

    def _before_loading(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        self._reshard()
        lay_out_loaded(module, state, prefix)

    def _watch(self, optimizer: Optimizer) -> None:
        if optimizer not in self._watched:
            self._watched.add(optimizer)
            optimizer.register_step_pre_hook(self._reshard)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_forward(self, *_: Any) -> None:
        # Where no gradients wait for a step, what is gathered stays right: `generate` need not gather it per token.
        if not torch.is_grad_enabled() and any(shard.grad is not None for shard in self._shards):
            self._reshard()

    def _reshard(self, *_: Any) -> None:
        for part in self._parts:
            part.reshard()

    def _refuse_shared(self, module: nn.Module) -> None:
        self._reshard()  # a gathered module names whole parameters, not the shards that are looked for
        for name, parameter in module.named_parameters():
            if parameter in self._shards:
                raise ConfigError(
                    f"{name} is a parameter of another model that was prepared before, and strategy 'fsdp' gathers a "
                    "parameter for one model only: put both into one module whose forward calls them, or use strategy "
                    "'ddp'"
                )

    # What is gathered together -----------------------------------------------------------------------

    def _blocks(self, module: nn.Module) -> list[nn.Module]:
        found = find_blocks(module, self._options.wrap)
        kept = keep_ties_together(module, found)
        if len(kept) < len(found) and self._world.is_main:
            warnings.warn(
                f"{len(found) - len(kept)} of {len(found)} blocks share parameters with what is outside them and are "
                "gathered with the rest of the model. Choose blocks (wrap=) that hold all places of a tied parameter.",
                stacklevel=2,
            )
        return kept

    def _embeddings(self, module: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
        """What a Hugging Face model embeds its inputs and outputs with, unless that is small beside a block: gathered
        with the rest of the model it would stay whole throughout the step. Where `wrap` looks at each module itself, it
        has chosen."""
        wrap = self._options.wrap
        by_name = isinstance(wrap, (Sequence, type)) and wrap != "none"
        if not by_name or not blocks:
            return []
        least, inside = max(map(_size, blocks)) / 4, {one for block in blocks for one in block.modules()}
        found = dict.fromkeys(_embedding(module, end) for end in ("input", "output"))
        fit = [one for one in found if one is not None and one not in inside and _size(one) >= least]
        return keep_ties_together(module, fit)

    def _norms(self, module: nn.Module) -> list[nn.Module]:
        """Batch norms, where the rest computes in less than float32: their statistics are float32, and torch's
        kernels want parameters of that type with them."""
        found = [one for one in module.modules() if isinstance(one, _BatchNorm)]
        return keep_ties_together(module, found) if self._policy.param_dtype is not None else []

    def _policy_of(self, part: nn.Module) -> MixedPrecisionPolicy:
        if self._policy.param_dtype is None or not isinstance(part, _BatchNorm):
            return self._policy
        # what comes after it computes in the other type again
        return MixedPrecisionPolicy(param_dtype=torch.float32, output_dtype=self._policy.param_dtype)

    def _shard(
        self,
        part: nn.Module,
        model: nn.Module,
        styles: Mapping[nn.Module, ParallelStyle],
        optimizers: Sequence[Optimizer],
    ) -> None:
        """Gives `part` rank 0's values, in full for this moment only, then keeps this rank's shard."""
        own = list(_outside_shards(part, set()))
        old = [(one, name, p) for one in own for name, p in one._parameters.items() if p is not None]
        materialise(part, model, self._world.device)
        share_values(own, self._world)
        if self._tensor_mesh is not None:
            divide(own, styles, model, self._tensor_mesh)
        offload = OffloadPolicy()
        if self._options.cpu_offload:
            offload = CPUOffloadPolicy(pin_memory=self._world.device.type == "cuda")
        fully_shard(
            part,
            mesh=self._mesh,
            reshard_after_forward=self._reshards(part, model),
            mp_policy=self._policy_of(part),
            offload_policy=offload,
        )
        # Before the next part is made: an optimizer that holds the old parameters keeps their memory.
        self._replaced.update({p: one._parameters[name] for one, name, p in old})
        for optimizer in optimizers:
            point_optimizer(optimizer, self._replaced)

    def _reshards(self, part: nn.Module, model: nn.Module) -> bool | int | None:
        if self._options.reshard_after_forward is not None:
            return self._options.reshard_after_forward
        if self._options.sharding == "shard_grad_op":
            return False
        if part is model:
            return None  # torch keeps the root's, which backward wants first
        return part is not _embedding(model, "output")  # wanted first, too

    def _prefetch(self, blocks: Sequence[nn.Module]) -> None:
        chain: list[FSDPModule] = [block for block in blocks if isinstance(block, FSDPModule)]
        ahead, behind = self._options.forward_prefetch, self._options.backward_prefetch
        for index, block in enumerate(chain):
            if ahead:
                block.set_modules_to_forward_prefetch(chain[index + 1 : index + 1 + ahead])
            if behind:
                block.set_modules_to_backward_prefetch(chain[max(0, index - behind) : index][::-1])

    def set_sync(self, module: nn.Module, synchronize: bool) -> None:
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(synchronize)

    @contextmanager
    def _unsynchronized(self, module: nn.Module) -> Iterator[None]:
        self.set_sync(module, False)
        try:
            yield
        finally:
            self.set_sync(module, True)

    def no_sync(self, module: nn.Module) -> AbstractContextManager[Any]:
        return self._unsynchronized(module)

    def sync_in_backward(self, module: nn.Module, outputs: list[Tensor]) -> None:
        self.set_sync(module, True)

    def backward(self, loss: Tensor, modules: Sequence[nn.Module], options: Mapping[str, Any]) -> None:
        for shard, name in self._shards.items():
            if shard._backward_hooks:
                raise ConfigError(
                    f"register_hook was called on {name} after prepare, and under strategy 'fsdp' that hook is not "
                    "called: gradients come to whole parameters. Use register_post_accumulate_grad_hook, which sees "
                    "this rank's part of the averaged gradient, or change p.grad between backward and step"
                )
        loss.backward(**options)  # type: ignore[no-untyped-call]

    def join(self, modules: list[nn.Module]) -> AbstractContextManager[Any]:
        raise ConfigError(
            "join_uneven_inputs cannot go with strategy 'fsdp': every rank gathers parameters in each step. Use a "
            "prepared loader, which gives all ranks equally many batches, or strategy 'ddp'."
        )

    def clip_grad_norm(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float) -> Tensor:
        return clip_sharded_norm(self._present(parameters), max_norm, norm_type)

    def clip_grad_value(self, parameters: Iterable[Tensor], clip_value: float) -> None:
        clip_sharded_value(self._present(parameters), clip_value)

    def _present(self, parameters: Iterable[Tensor]) -> Iterator[Tensor]:
        self._reshard()  # a generator over the module's parameters begins to look at them now
        return present(parameters, self._replaced)

    def full_state_dict(self, module: nn.Module, *, rank_zero_only: bool) -> dict[str, Any]:
        return gather_state_dict(module, keep=self._world.is_main or not rank_zero_only)


def _embedding(model: nn.Module, end: str) -> nn.Module | None:
    """The module of a Hugging Face model that embeds at that end."""
    get = getattr(model, f"get_{end}_embeddings", None)
    try:
        found = get() if callable(get) else None
    except NotImplementedError:  # how transformers says that there is none
        return None
    return found if isinstance(found, nn.Module) else None


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _outside_shards(part: nn.Module, seen: set[nn.Module]) -> Iterator[nn.Module]:
    """`part` and the modules below it, without those in blocks that are sharded already."""
    if part in seen or isinstance(part, FSDPModule):
        return
    seen.add(part)
    yield part
    for child in part.children():
        yield from _outside_shards(child, seen)


def _refuse_unfit(module: nn.Module, parts: Sequence[nn.Module]) -> None:
    """Says what torch would fail over, some of it in the first forward only.

    Raises:
        ConfigError: a parameter or its gradient cannot be cut, or not together with others.
    """
    for name, one in module.named_modules():
        weight = one._parameters.get("weight")
        if getattr(one, "sparse", False) is True and weight is not None and weight.requires_grad:
            raise ConfigError(
                f"{name or 'the model'} is an {type(one).__name__}(sparse=True), whose sparse gradient strategy 'fsdp' "
                "cannot divide: make it with sparse=False, or use strategy 'ddp'"
            )
    names = {parameter: name for name, parameter in module.named_parameters()}
    first: dict[nn.Module, nn.Parameter] = {}
    for parameter, part in owners(module, set(parts)):
        if not parameter.ndim:
            raise ConfigError(
                f"{names[parameter]} is a parameter without a dimension, which strategy 'fsdp' cannot cut; give it "
                "one, torch.ones(1), or use strategy 'ddp'"
            )
        other = first.setdefault(part, parameter) if parameter.requires_grad else parameter
        if other.dtype != parameter.dtype:
            raise ConfigError(
                f"{names[other]} is {other.dtype} and {names[parameter]} is {parameter.dtype}, and strategy 'fsdp' "
                "gathers them together: give them one type (model.float()), or choose blocks (wrap=) that hold one "
                "type each, or use strategy 'ddp'"
            )


def _policy(options: FSDP, dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    computed = getattr(torch, options.param_dtype) if options.param_dtype else dtype
    if computed in (None, torch.float32):
        return MixedPrecisionPolicy()
    reduced = getattr(torch, options.reduce_dtype) if options.reduce_dtype else None
    return MixedPrecisionPolicy(param_dtype=computed, reduce_dtype=reduced)


def _make_meshes(world: World, options: FSDP, tensor_size: int) -> tuple[DeviceMesh, DeviceMesh | None]:
    """The mesh that is sharded over (with copies on its outer dimension), and that of the matrices' parts."""
    data = world.size // tensor_size
    shards = shard_ranks(options, data, world.local_size // tensor_size)
    sizes = {"replicate": data // shards, "shard": shards, "tensor": tensor_size}
    kept = {
        name: size
        for name, size in sizes.items()
        if not (name == "replicate" and shards == data) and not (name == "tensor" and size == 1)
    }
    mesh = init_device_mesh(world.device.type, tuple(kept.values()), mesh_dim_names=tuple(kept))
    if tensor_size == 1:
        return mesh, None
    names = tuple(name for name in kept if name != "tensor")
    return mesh[names], mesh["tensor"]
