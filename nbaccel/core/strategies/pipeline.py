"""Pipeline parallelism: each rank keeps some of the model's layers, and microbatches pass through them in turn.

    rank 0    F0 F1 -- B0 F2 B1 F3 -- B2 -- B3        F, B: forward and backward of a microbatch
    rank 1       F0 B0 F1 B1 F2 B2 F3 B3              one forward, one backward (PipeDream, arXiv:1806.03377)

The schedule is torch.distributed.pipelining's; backward is a part of it, so the loop calls `pipeline_step`.
"""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from nbaccel.core.checkpoint import Sharded
from nbaccel.core.load_model import find_weights
from nbaccel.core.model.composed import refuse_composed
from nbaccel.core.model.materialise import materialise
from nbaccel.core.model.tied import find_tied_parameters
from nbaccel.core.sharding.dtensors import combine_norms, refuse_undivided, share_values
from nbaccel.core.sharding.stages import StagedModel, StagedOptimizer, divide_layers, gather_stages
from nbaccel.core.strategies.base import DataAxis, Strategy
from nbaccel.core.world import World
from nbaccel.errors import ConfigError
from nbaccel.layout import copy_ranks
from nbaccel.parallel import Pipeline
from nbaccel.whole import assembled_by

__all__ = ["PipelineParallelism"]


@final
class PipelineParallelism(Strategy):
    """Neighbouring ranks hold the stages of one model; copies of it are averaged after each batch.

    Args:
        accumulates: gradients are to be added up over several batches; the schedule does that itself.
    """

    name = "pipeline"

    def __init__(self, world: World, *, options: Pipeline, accumulates: bool) -> None:
        if options.loss is None:
            raise ConfigError(
                "strategy 'pipeline' computes the loss on the last rank: give the function of (outputs, targets), as "
                "in Accelerator(strategy=Pipeline(loss=torch.nn.functional.cross_entropy))"
            )
        if accumulates:
            raise ConfigError(
                "gradient_accumulation_steps cannot go with strategy 'pipeline', whose microbatches add up already; "
                "take larger batches and Pipeline(microbatches=...)"
            )
        self._size = size = copy_ranks("pipeline", options.size, world.size)
        self._world, self._options, self._loss = world, options, options.loss
        mesh = init_device_mesh(
            world.device.type, (world.size // size, size), mesh_dim_names=("data", "pipeline")
        )
        self._line, self._copies = mesh["pipeline"].get_group(), mesh["data"].get_group()
        self._place = world.rank % size
        self._schedules: dict[tuple[Any, ...], Schedule1F1B | ScheduleGPipe] = {}
        self._dropped = WeakTensorKeyDictionary()
        """Parameters of other ranks' stages, which the user's optimizers may still hold."""
        self._factor = 1.0
        self._shapes: dict[nn.Module, dict[str, torch.Size]] = {}
        """What is in the state dict of the whole model of each stage."""
        self.apart: set[nn.Module] = set()

    @property
    def data_axis(self) -> DataAxis:
        return DataAxis(rank=self._world.rank // self._size, size=self._world.size // self._size)

    # Preparing ---------------------------------------------------------------------------------------

    def wrap(
        self, module: nn.Module, optimizers: Sequence[Optimizer], *, place: bool
    ) -> tuple[nn.Module, list[Optimizer]]:
        if module in self.apart:
            return module, list(optimizers)
        if not place and self._world.device.type != "cpu":
            raise ConfigError("device_placement=False cannot go with strategy 'pipeline'")
        refuse_composed(module, self.name)
        stages = divide_layers(module, self._size, self._options.split)
        _refuse_ties(module, stages)
        stage: OrderedDict[str, nn.Module] = OrderedDict()
        for number, names in enumerate(stages):
            for name in names:
                layer = module.get_submodule(name)
                materialise(layer, module, self._world.device)
                share_values(layer.modules(), self._world)
                if number == self._place:
                    stage[name] = layer
        mine = nn.Sequential(stage).train(module.training)
        self._shapes[mine] = {name: value.shape for name, value in module.state_dict().items()}
        kept = set(mine.parameters())
        for parameter in module.parameters():
            if parameter not in kept:
                self._dropped[parameter] = True
                # given back although the user's model still names it
                parameter.data = torch.empty(0, dtype=parameter.dtype)
        for optimizer in optimizers:
            self._keep_own(optimizer)
        self.apart.add(mine)
        stage_of = weakref.ref(mine)
        assembled_by[mine] = lambda: self._assemble(stage_of(), module)
        return mine, list(optimizers)

    def _assemble(self, stage: nn.Module | None, module: nn.Module) -> None:
        """Makes a stage the whole model, of the layers that `module` still names."""
        assert stage is not None  # it asks for this
        state = self.full_state_dict(stage, rank_zero_only=False)
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if name in state:
                tensor.data = state[name]
        stage._modules = module._modules
        stage.train(stage.training)

    def adopt(self, optimizer: Optimizer) -> Optimizer:
        self._keep_own(optimizer)
        return optimizer

    def forget(self) -> None:
        self._schedules.clear()
        self._shapes.clear()
        self._dropped = WeakTensorKeyDictionary()
        self.apart.clear()

    def _keep_own(self, optimizer: Optimizer) -> None:
        refuse_undivided(optimizer, self.name, ["LBFGS"])  # a stage has whole matrices, and no more
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p not in self._dropped]

    # A step ------------------------------------------------------------------------------------------

    def pipeline_step(self, modules: Sequence[nn.Module], batch: Any, factor: float) -> Tensor:
        (stage,) = self._only(modules)
        inputs, targets = _pair(batch)
        self._factor = factor
        schedule = self._schedule(stage, inputs, targets)
        losses: list[Tensor] = []
        given: dict[str, Any] = {} if self._place + 1 < self._size else {"target": targets, "losses": losses}
        run = schedule.step if torch.is_grad_enabled() else schedule.eval
        run(*([inputs] if self._place == 0 else []), return_outputs=False, **given)
        if torch.is_grad_enabled():
            self._average(stage)
        device = self._world.device
        loss = (
            torch.stack([one.detach() for one in losses]).mean() if losses else torch.zeros((), device=device)
        )
        loss = loss.to(torch.float32) / factor
        dist.broadcast(loss, group=self._line, group_src=self._size - 1)
        return loss

    def _only(self, modules: Sequence[nn.Module]) -> Sequence[nn.Module]:
        if len(modules) != 1 or modules[0] not in self.apart:
            raise ConfigError(
                f"pipeline_step needs one prepared model, and there are {len(modules)}; prepare the nn.Sequential "
                "alone"
            )
        return modules

    def _schedule(self, stage: nn.Module, inputs: Tensor, targets: Tensor) -> Schedule1F1B | ScheduleGPipe:
        """That for batches of this shape, which fixes what ranks send to each other."""
        training = torch.is_grad_enabled()
        key = (stage, training, inputs.shape, inputs.dtype, targets.shape)
        found = self._schedules.get(key)
        if found is None:
            wanted = self._options.microbatches or 2 * self._size
            count = math.gcd(len(inputs), wanted)
            part = PipelineStage(stage, self._place, self._size, self._world.device, group=self._line)
            # 1F1B needs as many microbatches as stages; a small last batch has fewer
            kind: Callable[..., Any] = Schedule1F1B if count >= self._size else ScheduleGPipe
            found = self._schedules[key] = kind(part, count, loss_fn=self._weighted_loss)
            _infer_aside(found, stage)
        return found

    def _weighted_loss(self, outputs: Any, targets: Any) -> Tensor:
        loss: Tensor = self._loss(outputs, targets) * self._factor
        return loss

    @torch.no_grad()
    def _average(self, stage: nn.Module) -> None:
        """Gradients over the copies of this stage, summed as one buffer."""
        copies = dist.get_world_size(self._copies)
        grads = [p.grad for p in stage.parameters() if p.grad is not None]
        if copies == 1 or not grads:
            return
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat, group=self._copies)
        flat /= copies
        for grad, mean in zip(grads, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))

    def backward(self, loss: Tensor, modules: Sequence[nn.Module], options: Mapping[str, Any]) -> None:
        raise ConfigError(
            "strategy 'pipeline' has no separate backward: its forward and backward passes alternate. In place of "
            "model(...) and backward(loss) write loss = accelerator.pipeline_step((inputs, targets))"
        )

    def set_sync(self, module: nn.Module, synchronize: bool) -> None:
        pass

    def no_sync(self, module: nn.Module) -> AbstractContextManager[Any]:
        raise ConfigError(
            "no_sync cannot go with strategy 'pipeline'; take larger batches of more microbatches"
        )

    def sync_in_backward(self, module: nn.Module, outputs: list[Tensor]) -> None:
        pass

    def join(self, modules: list[nn.Module]) -> AbstractContextManager[Any]:
        raise ConfigError(
            "join_uneven_inputs cannot go with strategy 'pipeline': every stage is needed in each step. Use a "
            "prepared loader, which gives all ranks equally many batches."
        )

    @torch.no_grad()
    def clip_grad_norm(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float) -> Tensor:
        held = [p for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in held if p.grad is not None], norm_type)
        # a stage without gradients has a norm on the CPU
        total = combine_norms(norm.to(self._world.device, torch.float32), norm_type, [self._line])
        torch.nn.utils.clip_grads_with_norm_(held, max_norm, total)
        return total

    # Saving ------------------------------------------------------------------------------------------

    def full_state_dict(self, module: nn.Module, *, rank_zero_only: bool) -> dict[str, Any]:
        return gather_stages(module, self._world, self._line, keep=self._world.is_main or not rank_zero_only)

    def load_weights(self, module: nn.Module, folder: str | Path, *, strict: bool) -> str:
        own: dict[str, Tensor] = module.state_dict()
        found = find_weights(self._shapes[module], {}, folder, strict=strict)
        found.read({name: own[name] for name in found.names if name in own})
        return found.said

    def model_state(self, module: nn.Module) -> Sharded:
        return StagedModel(module, self._shapes[module])

    def optimizer_state(self, optimizer: Optimizer, modules: Sequence[nn.Module]) -> Sharded:
        return StagedOptimizer(optimizer, modules, self._world)


def _infer_aside(schedule: Any, stage: nn.Module) -> None:
    """Leaves buffers as they are where torch first sends a microbatch through to see its shapes: batch norms would
    have seen one more than there was. Random state it restores itself."""
    infer = schedule._initialize_stage

    def restoring(*args: Any, **kwargs: Any) -> None:
        del schedule._initialize_stage  # later calls look only whether this one was
        before = [(buffer, buffer.clone()) for buffer in stage.buffers()]
        infer(*args, **kwargs)
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)

    schedule._initialize_stage = restoring


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(one, Tensor) for one in batch):
        return batch[0], batch[1]
    kind = type(batch).__name__
    raise ConfigError(
        f"pipeline_step takes a pair of tensors, (inputs, targets), not a {kind}; each batch is cut along its first "
        "dimension into microbatches"
    )


def _refuse_ties(module: nn.Module, stages: Sequence[Sequence[str]]) -> None:
    place = {layer: number for number, names in enumerate(stages) for layer in names}
    for group in find_tied_parameters(module):
        if len({place[name.partition(".")[0]] for name in group}) > 1:
            raise ConfigError(
                f"{' and '.join(group)} are one parameter, and lie in different stages of the pipeline; untie them, or "
                "choose Pipeline(split=...) so that one stage holds both"
            )
