"""The Accelerator: the training loop's one facade. Each method is a check and a delegation.

Longer than other files because the names are those of Hugging Face Accelerate's Accelerator, of which
there are many; nothing is decided here that `loop`, `strategies`, `saving` and the rest do not own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nbaccel.config import RunConfig, combine, duration_seconds
from nbaccel.core import collectives, processes, refused
from nbaccel.core.accumulate import LossWeighting, Window
from nbaccel.core.checkpoint import Loaded
from nbaccel.core.control import Control
from nbaccel.core.data import Shard, ShardedLoader
from nbaccel.core.loop import Loop
from nbaccel.core.nested import map_leaves
from nbaccel.core.precision import ScalerOptions, choose_precision, probe_hardware
from nbaccel.core.rng import set_seed
from nbaccel.core.save_model import save_model
from nbaccel.core.saving import Saving
from nbaccel.core.step_times import StepTimes, Stopwatch
from nbaccel.core.strategies.base import Strategy
from nbaccel.core.strategies.ddp import DDP, DDPOptions
from nbaccel.core.strategies.single import Single
from nbaccel.core.trackers import MetricLog, Tracker, Trackers, open_trackers
from nbaccel.core.trust import TrustChecks
from nbaccel.core.world import World, join, read_environment
from nbaccel.core.wrappers import (
    PreparedOptimizer,
    PreparedScheduler,
    is_scheduler,
    patch_forward,
    restore_forward,
)
from nbaccel.errors import ConfigError
from nbaccel.wire import events

__all__ = ["Accelerator"]

_PLACE = "Accelerator(...)"


@final
class Accelerator:
    """Runs one training loop on one process or many.

    Every argument left None takes what the launch, the YAML file or the environment asked.

    Args:
        mixed_precision: "no", "bf16", "fp16" or "auto".
        gradient_accumulation_steps: micro-steps per optimizer step.
        cpu: compute on the CPU although there is an accelerator.
        device_placement: move models and batches to the device.
        strategy: "auto", "single" or "ddp".
        ddp: options of DistributedDataParallel.
        scaler: options of the fp16 gradient scaler.
        loss_weighting: "samples": unequal batches count by their samples; "equal": each micro-step alike.
        scheduler_steps: scheduler steps per optimizer step: "one", or one "per_rank" as in scripts whose
            schedule was written for that.
        step_scheduler_with_optimizer: False when the loop steps the scheduler on its own account.
        split_batches, even_batches, dispatch_batches, shard, per_sample_seed: see `ShardedLoader`.
        seed: of all generators.
        compile: compile prepared models: True or a mode of torch.compile.
        project_dir: where checkpoints and tracker files go.
        save_every: optimizer steps, or time ("15min").
        stop_after: time after which all ranks save and stop ("11h30m").
        resume: "auto" or a checkpoint folder to go on from.
        keep: how many checkpoints to keep.
        check_collectives: "sampled", "always" or "never".
        measure: take the times of a step's parts; None: when somebody watches.
        verify: trust checks in the first steps.
        log_with: trackers to start in `init_trackers`.

    Raises:
        ConfigError: an argument disagrees with what the launch asked, or cannot be honoured here.
    """

    def __init__(
        self,
        *,
        mixed_precision: str | None = None,
        gradient_accumulation_steps: int | None = None,
        cpu: bool = False,
        device_placement: bool = True,
        strategy: str | None = None,
        ddp: DDPOptions | None = None,
        scaler: ScalerOptions | None = None,
        loss_weighting: LossWeighting = "samples",
        scheduler_steps: Literal["one", "per_rank"] = "one",
        step_scheduler_with_optimizer: bool = True,
        split_batches: bool = False,
        even_batches: bool = False,
        dispatch_batches: bool = False,
        shard: Shard = "interleaved",
        per_sample_seed: bool = False,
        seed: int | None = None,
        compile: bool | str | None = None,
        project_dir: str | Path | None = None,
        save_every: int | str | None = None,
        stop_after: str | None = None,
        resume: str | None = None,
        keep: int | None = None,
        check_collectives: collectives.CheckMode = "sampled",
        measure: bool | None = None,
        verify: bool | None = None,
        log_with: str | Tracker | Sequence[str | Tracker] | None = None,
        **unknown: Any,
    ) -> None:
        refused.refuse_arguments(unknown)
        environment = read_environment()
        trackers: list[str | Tracker] = (
            [*log_with] if isinstance(log_with, (list, tuple)) else [log_with] if log_with else []  # type: ignore[list-item]
        )
        named = tuple(one for one in trackers if isinstance(one, str))
        asked = {
            "mixed_precision": mixed_precision,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "device": "cpu" if cpu else None,
            "strategy": strategy,
            "seed": seed,
            "compile": compile,
            "project_dir": None if project_dir is None else str(project_dir),
            "save_every": save_every,
            "stop_after": stop_after,
            "resume": resume,
            "keep": keep,
            "verify": verify,
            "log_with": named or None,
        }
        given = {name: value for name, value in asked.items() if value is not None}
        config = combine(environment.config, RunConfig.from_mapping(given, place=_PLACE))
        self.config = config
        self.world = join(config, environment)
        self._precision = choose_precision(
            config.mixed_precision, probe_hardware(self.device), scaler=scaler, speak=self.world.is_main
        )
        if config.seed is not None:
            set_seed(config.seed)
        self._place = device_placement
        self.strategy = _choose_strategy(config, self.world, ddp or DDPOptions(), device_placement)
        events.emit(events.Applied(option="mixed_precision", value=self._precision.kind))
        events.emit(events.Applied(option="strategy", value=self.strategy.name))
        watch = Stopwatch(self.device) if (events.active() if measure is None else measure) else None
        self._loop = Loop(
            world=self.world,
            strategy=self.strategy,
            precision=self._precision,
            control=_make_control(config, self.world, self._precision.kind),
            stopwatch=watch,
            length=config.gradient_accumulation_steps or 1,
            weighting=loss_weighting,
        )
        self._saving = Saving(self.world, self._loop, project_dir=config.project_dir, keep=config.keep)
        self._check = collectives.MismatchCheck(check_collectives)
        self._log = MetricLog(Trackers(), world=self.world)
        self._log_with: list[str | Tracker] = [
            *(config.log_with or ()),
            *(t for t in trackers if not isinstance(t, str)),
        ]
        self._loader_options: dict[str, Any] = {
            "split_batches": split_batches,
            "even_batches": even_batches,
            "dispatch": dispatch_batches,
            "shard": shard,
            "per_sample_seed": per_sample_seed,
            "seed": config.seed,
        }
        self._scheduler_repeat = self.world.size if scheduler_steps == "per_rank" else 1
        self._scheduler_follows = step_scheduler_with_optimizer
        self._prepared: dict[int, tuple[Any, Any]] = {}
        self._accumulating = _Accumulating(self._loop)
        self._trigger = False
        self._resume_from = config.resume
        if events.active() if config.verify is None else config.verify:
            self._loop.watch_steps(TrustChecks(self._loop, self.strategy.unwrap).check)
        self._loop.before_pass = self._before_pass
        self._loop.before_batch = self._save_now

    # Who and where -----------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device this rank computes on."""
        return self.world.device

    @property
    def num_processes(self) -> int:
        """Ranks in all."""
        return self.world.size

    @property
    def process_index(self) -> int:
        """This rank."""
        return self.world.rank

    @property
    def local_process_index(self) -> int:
        """This rank on its machine."""
        return self.world.local_rank

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0."""
        return self.world.rank == 0

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is rank 0 of its machine."""
        return self.world.local_rank == 0

    @property
    def is_last_process(self) -> bool:
        """Whether this is the highest rank."""
        return self.world.rank == self.world.size - 1

    @property
    def use_distributed(self) -> bool:
        """Whether there is more than one rank."""
        return self.world.size > 1

    @property
    def multi_device(self) -> bool:
        """Whether several accelerators are in use."""
        return self.world.size > 1 and self.device.type != "cpu"

    @property
    def distributed_type(self) -> str:
        """ "NO" for one process, else "MULTI_" and the kind of device, as the peer's enum spells it."""
        if self.world.size == 1:
            return "NO"
        return {"cpu": "MULTI_CPU", "cuda": "MULTI_GPU"}.get(
            self.device.type, f"MULTI_{self.device.type.upper()}"
        )

    @property
    def mixed_precision(self) -> str:
        """The precision in force: "no", "fp16" or "bf16"."""
        return self._precision.kind

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-steps per optimizer step."""
        return self._loop.length

    @property
    def project_dir(self) -> str | None:
        """Where checkpoints and tracker files go."""
        return self.config.project_dir

    @property
    def split_batches(self) -> bool:
        """Whether the loaders' batch size is that of all ranks together."""
        return bool(self._loader_options["split_batches"])

    @property
    def even_batches(self) -> bool:
        """Whether last batches are filled with repeated samples."""
        return bool(self._loader_options["even_batches"])

    @property
    def dispatch_batches(self) -> bool:
        """Whether rank 0 reads for all ranks."""
        return bool(self._loader_options["dispatch"])

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints on each machine's first rank only."""
        if self.is_local_main_process:
            print(*args, **kwargs)

    def wait_for_everyone(self) -> None:
        """Waits until every rank is here."""
        collectives.barrier(self.world)

    def main_process_first(self) -> AbstractContextManager[None]:
        """A block that rank 0 runs before the others."""
        return processes.first(self.world, self.is_main_process)

    def local_main_process_first(self) -> AbstractContextManager[None]:
        """A block that each machine's first rank runs before its others."""
        return processes.first(self.world, self.is_local_main_process)

    def on_main_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: runs on rank 0 only."""
        return processes.only_if(self.is_main_process, function)

    def on_local_main_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: runs on each machine's first rank only."""
        return processes.only_if(self.is_local_main_process, function)

    def on_last_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: runs on the highest rank only."""
        return processes.only_if(self.is_last_process, function)

    def on_process(self, function: Callable[..., Any] | None = None, process_index: int | None = None) -> Any:
        """Decorator: runs on the given rank only."""
        return _on(function, process_index, self.process_index)

    def on_local_process(
        self, function: Callable[..., Any] | None = None, local_process_index: int | None = None
    ) -> Any:
        """Decorator: runs on the given local rank of each machine only."""
        return _on(function, local_process_index, self.local_process_index)

    @contextmanager
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Iterator[Any]:
        """Gives this rank's contiguous part of `inputs`; see `processes.share_of`."""
        yield processes.share_of(inputs, rank=self.process_index, size=self.num_processes, pad=apply_padding)

    def set_trigger(self) -> None:
        """Raises a flag that `check_trigger` shows to all ranks."""
        self._trigger = True

    def check_trigger(self) -> bool:
        """Whether any rank has called `set_trigger` since the last check. Called on all ranks."""
        raised = collectives.reduce(torch.tensor(int(self._trigger)), world=self.world, reduction="max")
        if raised.item():
            self._trigger = False
        return bool(raised.item())

    # The loop ----------------------------------------------------------------------------------------

    def prepare(self, *objects: Any, device_placement: Sequence[bool | None] | None = None) -> Any:
        """The objects made ready, in the order given: models, optimizers, loaders, schedulers, and lists,
        tuples or dicts of them. What is prepared already comes back as it is.

        Raises:
            ConfigError: nothing was given, or something that cannot be prepared.
        """
        if not objects:
            raise ConfigError(
                "prepare() was given nothing; give models, optimizers, DataLoaders or schedulers"
            )
        places: Sequence[bool | None] = device_placement or [None] * len(objects)
        if len(places) != len(objects):
            raise ConfigError(f"device_placement has {len(places)} values for {len(objects)} objects")
        done = [
            map_leaves(partial(self._prepare_one, place=place), one)
            for one, place in zip(objects, places, strict=True)
        ]
        return done[0] if len(done) == 1 else tuple(done)

    def _prepare_one(self, value: Any, *, place: bool | None) -> Any:
        if isinstance(value, nn.Module):
            return self.prepare_model(value, device_placement=place)
        if isinstance(value, torch.optim.Optimizer):
            return self.prepare_optimizer(value)
        if isinstance(value, (DataLoader, ShardedLoader)):
            return self.prepare_data_loader(value, device_placement=place)
        if isinstance(value, PreparedScheduler) or is_scheduler(value):
            return self.prepare_scheduler(value)
        raise ConfigError(
            f"prepare cannot do anything with a {type(value).__name__}; give models (nn.Module), optimizers, "
            "DataLoaders or learning-rate schedulers"
        )

    def _known(self, value: Any) -> Any:
        found = self._prepared.get(id(value))
        return None if found is None else found[1]

    def _keep(self, original: Any, prepared: Any) -> Any:
        # The original is kept too, so that its id cannot be given to another object.
        self._prepared[id(original)] = self._prepared[id(prepared)] = (original, prepared)
        return prepared

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """The model on its device, in its precision, spread over the ranks unless `evaluation_mode`."""
        known: nn.Module | None = self._known(model)
        if known is not None:
            return known
        inner = self.strategy.unwrap(model)
        restore_forward(inner)
        place = self._place if device_placement is None else device_placement
        if place:
            inner.to(self.device)
        mode = self.config.compile
        if mode:
            inner.compile(**({} if mode is True else {"mode": mode}))
        wrapped = inner if evaluation_mode else self.strategy.wrap(model)
        watch = self._loop.stopwatch
        if wrapped is inner:
            patch_forward(inner, self._precision, watch)
        else:
            patch_forward(inner, self._precision, None)
            patch_forward(wrapped, choose_precision("no", probe_hardware(self.device), speak=False), watch)
        self._loop.models.append(wrapped)
        self._loop.windows = {(): self._loop.windows[()]}  # which models are "all" has changed
        return self._keep(model, wrapped)  # type: ignore[no-any-return]

    def prepare_optimizer(
        self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None
    ) -> PreparedOptimizer:
        """The optimizer, stepping only where gradients are synchronised."""
        known: PreparedOptimizer | None = self._known(optimizer)
        if known is not None:
            return known
        inner = optimizer.optimizer if isinstance(optimizer, PreparedOptimizer) else optimizer
        prepared = PreparedOptimizer(inner, self._loop, leads=not self._saving.optimizers)
        self._saving.optimizers.append(inner)
        self._keep(inner, prepared)
        return self._keep(optimizer, prepared)  # type: ignore[no-any-return]

    def prepare_data_loader(
        self,
        data_loader: DataLoader[Any] | ShardedLoader,
        device_placement: bool | None = None,
        **options: Any,
    ) -> ShardedLoader:
        """The loader divided over the ranks; `options` are those of `ShardedLoader`."""
        known: ShardedLoader | None = self._known(data_loader)
        if known is not None:
            return known
        loader = data_loader.dataloader if isinstance(data_loader, ShardedLoader) else data_loader
        place = self._place if device_placement is None else device_placement
        number = len(self._saving.loaders)
        name = "train" if number == 0 else f"loader {number}"
        prepared = ShardedLoader(
            loader,
            world=self.world,
            device=self.device if place else "cpu",
            loop=self._loop,
            **{"name": name, **self._loader_options, **options},
        )
        self._saving.loaders.append(prepared)
        if self._loop.stopwatch is not None:
            self._loop.stopwatch.watch(prepared)
        self._keep(loader, prepared)
        return self._keep(data_loader, prepared)  # type: ignore[no-any-return]

    def prepare_scheduler(self, scheduler: Any) -> PreparedScheduler:
        """The scheduler, stepping once per optimizer step."""
        known: PreparedScheduler | None = self._known(scheduler)
        if known is not None:
            return known
        inner = scheduler.scheduler if isinstance(scheduler, PreparedScheduler) else scheduler
        prepared = PreparedScheduler(
            inner, self._loop, follows=self._scheduler_follows, repeat=self._scheduler_repeat
        )
        self._saving.schedulers.append(prepared)
        self._keep(inner, prepared)
        return self._keep(scheduler, prepared)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor, weight: float | Tensor | None = None, **kwargs: Any) -> None:
        """Computes gradients; scaled so that the window's gradient is that of the mean over its samples.

        Args:
            weight: `loss` is a sum over this many units (tokens): the window's gradient becomes that of
                the mean over all units of all ranks.

        Raises:
            ConfigError: the loss is not one number.
        """
        if loss.ndim and loss.numel() != 1 and "gradient" not in kwargs:
            raise ConfigError(
                f"backward needs a loss of one number; this one has shape {list(loss.shape)}. Take its mean."
            )
        if weight is None and self._loop.simple:
            loss.backward(**kwargs)  # type: ignore[no-untyped-call]
        else:
            self._loop.backward(loss, weight, kwargs)

    def accumulate(self, *models: nn.Module) -> AbstractContextManager[None]:
        """A micro-step: gradients of these models (of all, if none is named) are synchronised in the last
        one of a window, and only then do optimizers and schedulers step."""
        self._accumulating.window = self._loop.windows.get(models) or self._window(models)
        return self._accumulating

    def _window(self, models: tuple[nn.Module, ...]) -> Window:
        loop = self._loop
        prepared = [self._known(model) or model for model in models]
        # The common case, one model or all of them, shares the window of a bare accumulate().
        window = loop.windows[()] if set(prepared) == set(loop.models) else loop.new_window(prepared)
        loop.windows[models] = window
        return window

    def step(
        self,
        loss: Tensor,
        optimizer: PreparedOptimizer,
        scheduler: PreparedScheduler | None = None,
        *,
        clip: float | None = None,
        weight: float | Tensor | None = None,
    ) -> Tensor | None:
        """The five obligations of a micro-step: backward, clip, optimizer, scheduler, zero_grad.

        Inside or outside `accumulate`. Returns the norm before clipping, where it was clipped.
        """
        loop, outside = self._loop, not self._accumulating.inside
        if outside:
            window = loop.window
            expected = window.micro + 1 >= window.length
            window.begin(loop.loader)
            if window.sync and not expected and self.world.size > 1:
                for model in window.models:
                    self.strategy.sync_in_backward(model, [loss])
        self.backward(loss, weight)
        norm = None
        if loop.window.sync:
            if clip is not None:
                norm = self.clip_grad_norm_(self._parameters(optimizer), clip)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()
        if outside:
            loop.window.end()
            if loop.length > 1:
                for model in loop.window.models:
                    self.strategy.set_sync(model, loop.window.micro + 1 >= loop.length)
        return norm

    @staticmethod
    def _parameters(optimizer: PreparedOptimizer) -> list[Tensor]:
        return [p for group in optimizer.param_groups for p in group["params"]]

    @property
    def sync_gradients(self) -> bool:
        """Whether this micro-step (or the last one) ends its window."""
        return self._loop.window.sync

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether the last optimizer step was left out because of an fp16 overflow."""
        return self._loop.skipped

    @property
    def steps(self) -> int:
        """Optimizer steps so far, of the first optimizer; goes on across checkpoints."""
        return self._loop.steps

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """A context in which the model's gradients stay on their rank."""
        return self.strategy.no_sync(model)

    @contextmanager
    def trigger_sync_in_backward(self, model: nn.Module) -> Iterator[None]:
        """Backward in this context synchronises, although the forward ran under `no_sync`."""
        self.strategy.sync_in_backward(model, [])
        yield

    def autocast(self, *, enabled: bool = True, cache_enabled: bool = True) -> AbstractContextManager[Any]:
        """A context that computes in the precision in force."""
        return self._precision.autocast(enabled=enabled, cache_enabled=cache_enabled)

    def unscale_gradients(self, optimizer: Any = None) -> None:
        """Takes the fp16 scale off the gradients of the optimizer(s), all if None; once per window."""
        given = self._saving.optimizers if optimizer is None else optimizer
        listed = given if isinstance(given, (list, tuple)) else [given]
        self._loop.unscale([o.optimizer if isinstance(o, PreparedOptimizer) else o for o in listed])

    def clip_grad_norm_(
        self, parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0
    ) -> Tensor | None:
        """Clips the gradients' total norm at the end of a window; returns the norm before (0-d), or None
        where the window goes on."""
        loop = self._loop
        if not loop.window.sync:
            return None
        if loop.scaler is not None:
            loop.unscale(self._saving.optimizers)
        listed = [parameters] if isinstance(parameters, Tensor) else parameters
        return self.strategy.clip_grad_norm(listed, max_norm, norm_type)

    def clip_grad_value_(self, parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
        """Clips each gradient's values at the end of a window."""
        if self._loop.window.sync:
            self._loop.unscale(self._saving.optimizers)
            nn.utils.clip_grad_value_(parameters, clip_value)

    @contextmanager
    def join_uneven_inputs(
        self, joinables: Sequence[Any], even_batches: bool | None = None
    ) -> Iterator[None]:
        """A context in which ranks may run out of batches at different times."""
        with self.strategy.join([one for one in joinables if isinstance(one, nn.Module)]):
            yield

    def unwrap_model(
        self, model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True
    ) -> nn.Module:
        """The user's own module. It keeps computing in the precision unless `keep_fp32_wrapper` is False."""
        inner = self.strategy.unwrap(model)
        if not keep_fp32_wrapper:
            restore_forward(inner)
        if not keep_torch_compile:
            inner._compiled_call_impl = None
        return inner

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """The model's whole state dict, under the user's names unless `unwrap` is False."""
        return self.strategy.full_state_dict(model) if unwrap else model.state_dict()

    def free_memory(self, *objects: Any) -> list[Any]:
        """Forgets everything prepared; returns a None for each object: `a, b = acc.free_memory(a, b)`."""
        for original, prepared in self._prepared.values():
            for one in (original, prepared):
                if isinstance(one, nn.Module):
                    restore_forward(one)
        self._prepared.clear()
        self._loop.models.clear()
        self._loop.windows = {(): self._loop.windows[()]}
        for listed in (self._saving.optimizers, self._saving.schedulers, self._saving.loaders):
            listed.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return [None] * len(objects)

    clear = free_memory

    # Talking to the other ranks ----------------------------------------------------------------------

    def gather(self, tensor: Any) -> Any:
        """Every rank's tensors, concatenated along dimension 0, in any nested structure."""
        with self._communicating():
            return collectives.gather(tensor, world=self.world, check=self._check)

    def gather_object(self, value: Any) -> list[Any]:
        """One object from each rank, in rank order."""
        with self._communicating():
            return collectives.gather_object(value, world=self.world)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """What all ranks computed for the batch in hand: every real sample once, repeated ones left out.

        Objects (or any leaf that is no tensor) come back as one flat list.
        """
        loader = self._loop.loader
        size = real = None
        if loader is not None:
            real, size = loader.batch_samples, loader.batch_samples + loader.batch_repeated
        with self._communicating():
            if use_gather_object or not _all_tensors(input_data):
                mine = input_data if isinstance(input_data, (list, tuple)) else [input_data]
                kept = mine[:real] if len(mine) == size else mine
                return [one for part in collectives.gather_object(kept, world=self.world) for one in part]
            kept = map_leaves(lambda t: t[:real] if t.ndim and len(t) == size else t, input_data)
            return collectives.gather_uneven(kept, world=self.world)

    def reduce(self, tensor: Any, reduction: collectives.Reduction = "sum", scale: float = 1.0) -> Any:
        """The sum, mean, max or min over the ranks."""
        with self._communicating():
            return collectives.reduce(
                tensor, world=self.world, reduction=reduction, scale=scale, check=self._check
            )

    def broadcast(self, tensor: Any, from_process: int = 0) -> Any:
        """One rank's tensors on every rank."""
        with self._communicating():
            return collectives.broadcast(tensor, world=self.world, source=from_process, check=self._check)

    def broadcast_object_list(self, object_list: list[Any], from_process: int = 0) -> list[Any]:
        """One rank's objects in every rank's list."""
        with self._communicating():
            return collectives.broadcast_object_list(object_list, world=self.world, source=from_process)

    def broadcast_module(self, module: nn.Module, from_process: int = 0) -> None:
        """One rank's parameters and buffers in every rank's module."""
        collectives.broadcast_module(module, world=self.world, source=from_process)

    def pad_across_processes(
        self, tensor: Any, dim: int = 0, pad_index: float = 0, pad_first: bool = False
    ) -> Any:
        """Tensors padded along `dim` to the longest of all ranks."""
        with self._communicating():
            return collectives.pad_across_processes(
                tensor, world=self.world, dim=dim, pad_index=pad_index, pad_first=pad_first
            )

    def all_to_all(self, tensor: Any) -> Any:
        """Chunk i of each rank's tensors goes to rank i."""
        with self._communicating():
            return collectives.all_to_all(tensor, world=self.world, check=self._check)

    def scatter(self, tensor: Any, from_process: int = 0) -> Any:
        """One rank's tensors cut into a piece for each rank."""
        with self._communicating():
            return collectives.scatter(tensor, world=self.world, source=from_process)

    def _communicating(self) -> AbstractContextManager[None]:
        watch = self._loop.stopwatch
        return contextlib.nullcontext() if watch is None else watch.measure("communication")

    # Logging and times -------------------------------------------------------------------------------

    def log(
        self,
        values: Mapping[str, Any],
        step: int | None = None,
        reduce: Literal["mean", "sum"] | None = None,
        **_: Any,
    ) -> None:
        """Logs values at an optimizer step (the present one if None): to the trackers and the dashboard.

        With `reduce` they are first reduced over the ranks, and this is to be called on all of them.
        """
        if reduce not in (None, "mean", "sum"):
            raise ConfigError(f"log(reduce={reduce!r}): it must be 'mean', 'sum' or None")
        if reduce is not None and self.world.size > 1:
            values = {**values, **self._reduced(values, reduce)}
        self._log.log(values, step=self._loop.steps if step is None else step, reduced=reduce)

    def _reduced(self, values: Mapping[str, Any], reduction: Literal["mean", "sum"]) -> Any:
        numbers = {
            name: value.detach().float() if isinstance(value, Tensor) else torch.tensor(float(value))
            for name, value in values.items()
            if isinstance(value, (Tensor, int, float))
        }
        return self.reduce(numbers, reduction=reduction)

    def init_trackers(
        self,
        project_name: str = "run",
        config: Mapping[str, Any] | None = None,
        init_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Starts the trackers of `log_with`, on the main process, below `project_dir`.

        Raises:
            ConfigError: no tracker was asked for, an unknown one, or it has nowhere to write.
        """
        if not self._log_with:
            raise ConfigError("init_trackers needs Accelerator(log_with='jsonl' or 'tensorboard', ...)")
        if self.project_dir is None and any(isinstance(one, str) for one in self._log_with):
            raise ConfigError("trackers need a folder to write to: Accelerator(project_dir=...)")
        folder = Path(self.project_dir or ".")
        trackers = open_trackers(
            self._log_with,
            folder=folder,
            project=project_name,
            world=self.world,
            config=config,
            options=init_kwargs,
        )
        self._log = MetricLog(trackers, world=self.world)

    def get_tracker(self, name: str, unwrap: bool = False) -> Any:
        """The running tracker of that name (its own object with `unwrap`); on the main process only.

        Raises:
            ConfigError: there is none.
        """
        tracker = self._log.trackers.get(name)
        return tracker.tracker if unwrap else tracker

    def step_times(self) -> StepTimes:
        """Where the time has gone so far on this rank.

        Raises:
            ConfigError: nothing is measured.
        """
        if self._loop.stopwatch is None:
            raise ConfigError("nothing is measured here; make the Accelerator with measure=True")
        return self._loop.stopwatch.read()

    @contextmanager
    def profile(self, folder: str | Path | None = None, **options: Any) -> Iterator[Any]:
        """A torch profiler; each rank writes `trace-rank-N.json` to `folder` (or to the project's)."""
        from torch.profiler import profile

        where = folder or self.project_dir
        with profile(**options) as profiler:
            yield profiler
        if where is not None:
            Path(where).mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(Path(where) / f"trace-rank-{self.process_index}.json"))

    # Saving and stopping -----------------------------------------------------------------------------

    @property
    def should_stop(self) -> bool:
        """Whether all ranks have agreed to stop: true from the same optimizer step on every rank."""
        control = self._loop.control
        return control is not None and control.stopping

    @property
    def stopped_early(self) -> bool:
        """Whether the loop ended because it was asked to, or its time was up."""
        return self.should_stop

    @property
    def save_requested(self) -> bool:
        """Whether all ranks have agreed to save now; `save_state` answers it, and so does a prepared loader
        before its next batch."""
        control = self._loop.control
        return control is not None and control.saving

    def save_state(self, output_dir: str | Path | None = None, *, asynchronous: bool = False) -> str:
        """Saves everything prepared and registered; returns the folder. Called on all ranks."""
        watch = self._loop.stopwatch
        with contextlib.nullcontext() if watch is None else watch.measure("checkpoint"):
            path = self._saving.save(output_dir, asynchronous=asynchronous)
        if self._loop.control is not None:
            self._loop.control.saved()
        return str(path)

    def load_state(
        self, input_dir: str | Path | None = None, *, strict: bool = True, allow_pickle: bool = False
    ) -> Loaded:
        """Loads a checkpoint, the newest complete one if no folder is given. Called on all ranks."""
        return self._saving.load(input_dir, strict=strict, allow_pickle=allow_pickle)

    def save_model(
        self, model: nn.Module, save_directory: str | Path, max_shard_size: int | str = "10GB"
    ) -> list[Path]:
        """Writes the model's weights as safetensors in Hugging Face's layout. Called on all ranks."""
        files = save_model(
            self.get_state_dict(model), save_directory, world=self.world, max_shard_size=max_shard_size
        )
        self.wait_for_everyone()
        return files

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Saves these objects too; they need state_dict and load_state_dict."""
        self._saving.register(objects)

    def register_save_state_pre_hook(self, hook: Callable[..., Any]) -> Callable[[], None]:
        """Calls `hook(models, folder)` before each save; returns a function that takes it off."""
        self._saving.before_saving.append(hook)
        return lambda: self._saving.before_saving.remove(hook)

    def register_load_state_pre_hook(self, hook: Callable[..., Any]) -> Callable[[], None]:
        """Calls `hook(models, folder)` before each load; returns a function that takes it off."""
        self._saving.before_loading.append(hook)
        return lambda: self._saving.before_loading.remove(hook)

    def end_training(self) -> None:
        """Waits for saves in the background, hands on the last logged values, closes the trackers."""
        self._log.close()
        self._saving.close()

    def _before_pass(self, loader: ShardedLoader) -> None:
        if self._resume_from is not None:
            where, self._resume_from = self._resume_from, None
            self._saving.resume(where)

    def _save_now(self) -> None:
        if self._saving.project_dir is None:
            # Asked from outside, with nowhere to put it: the loop may still do it itself.
            return
        self.save_state()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(refused.explain(name))


@final
class _Accumulating:
    """The context `accumulate` returns; one object, because it is entered in every micro-step."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.window = loop.window
        self.inside = False
        self._spread = loop.world.size > 1

    def __enter__(self) -> None:
        loop, window = self._loop, self.window
        loop.window = window
        window.begin(loop.loader)
        self.inside = True
        if self._spread and not window.sync:
            for model in window.models:
                loop.strategy.set_sync(model, False)

    def __exit__(self, *_: object) -> None:
        window = self.window
        self.inside = False
        if self._spread and not window.sync:
            for model in window.models:
                self._loop.strategy.set_sync(model, True)
        window.end()


def _choose_strategy(config: RunConfig, world: World, ddp: DDPOptions, place: bool) -> Strategy:
    asked = config.strategy or "auto"
    if asked == "single" and world.size > 1:
        raise ConfigError(
            f"strategy='single' was asked for, but there are {world.size} ranks; use 'ddp' or launch one"
        )
    accumulates = (config.gradient_accumulation_steps or 1) > 1
    if world.size > 1:
        return DDP(world, options=ddp, place=place, accumulates=accumulates)
    return Single(world.device if place else None)


def _make_control(config: RunConfig, world: World, precision: str) -> Control | None:
    """None where nobody can ask for anything, so that a step costs nothing for it."""
    every: int | float | None = None
    if config.save_every is not None:
        steps = isinstance(config.save_every, int)
        every = config.save_every if steps else duration_seconds(config.save_every, what="save_every")  # type: ignore[assignment]
    after = None if config.stop_after is None else duration_seconds(config.stop_after, what="stop_after")
    if not events.active() and every is None and after is None:
        return None
    agreed = f"mixed_precision={precision}, accumulation={config.gradient_accumulation_steps or 1}"
    saves = config.project_dir is not None and (every or after or config.resume) is not None
    return Control(world, stop_after=after, save_every=every, save_on_stop=saves, agreed=agreed)


def _on(function: Callable[..., Any] | None, wanted: int | None, index: int) -> Any:
    if function is None:
        return lambda fn: processes.only_if(index == wanted, fn)
    return processes.only_if(index == (wanted or 0), function)


def _all_tensors(value: Any) -> bool:
    found: list[bool] = []
    map_leaves(lambda leaf: found.append(isinstance(leaf, Tensor)), value)
    return bool(found) and all(found)
