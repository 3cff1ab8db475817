"""DeepSpeed's ZeRO: optimizer state, gradients and parameters in shards, in device memory, the host's, or on disk.

The loop stays as it is: the engine is the module that is called, its step stands behind the user's optimizer,
and where a window ends is told to it before each forward. DeepSpeed's own JSON can be given and is completed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from nbaccel.core.checkpoint import ModelState, OptimizerState, Sharded
from nbaccel.core.checkpoint.modules import canonical_name
from nbaccel.core.comm.collectives import broadcast_module
from nbaccel.core.load_model import load_module
from nbaccel.core.model.blocks import find_blocks
from nbaccel.core.model.materialise import materialise
from nbaccel.core.model.recompute import recompute_in_backward
from nbaccel.core.nested import map_tensors
from nbaccel.core.plan import size_of
from nbaccel.core.precision import Precision
from nbaccel.core.strategies.base import (
    DataAxis,
    Strategy,
    clip_local_norm,
    refuse_divided,
    scale_whole_gradients,
    trainable,
)
from nbaccel.core.world import World
from nbaccel.core.zero import gradients
from nbaccel.core.zero.changes import Changes
from nbaccel.core.zero.fitness import refuse_unfit, unfit, widened
from nbaccel.core.zero.flat import part_of, write_part
from nbaccel.core.zero.library import end_engine, import_deepspeed
from nbaccel.core.zero.nvme import claim_folder, places
from nbaccel.core.zero.optimizer import ZeroOptimizerState
from nbaccel.core.zero.settings import settings, with_stage_of_file
from nbaccel.core.zero.step import ZeroStep
from nbaccel.core.zero.swapping import is_on_disk
from nbaccel.core.zero.weights import ZeroModelState, load_weights, whole_state_dict
from nbaccel.errors import ConfigError
from nbaccel.parallel import DeepSpeed
from nbaccel.whole import assembled_by

__all__ = ["Zero", "unfit"]

_WENT_BACK_TWICE = (
    "a second backward through the graph that retain_graph=True kept failed on rank {rank}: stage 3 of ZeRO keeps a "
    "parameter until the first one has passed it. Add the losses, backward(first + second), run the forward again, or "
    "use stage 2"
)
_USED_OUTSIDE = (
    "the loss uses a parameter outside the model's forward, as a penalty on weights does, and backward failed on rank "
    "{rank}: stage 3 of ZeRO has parameters whole within forward only. Compute that term in forward and return it, use "
    "the optimizer's weight_decay, or use stage 2"
)
_EMPTY_GRADIENT = ("returned an invalid gradient", "size is not same as the params")
"""What torch and DeepSpeed say of the gradient of an empty tensor that stands for a parameter."""


@final
class Zero(Strategy):
    """One engine for the one model that is trained; other models are the same on all ranks.

    Args:
        accumulation, clipping: what was asked of the Accelerator, to compare the user's JSON with.
    """

    name = "deepspeed"

    def __init__(
        self,
        world: World,
        *,
        options: DeepSpeed,
        precision: Precision,
        accumulation: int,
        clipping: float | None,
    ) -> None:
        self._world, self._precision = world, precision
        self._accumulation, self._clipping = accumulation, clipping
        self._options = options = with_stage_of_file(options)
        assert options.stage != "auto"  # else the planner has chosen one
        self._stage: int = options.stage
        self.handles_precision = options.stage != 0
        self._deepspeed = import_deepspeed(world, "strategy 'deepspeed'")
        self._engine: Any = None
        self._names: list[dict[str, nn.Parameter]] = []
        """The parameters of each group of the optimizer, by the names of the user's model."""
        self._learning: dict[str, nn.Parameter] = {}
        """Those of them that wanted gradients when the model was prepared."""
        self._refusing: Any = None
        """The hook on the model that refuses `load_state_dict`."""
        self._changes: Changes | None = None
        """What the loop does to the engine's parameters beside stepping them."""
        self._retained = False
        """Whether the last backward kept its graph for another one."""

    @property
    def data_axis(self) -> DataAxis:
        return DataAxis(rank=self._world.rank, size=self._world.size)

    # Preparing ---------------------------------------------------------------------------------------

    def wrap(
        self, module: nn.Module, optimizers: Sequence[Optimizer], *, place: bool
    ) -> tuple[nn.Module, list[Optimizer]]:
        if module is self._engine:
            return module, list(optimizers)
        whole = ((name, p) for name, p in module.named_parameters() if not hasattr(p, "ds_tensor"))
        refuse_divided(whole, self.name)
        if not trainable(module):
            materialise(module, module, self._world.device)
            module = module.to(self._world.device) if place else module
            broadcast_module(module, world=self._world)
            return module, list(optimizers)
        (optimizer,) = self._checked(module, optimizers)
        config = self._configured(module)
        known: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
        groups = [[known.get(p) for p in group["params"]] for group in optimizer.param_groups]
        if self._options.activation_checkpointing:
            for block in find_blocks(module, "auto") or [module]:
                recompute_in_backward(block)
        exact = self._fill(module, optimizer, known, config)
        named = dict(module.named_parameters())
        self._names = [
            {canonical_name(module, name): named[name] for name in group if name is not None}
            for group in groups
        ]
        self._learning = {n: p for group in self._names for n, p in group.items() if p.requires_grad}
        self._engine, *_ = self._deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )
        self._engine.set_gradient_accumulation_boundary(True)
        if self._stage == 0:
            return self._engine, [optimizer]
        self._refusing = module.register_load_state_dict_pre_hook(_refuse_loading)  # type: ignore[no-untyped-call]
        for name, part in exact.items():
            write_part(named[name], part, None)
        if self._precision.dtype is not None:
            _compute_in(self._engine, self._precision.dtype)
        self._changes = Changes(self._engine.optimizer, module)
        assembled_by[module] = assembled_by[self._engine] = partial(_take_over_or_warn, self._changes)
        return self._engine, [ZeroStep(optimizer, self._engine, self._changes)]

    def _fill(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        known: Mapping[Tensor, str],
        config: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        """Rank 0's values, and values for what is on the meta device; in stage 3 block by block, each kept in
        shards at once.

        Returns the float32 values, by name, where DeepSpeed narrows parameters before it copies them: in stage 3
        this rank's part, else the whole.
        """
        exact: dict[str, Tensor] = {}
        done: set[int] = set()
        in_shards = self._stage == 3
        swapper: Any = None  # for all blocks: each of its own would begin by emptying the folder on NVMe
        for part in [*reversed(find_blocks(module, "auto")), module] if in_shards else [module]:
            materialise(part, module, self._world.device)
            names = {id(p): name for name, p in module.named_parameters()}
            fresh = [p for p in part.parameters() if id(p) not in done]
            done.update(map(id, fresh))
            for parameter in fresh:
                kept = self._begin(parameter)
                if kept is not None:
                    exact[names[id(parameter)]] = kept
            if in_shards:
                sharding = self._deepspeed.zero.Init(
                    module=part, config_dict_or_path=dict(config), param_swapper=swapper
                )
                swapper = sharding.param_swapper
        module.to(self._world.device)
        now = dict(module.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [now[known[p]] if p in known else p for p in group["params"]]
        return exact

    def _begin(self, parameter: Any) -> Tensor | None:
        """Gives one parameter rank 0's values; the float32 ones, if DeepSpeed narrows them before it copies them."""
        dtype, in_shards = self._precision.dtype, self._stage == 3
        narrows = dtype is not None and parameter.requires_grad and self._stage > 0
        if hasattr(parameter, "ds_tensor"):  # from DeepSpeed's own zero.Init: in shards already
            keeps = narrows and not is_on_disk(parameter)  # there it is narrow already
            return parameter.ds_tensor.float().clone() if keeps else None
        parameter.data = parameter.data.to(self._world.device).contiguous()
        dist.broadcast(parameter.data, src=0)
        kept: Tensor | None = None
        if narrows:
            value = parameter.data
            kept = (part_of(value, -(-value.numel() // self._world.size)) if in_shards else value).clone()
        if dtype is not None and parameter.is_floating_point() and in_shards:
            # DeepSpeed narrows parameters that are whole, not those in shards
            parameter.data = parameter.data.to(dtype)
        return kept

    def _checked(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> Sequence[Optimizer]:
        if self._engine is not None:
            raise ConfigError(
                "strategy 'deepspeed' trains one model: put both into one module whose forward calls them, or use "
                "strategy 'fsdp', or 'ddp' where they share parameters"
            )
        if reason := unfit(optimizers, self._options):
            raise ConfigError(reason)
        kinds: dict[str, Any] = {"stage": self._stage, "dtype": self._precision.dtype}
        refuse_unfit(module, optimizers[0], **kinds)
        if self._world.is_main and (told := widened(module, **kinds)):
            warnings.warn(told, stacklevel=7)
        return optimizers

    def _configured(self, module: nn.Module) -> dict[str, Any]:
        """What DeepSpeed is given for this model; the folder it swaps to is this run's then."""
        size = size_of(module)
        config = settings(
            self._options,
            stage=self._stage,
            size=size,
            num_processes=self._world.size,
            precision=self._precision.kind,
            accumulation=self._accumulation,
            clipping=self._clipping,
        )
        if places(config):
            claim_folder(config, size, self._world)
        return config

    def adopt(self, optimizer: Optimizer) -> Optimizer:
        if isinstance(optimizer, ZeroStep):
            return optimizer
        held = {id(p) for named in self._names for p in named.values()}
        if any(id(p) in held for group in optimizer.param_groups for p in group["params"]):
            raise ConfigError(
                "strategy 'deepspeed' needs model and optimizer together: prepare(model, optimizer)"
            )
        return optimizer

    def forget(self) -> None:
        if self._engine is not None:
            for one in (self._engine, self._engine.module):
                assembled_by.pop(one, None)
            end_engine(self._engine)
        if self._refusing is not None:
            self._refusing.remove()
        self._engine = self._refusing = self._changes = None
        self._names, self._learning = [], {}

    def learns_otherwise(self, module: nn.Module, changed: Sequence[str]) -> None:
        if self._stage == 0 and module is self._engine:
            return  # it looks for gradients at each step
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise ConfigError(
            f"{changed[0]!r}{more} learned when the model was prepared and does not now, or the other way round. "
            "ZeRO steps what learned then: it would go on moving frozen parameters by their momentum, and leave "
            "others as they are. Set requires_grad before prepare; or save_state, and load_state after preparing "
            "model and optimizer afresh; or use strategy 'fsdp' or 'ddp', which follow such a change"
        )

    def unwrap(self, module: nn.Module) -> nn.Module:
        engine: Any = module
        inner: nn.Module = engine.module if module is self._engine else module
        return inner

    # The loop ----------------------------------------------------------------------------------------

    def set_sync(self, module: nn.Module, synchronize: bool) -> None:
        if module is self._engine:
            engine: Any = self._engine
            engine.set_gradient_accumulation_boundary(synchronize)

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
        if self._engine is None or not any(module is self._engine for module in modules):
            loss.backward(**options)  # type: ignore[no-untyped-call]
            return
        if options.keys() - {"retain_graph"}:
            raise ConfigError(f"backward({', '.join(options)}) cannot go with strategy 'deepspeed'")
        if frozen := [name for name, parameter in self._learning.items() if not parameter.requires_grad]:
            self.learns_otherwise(self._engine, frozen)
        zero = self._zero
        again, self._retained = self._retained, bool(options.get("retain_graph"))
        try:
            with nullcontext() if zero is None else gradients.added_up(zero):
                self._engine.backward(loss, **options)
        except RuntimeError as error:
            if self._stage == 3 and (again or any(told in str(error) for told in _EMPTY_GRADIENT)):
                said = _WENT_BACK_TWICE if again else _USED_OUTSIDE
                raise ConfigError(said.format(rank=self._world.rank)) from error
            raise

    def scale_gradients(self, modules: Sequence[nn.Module], ratio: float | Tensor) -> None:
        zero = self._zero
        if zero is None:
            scale_whole_gradients(modules, ratio)
            return
        gradients.scale(zero, ratio)

    def join(self, modules: list[nn.Module]) -> AbstractContextManager[Any]:
        raise ConfigError(
            "join_uneven_inputs cannot go with strategy 'deepspeed': every rank is needed in each step. Use a "
            "prepared loader, which gives all ranks equally many batches, or strategy 'ddp'."
        )

    def clip_grad_norm(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float) -> Tensor:
        zero = self._zero
        if zero is None:
            return clip_local_norm(parameters, max_norm, norm_type)
        if norm_type != 2.0:
            raise ConfigError(
                f"norm_type={norm_type} cannot go with ZeRO, which knows the 2-norm; leave it out"
            )
        norm = gradients.norm_for_step(zero)
        zero.clip_grad = max_norm  # for the step that follows; ZeroStep takes it back
        before: Tensor = norm.float().cpu() / float(zero.loss_scale)
        return before

    def left_step_out(self, optimizer: Optimizer) -> bool:
        return isinstance(optimizer, ZeroStep) and optimizer.step_was_skipped

    def clip_grad_value(self, parameters: Iterable[Tensor], clip_value: float) -> None:
        zero = self._zero
        if zero is None:
            super().clip_grad_value(parameters, clip_value)
        else:
            gradients.clip_values(zero, clip_value)

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer; None where it divides nothing."""
        found = None if self._engine is None else self._engine.optimizer
        return found if hasattr(found, "averaged_gradients") else None

    # Saving ------------------------------------------------------------------------------------------

    def full_state_dict(self, module: nn.Module, *, rank_zero_only: bool) -> dict[str, Any]:
        if module is not self._engine:
            return module.state_dict()
        if self._changes is not None:
            self._changes.take_over()
        return whole_state_dict(self.unwrap(module), keep=self._world.is_main or not rank_zero_only)

    def load_weights(self, module: nn.Module, folder: str | Path, *, strict: bool) -> str:
        if self._changes is None or module is not self._engine:
            return load_module(self.unwrap(module), folder, strict=strict)
        said = load_weights(self.unwrap(module), folder, strict=strict)
        self._changes.note()
        return said

    def model_state(self, module: nn.Module) -> Sharded:
        inner = self.unwrap(module)
        if self._changes is None or module is not self._engine:
            return ModelState(inner)
        return ZeroModelState(inner, self._changes)

    def optimizer_state(self, optimizer: Optimizer, modules: Sequence[nn.Module]) -> Sharded:
        if isinstance(optimizer, ZeroStep):
            # as `OptimizerState` names them, where there are other models, a teacher
            prefix = f"{modules.index(self._engine)}." if len(modules) > 1 else ""
            groups = [{prefix + name: p for name, p in named.items()} for named in self._names]
            return ZeroOptimizerState(self._zero, groups)
        return OptimizerState(optimizer, [self.unwrap(module) for module in modules])


def _take_over_or_warn(changes: Changes) -> None:
    """As a launch returns the model: what it has learnt is not to be refused for a change that has reached nothing."""
    try:
        changes.take_over()
    except ConfigError as error:
        warnings.warn(str(error), stacklevel=2)


def _compute_in(engine: nn.Module, dtype: torch.dtype) -> None:
    """Floating-point inputs in the engine's type, outputs in float32, as under autocast."""

    def narrow(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, (args, kwargs))

    def widen(_: nn.Module, args: Any, output: Any) -> Any:
        return map_tensors(lambda t: t.float() if t.dtype == dtype else t, output)

    engine.register_forward_pre_hook(narrow, with_kwargs=True)
    engine.register_forward_hook(widen)


def _refuse_loading(module: nn.Module, *_: Any) -> None:
    raise ConfigError(
        "under ZeRO load_state_dict would not reach the float32 parameters that are stepped, nor those in shards: use "
        "acc.load_model(model, folder), acc.load_state(folder), or load before prepare"
    )
