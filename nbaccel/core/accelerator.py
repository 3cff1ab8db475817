"""The Accelerator: the training loop's one facade. Each method is a check and a delegation.

Longer than other files because the names are those of Hugging Face Accelerate's Accelerator, of which
there are many; nothing is decided here that `loop`, `strategies`, `saving` and the rest do not own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, final

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle

from nbaccel.core import refused
from nbaccel.core.assembly import (
    asked_config,
    check_change,
    check_flag,
    choices,
    choose_strategy,
    ddp_options,
    fp8_options,
    loader_options,
    make_control,
    scheduler_repeat,
    split_trackers,
)
from nbaccel.core.checkpoint import Loaded
from nbaccel.core.checkpoint.modules import canonical_name
from nbaccel.core.choosing import leave_to_planner
from nbaccel.core.comm import collectives
from nbaccel.core.data import Shard, ShardedLoader
from nbaccel.core.loop.accumulate import LossWeighting
from nbaccel.core.loop.communicator import Communicator
from nbaccel.core.loop.control import tell_choices
from nbaccel.core.loop.knobs import Knobs
from nbaccel.core.loop.loop import Loop
from nbaccel.core.loop.micro_steps import MicroSteps
from nbaccel.core.loop.step_times import StepTimes, Stopwatch, profiled
from nbaccel.core.loop.trust import TrustChecks
from nbaccel.core.loop.wrappers import PreparedOptimizer, PreparedScheduler, restore_forward
from nbaccel.core.memory import meet_in_search
from nbaccel.core.model.compiling import uncompiled
from nbaccel.core.precision import ScalerOptions, choose_precision, probe_hardware
from nbaccel.core.preparing import Preparing
from nbaccel.core.processes import Processes
from nbaccel.core.regrouping import Regrouping
from nbaccel.core.rng import set_seed
from nbaccel.core.save_model import save_model
from nbaccel.core.saving import Saving
from nbaccel.core.sharding.context import divide_context
from nbaccel.core.strategies.ddp import DDPOptions
from nbaccel.core.trackers import Block, Logbook, Tracked, Tracker
from nbaccel.core.world import join, read_environment
from nbaccel.errors import ConfigError
from nbaccel.fp8 import FP8Options
from nbaccel.parallel import StrategyLike
from nbaccel.wire import events, occasions

if TYPE_CHECKING:
    from nbaccel.core.plan import Plan

__all__ = ["Accelerator"]

T = TypeVar("T", bool, int, float, str)


@final
class Accelerator(Processes):
    """Runs one training loop on one process or many.

    Every argument left None takes what the launch, the YAML file or the environment asked.

    Args:
        mixed_precision: "no", "bf16", "fp16", "fp8" or "auto".
        gradient_accumulation_steps: micro-steps per optimizer step.
        cpu: compute on the CPU although there is an accelerator.
        device_placement: move models and batches to the device.
        strategy: "ddp" (if None), "fsdp", "deepspeed", "tensor_parallel", FSDP(...), DeepSpeed(...),
            TensorParallel(...), or "auto": the planner chooses, and `plan` says why.
        ddp: options of DistributedDataParallel.
        scaler: options of the fp16 gradient scaler.
        fp8: options of "fp8".
        gradient_clipping: what `step` and `clip_grad_norm_` clip to when the loop names no norm.
        loss_weighting: "samples": unequal batches count by their samples; "equal": each micro-step alike.
        scheduler_steps: scheduler steps per optimizer step: "one", or one "per_rank" as in scripts whose
            schedule was written for that (still one with split_batches).
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
        log_with: trackers to start in `init_trackers`: "jsonl", "csv", "tensorboard", "wandb", "mlflow", "comet_ml",
            "trackio", "aim", "all" that are installed, or your own.

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
        strategy: StrategyLike | None = None,
        ddp: DDPOptions | None = None,
        scaler: ScalerOptions | None = None,
        fp8: FP8Options | None = None,
        gradient_clipping: float | None = None,
        loss_weighting: LossWeighting | None = None,
        scheduler_steps: Literal["one", "per_rank"] | None = None,
        step_scheduler_with_optimizer: bool | None = None,
        split_batches: bool | None = None,
        even_batches: bool | None = None,
        dispatch_batches: bool | None = None,
        shard: Shard | None = None,
        per_sample_seed: bool | None = None,
        seed: int | None = None,
        compile: bool | str | None = None,
        project_dir: str | Path | None = None,
        save_every: int | str | None = None,
        stop_after: str | None = None,
        resume: str | None = None,
        keep: int | None = None,
        check_collectives: collectives.CheckMode | None = None,
        measure: bool | None = None,
        verify: bool | None = None,
        log_with: str | Tracker | Sequence[str | Tracker] | None = None,
        **unknown: Any,
    ) -> None:
        refused.refuse_arguments(unknown)
        environment = read_environment()
        names, trackers = split_trackers(log_with)
        check_flag("measure", measure)
        self.config = config = asked_config(
            environment.config,
            mixed_precision=mixed_precision,
            gradient_accumulation_steps=gradient_accumulation_steps,
            device="cpu" if cpu else None,
            strategy=strategy,
            gradient_clipping=gradient_clipping,
            loss_weighting=loss_weighting,
            scheduler_steps=scheduler_steps,
            step_scheduler_with_optimizer=step_scheduler_with_optimizer,
            split_batches=split_batches,
            even_batches=even_batches,
            dispatch_batches=dispatch_batches,
            shard=shard if isinstance(shard, str) else None,
            per_sample_seed=per_sample_seed,
            check_collectives=check_collectives,
            seed=seed,
            compile=compile,
            project_dir=str(project_dir) if isinstance(project_dir, Path) else project_dir,
            save_every=save_every,
            stop_after=stop_after,
            resume=resume,
            keep=keep,
            verify=verify,
            log_with=names,
        )
        self.world = world = join(config, environment)
        meet_in_search(world)
        hardware = probe_hardware(world.device)
        self._precision = choose_precision(
            config.mixed_precision,
            hardware,
            scaler=scaler,
            fp8=fp8_options(config, fp8),
            speak=world.is_main,
        )
        if config.seed is not None:
            set_seed(config.seed)
        how = config, world, ddp_options(config, ddp), self._precision
        self._auto = leave_to_planner(*how)
        self.strategy = self._auto or choose_strategy(*how)
        chosen = choices(self._precision, self.strategy)
        tell_choices(chosen)
        watched = events.active()
        self._knobs = Knobs(world)
        self._loop = loop = Loop(
            world=world,
            strategy=self.strategy,
            precision=self._precision,
            control=make_control(config, world, self._knobs, chosen),
            stopwatch=Stopwatch(world.device) if (watched if measure is None else measure) else None,
            length=config.gradient_accumulation_steps or 1,
            weighting=config.loss_weighting or "samples",
        )
        self._saving = Saving(
            world,
            loop,
            self._knobs,
            project_dir=config.project_dir,
            keep=config.keep,
            resume=config.resume,
        )
        self._talk = Communicator(loop, config.check_collectives or "sampled")
        self._log = self._open_logbook(trackers)
        trust = None
        if watched if config.verify is None else config.verify:
            trust = TrustChecks(loop, self.strategy.unwrap)
            loop.watch(trust)
        self._regrouping = Regrouping(loop, trust, self._saving.loaders)
        self._loader_options = loader_options(config, shard)
        self._preparing = Preparing(
            loop,
            self._saving,
            self._precision,
            place=device_placement,
            compile=config.compile,
            loader_options=self._loader_options,
            scheduler_follows=config.step_scheduler_with_optimizer is not False,
            scheduler_repeat=scheduler_repeat(config, world),
            trust=trust,
            chooser=self._auto,
        )
        self._micro_steps = MicroSteps(loop, self._preparing.prepared_or_same)

    def _open_logbook(self, trackers: Sequence[Tracker]) -> Logbook:
        config, loop = self.config, self._loop
        logbook = Logbook(
            self.world,
            wanted=(*(config.log_with or ()), *trackers),
            folder=config.project_dir,
            reduce=self._talk.reduce,
            step=lambda: loop.steps,
            led=lambda: loop.led,
        )
        loop.after_pass = logbook.flushing()
        occasions.at_call_end(logbook.returned)
        return logbook

    # Who and where -----------------------------------------------------------------------------------

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
        """The precision in force: "no", "fp16", "bf16" or "fp8"."""
        return self._precision.kind

    @property
    def plan(self) -> Plan | None:
        """What the planner chose, and why not the others: print it. None before a model is prepared, and where
        the strategy asked for left nothing open."""
        return None if self._auto is None else self._auto.plan

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-steps per optimizer step. Set on all ranks, between two windows, it holds from the next one on."""
        return self._loop.length

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, count: int) -> None:
        check_change(self.config, "gradient_accumulation_steps", count)
        self._loop.change_length(count)

    @property
    def project_dir(self) -> str | None:
        """Where checkpoints and tracker files go."""
        return self.config.project_dir

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """What the prepared optimizers step, in the order they were prepared."""
        return tuple(self._saving.optimizers)

    @property
    def split_batches(self) -> bool:
        """Whether the loaders' batch size is that of all ranks together."""
        return bool(self._loader_options["split_batches"])

    @property
    def even_batches(self) -> bool:
        """Whether last batches are filled with repeated samples. Set, it holds for loaders prepared from then on."""
        return bool(self._loader_options["even_batches"])

    @even_batches.setter
    def even_batches(self, even: bool) -> None:
        check_change(self.config, "even_batches", even)
        self._loader_options["even_batches"] = even

    @property
    def dispatch_batches(self) -> bool:
        """Whether rank 0 reads for all ranks."""
        return bool(self._loader_options["dispatch"])

    def wait_for_everyone(self) -> None:
        """Waits until every rank is here."""
        self._talk.barrier()

    def set_trigger(self) -> None:
        """Raises a flag that `check_trigger` shows to all ranks."""
        self._talk.set_trigger()

    def check_trigger(self) -> bool:
        """Whether any rank has called `set_trigger` since the last check. Called on all ranks."""
        return self._talk.check_trigger()

    # The loop ----------------------------------------------------------------------------------------

    def prepare(self, *objects: Any, device_placement: Sequence[bool | None] | None = None) -> Any:
        """The objects made ready, in the order given: models, optimizers, loaders, schedulers, and lists,
        tuples or dicts of them. What is prepared already comes back as it is.

        Raises:
            ConfigError: nothing was given, or something that cannot be prepared.
        """
        return self._preparing.all(objects, device_placement)

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """The model on its device, in its precision, spread over the ranks unless `evaluation_mode`."""
        return self._preparing.model(model, device_placement, evaluation_mode)

    def prepare_optimizer(
        self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None
    ) -> PreparedOptimizer:
        """The optimizer, stepping only where gradients are synchronised."""
        return self._preparing.optimizer(optimizer)

    def prepare_data_loader(
        self,
        data_loader: DataLoader[Any] | ShardedLoader,
        device_placement: bool | None = None,
        **options: Any,
    ) -> ShardedLoader:
        """The loader divided over the ranks; `options` are those of `ShardedLoader`."""
        if "slice_fn_for_dispatch" in options:
            refused.refuse_parameters("prepare_data_loader", options)
        return self._preparing.loader(data_loader, device_placement, **options)

    def prepare_scheduler(self, scheduler: Any) -> PreparedScheduler:
        """The scheduler, stepping once per optimizer step."""
        return self._preparing.scheduler(scheduler)

    def prepare_inference(
        self,
        model: nn.Module,
        *,
        tensor_parallel: int = 1,
        dtype: torch.dtype | None = None,
        **unknown: Any,
    ) -> nn.Module:
        """DeepSpeed's inference engine around a model that is only run: call it, or its `generate`.

        Called on all ranks with the same weights. The model is changed in place and set to evaluation.

        Args:
            tensor_parallel: 1, or the number of ranks: each holds a part of every layer, and all are given the
                same inputs. For the models of Hugging Face that DeepSpeed can divide.
            dtype: what it is converted to; None: as it is.

        Raises:
            ConfigError: DeepSpeed is not installed, cannot divide the model, or an option needs CUDA kernels.
        """
        from nbaccel.core.inference import inference_engine

        return inference_engine(
            model, world=self.world, tensor_parallel=tensor_parallel, dtype=dtype, unknown=unknown
        )

    def backward(self, loss: Tensor, weight: float | Tensor | None = None, **kwargs: Any) -> None:
        """Computes gradients; scaled so that the window's gradient is that of the mean over its samples.

        Args:
            weight: `loss` is a sum over this many units (tokens): the window's gradient becomes that of
                the mean over all units of all ranks. Without accumulation each backward is a mean by itself, and
                several before a step add up.

        Raises:
            ConfigError: the loss is not one number; with accumulation, a second weight in a micro-step.
        """
        loop = self._loop
        if weight is None and loop.simple:
            loop.simple_backward(loss, kwargs)
        else:
            loop.backward(loss, weight, kwargs)

    def pipeline_step(self, batch: Any) -> Tensor:
        """Forward and backward of (inputs, targets) under strategy=Pipeline(...), whose passes alternate: in place of
        calling the model and `backward`. Under `torch.no_grad()` the forward only. Called on all ranks; the mean
        loss comes back on each, 0-d.

        Raises:
            ConfigError: another strategy, or the batch is no pair of tensors.
        """
        return self._loop.pipeline_step(batch)

    def maybe_context_parallel(
        self,
        buffers: Sequence[Tensor] | None = None,
        buffer_seq_dims: Sequence[int] | None = None,
        no_restore_buffers: set[Tensor] | None = None,
    ) -> AbstractContextManager[Any]:
        """A context in which, under ContextParallel(...), each of `buffers` is in place this rank's piece of the
        sequence, and attention sees the whole; under others nothing happens.

        Args:
            buffers: inputs, labels (shifted already: a piece does not see the next one's first token), positions.
            buffer_seq_dims: the sequence's dimension in each.
            no_restore_buffers: those that need not be put together again afterwards.

        Raises:
            ConfigError: a sequence that does not divide.
        """
        return divide_context(
            self.strategy.context_mesh, buffers or (), buffer_seq_dims or (), no_restore_buffers or set()
        )

    def accumulate(self, *models: nn.Module) -> AbstractContextManager[None]:
        """A micro-step: gradients of these models (of all, if none is named) are synchronised in the last
        one of a window, and only then do optimizers and schedulers step."""
        return self._micro_steps.of(models)

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

        Inside or outside `accumulate`. Returns the norm before clipping, where it was clipped: to `clip`, or to
        the gradient_clipping that was asked of the Accelerator or the launch.
        """
        clip = self._norm(clip)
        return self._micro_steps.step(
            loss, optimizer, scheduler, weight, clip, do_backward=self.backward, do_clip=self.clip_grad_norm_
        )

    @property
    def sync_gradients(self) -> bool:
        """Whether this micro-step (or the last one) ends its window."""
        return self._loop.window.sync

    @sync_gradients.setter
    def sync_gradients(self, _: bool) -> None:
        raise ConfigError(refused.SET_SYNC_GRADIENTS)

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether the last optimizer step was left out because of an fp16 overflow; under ZeRO, of any gradient that is
        not finite."""
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

    def autocast(
        self, *, enabled: bool = True, cache_enabled: bool = True, **unknown: Any
    ) -> AbstractContextManager[Any]:
        """A context that computes in the precision in force."""
        refused.refuse_parameters("autocast", unknown)
        return self._precision.autocast(enabled=enabled, cache_enabled=cache_enabled)

    def unscale_gradients(self, optimizer: Any = None) -> None:
        """Takes the fp16 scale off the gradients of the optimizer(s), all if None; once per window."""
        given = self._saving.optimizers if optimizer is None else optimizer
        listed = given if isinstance(given, (list, tuple)) else [given]
        if self._loop.scaling is not None:
            self._loop.scaling.unscale(
                [o.optimizer if isinstance(o, PreparedOptimizer) else o for o in listed]
            )

    def clip_grad_norm_(
        self, parameters: Tensor | Iterable[Tensor], max_norm: float | None = None, norm_type: float = 2.0
    ) -> Tensor | None:
        """Clips the gradients' total norm at the end of a window; returns the norm before (0-d), or None
        where the window goes on. Without `max_norm` it is the gradient_clipping that was asked."""
        max_norm = self._norm(max_norm)
        if max_norm is None:
            raise ConfigError("clip_grad_norm_ needs max_norm: no gradient_clipping was asked of the launch")
        loop = self._loop
        if not loop.window.sync:
            return None
        listed = [parameters] if isinstance(parameters, Tensor) else parameters
        if loop.scaling is not None:
            listed = list(listed)
            loop.scaling.unscale(self._saving.optimizers, listed)
        return self.strategy.clip_grad_norm(listed, max_norm, norm_type)

    def _norm(self, given: float | None) -> float | None:
        """What to clip to, given what the loop says."""
        asked = self.config.gradient_clipping
        if asked is None or given is None or given == asked:
            return given if asked is None else asked
        place = self.config.sources.get("gradient_clipping", "the launch")
        raise ConfigError(
            f"gradient_clipping is asked twice: {asked} by {place} and {given} by the loop. Ask for it in one place."
        )

    def clip_grad_value_(self, parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
        """Clips each gradient's values at the end of a window."""
        loop = self._loop
        if loop.window.sync:
            listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            if loop.scaling is not None:
                loop.scaling.unscale(self._saving.optimizers, listed)
            self.strategy.clip_grad_value(listed, clip_value)

    @contextmanager
    def join_uneven_inputs(
        self, joinables: Sequence[Any], even_batches: bool | None = None
    ) -> Iterator[None]:
        """A context in which ranks may run out of batches at different times.

        Prepared loaders give every rank equally many anyway. `even_batches`: whether passes that begin inside
        fill the last batch with repeated samples.
        """
        with ExitStack() as stack:
            stack.enter_context(self._loop.unevenly())
            stack.enter_context(self.strategy.join([m for m in joinables if isinstance(m, nn.Module)]))
            for loader in self._saving.loaders if even_batches is not None else ():
                stack.enter_context(loader.filling(bool(even_batches)))
            yield

    def unwrap_model(
        self, model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True
    ) -> nn.Module:
        """The user's own module. It keeps computing in the precision unless `keep_fp32_wrapper` is False, and stays
        compiled unless `keep_torch_compile` is."""
        inner = self.strategy.unwrap(model)
        if not keep_fp32_wrapper:
            restore_forward(inner)
        if not keep_torch_compile:
            inner = uncompiled(inner)
        return inner

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """The model's whole state dict on every rank, under the user's names; as the wrapped module keeps it
        if `unwrap` is False. Called on all ranks."""
        return self.strategy.full_state_dict(model, rank_zero_only=False) if unwrap else model.state_dict()

    def free_memory(self, *objects: Any) -> list[Any]:
        """Forgets everything prepared; returns a None for each object: `a, b = acc.free_memory(a, b)`."""
        self._preparing.forget()
        self._micro_steps.of(())
        return [None] * len(objects)

    clear = free_memory

    # Talking to the other ranks ----------------------------------------------------------------------

    def gather(self, tensor: Any) -> Any:
        """Every rank's tensors, concatenated along dimension 0, in any nested structure."""
        return self._talk.gather(tensor)

    def gather_object(self, value: Any) -> list[Any]:
        """One object from each rank, in rank order."""
        return self._talk.gather_object(value)

    def gather_for_metrics(
        self, input_data: Any, use_gather_object: bool = False, *, loader: ShardedLoader | None = None
    ) -> Any:
        """What all ranks computed for the batch in hand: every real sample once, repeated ones left out.

        Objects (or any leaf that is no tensor) come back as one flat list.

        Args:
            loader: the prepared loader whose batch it is; None is the one whose loop was begun last.
        """
        return self._talk.gather_for_metrics(input_data, use_gather_object, loader)

    def reduce(self, tensor: Any, reduction: collectives.Reduction = "sum", scale: float = 1.0) -> Any:
        """The sum, mean, max or min over the ranks."""
        return self._talk.reduce(tensor, reduction, scale)

    def broadcast(self, tensor: Any, from_process: int = 0) -> Any:
        """One rank's tensors on every rank."""
        return self._talk.broadcast(tensor, from_process)

    def broadcast_object_list(self, object_list: list[Any], from_process: int = 0) -> list[Any]:
        """One rank's objects in every rank's list."""
        return self._talk.broadcast_object_list(object_list, from_process)

    def broadcast_module(self, module: nn.Module, from_process: int = 0) -> None:
        """One rank's parameters and buffers in every rank's module."""
        self._talk.broadcast_module(module, from_process)

    def pad_across_processes(
        self, tensor: Any, dim: int = 0, pad_index: float = 0, pad_first: bool = False
    ) -> Any:
        """Tensors padded along `dim` to the longest of all ranks."""
        return self._talk.pad_across_processes(tensor, dim, pad_index, pad_first)

    def all_to_all(self, tensor: Any) -> Any:
        """Chunk i of each rank's tensors goes to rank i."""
        return self._talk.all_to_all(tensor)

    def scatter(self, tensor: Any, from_process: int = 0) -> Any:
        """One rank's tensors cut into a piece for each rank."""
        return self._talk.scatter(tensor, from_process)

    # Logging and times -------------------------------------------------------------------------------

    def log(
        self,
        values: Mapping[str, Any],
        step: int | None = None,
        reduce: Literal["mean", "sum"] | None = None,
        **unknown: Any,
    ) -> None:
        """Logs values at an optimizer step: to the trackers and the dashboard.

        `step=None` is the present step: of the first optimizer, or the one named last where none is prepared.
        With `reduce` they are first reduced over the ranks, and this is to be called on all of them.
        """
        if unknown:
            refused.refuse_parameters("log", unknown)
        self._log.log(values, step=step, reduction=reduce)

    def log_images(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Gives the main process's pictures to its trackers; see `trackers.shapes.pictures` for what they may be."""
        self._log.log_images(values, step=step)

    def log_table(
        self,
        name: str,
        columns: Sequence[str] | None = None,
        data: Any = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        """Gives a table of the main process to its trackers: columns and rows, or a dataframe."""
        self._log.log_table(name, columns, data, dataframe, step=step)

    def log_artifact(self, path: str | Path, name: str | None = None) -> None:
        """Gives a file or folder of the main process to its trackers."""
        self._log.log_file(path, name)

    def track(self, name: str) -> AbstractContextManager[Block]:
        """A block whose durations and number of times are logged, and what it counts and logs itself:

        `with acc.track("eval") as block: ...; block.count("samples", 64); block.log({"accuracy": 0.9})`

        Blocks within get its name before theirs. Logged by the main process, summed up for each optimizer step."""
        return self._log.timings.track(name)

    def timed(self, name: str | Callable[..., Any]) -> Any:
        """Decorator: each call of the function is a block of this name, as in `track`."""
        return self._log.timings.timed(name)

    def tracked(self) -> dict[str, Tracked]:
        """What the blocks of `track` and `timed` have come to so far, by name; empty but on the main process."""
        return self._log.timings.read()

    def init_trackers(
        self,
        project_name: str = "run",
        config: Mapping[str, Any] | None = None,
        init_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Starts the trackers of `log_with`, on the main process; those that write files do below `project_dir`.

        Args:
            project_name: what the trackers call the project or experiment.
            config: the hyperparameters.
            init_kwargs: by tracker name, options of its own: {"wandb": {"mode": "offline"}}.

        Raises:
            ConfigError: no tracker was asked for, an unknown one, or it has nowhere to write.
        """
        self._log.start(project_name, config, init_kwargs)

    def get_tracker(self, name: str, unwrap: bool = False) -> Any:
        """The running tracker of that name (its own object with `unwrap`); on other ranks one that does nothing.

        Raises:
            ConfigError: there is none.
        """
        tracker = self._log.get(name)
        return tracker.tracker if unwrap else tracker

    def step_times(self) -> StepTimes:
        """Where the time has gone so far on this rank.

        Raises:
            ConfigError: nothing is measured.
        """
        if self._loop.stopwatch is None:
            raise ConfigError("nothing is measured here; make the Accelerator with measure=True")
        return self._loop.stopwatch.read()

    def profile(self, folder: str | Path | None = None, **options: Any) -> AbstractContextManager[Any]:
        """A torch profiler; each rank writes `trace-rank-N.json` to `folder` (or to the project's)."""
        if "profile_handler" in options:
            refused.refuse_parameters("profile", options)
        return profiled(folder or self.project_dir, self.process_index, options)

    # Saving and stopping -----------------------------------------------------------------------------

    @property
    def should_stop(self) -> bool:
        """Whether all ranks have agreed to stop: true from the same optimizer step on every rank, to the end of the
        session's call."""
        control = self._loop.control
        return control is not None and control.stopping

    @property
    def stopped_early(self) -> bool:
        """Whether the loop ended because it was asked to, or its time was up; in a session, the latest loop."""
        control = self._loop.control
        return control is not None and control.stopped_early

    @property
    def save_requested(self) -> bool:
        """Whether all ranks have agreed to save now; `save_state` answers it, and so does a prepared loader
        before its next batch."""
        control = self._loop.control
        return control is not None and control.saving

    def knob(self, name: str, default: T, *, low: float | None = None, high: float | None = None) -> T:
        """A value that can be changed from outside while the loop runs: `default` until then.

        Ask for it at every step. It changes between the same two optimizer steps on every rank, within `low`
        and `high`; every value it takes is told to the run's folder and dashboard, and checkpoints keep it.

        Raises:
            ConfigError: not a bool, number or string, outside its limits, or asked for with others before.
        """
        return self._knobs.value(name, default, low=low, high=high, step=self._loop.steps)

    def save_state(
        self, output_dir: str | Path | None = None, *, asynchronous: bool = False, **unknown: Any
    ) -> str:
        """Saves everything prepared and registered; returns the folder. Called on all ranks."""
        refused.refuse_parameters("save_state", unknown)
        return str(self._saving.save(output_dir, asynchronous=asynchronous))

    def load_state(
        self,
        input_dir: str | Path | None = None,
        *,
        strict: bool = True,
        allow_pickle: bool = False,
        **unknown: Any,
    ) -> Loaded:
        """Loads a checkpoint, the newest complete one if no folder is given. Called on all ranks."""
        refused.refuse_parameters("load_state", unknown)
        return self._saving.load(input_dir, strict=strict, allow_pickle=allow_pickle)

    def save_model(
        self,
        model: nn.Module,
        save_directory: str | Path,
        max_shard_size: int | str = "10GB",
        **unknown: Any,
    ) -> list[Path]:
        """Writes the model's weights as safetensors in Hugging Face's layout. Called on all ranks."""
        refused.refuse_parameters("save_model", unknown)
        inner = self.strategy.unwrap(model)
        whole = self.strategy.full_state_dict(model, rank_zero_only=True)
        state = {canonical_name(inner, name): tensor for name, tensor in whole.items()}
        files = save_model(state, save_directory, world=self.world, max_shard_size=max_shard_size)
        self.wait_for_everyone()
        return files

    def load_model(self, model: nn.Module, folder: str | Path, strict: bool = True) -> None:
        """Fills a prepared model from safetensors in Hugging Face's layout; each rank reads its part only, so a
        model made with `init_empty_weights` never is in any rank's memory as a whole. Called on all ranks."""
        said = self.strategy.load_weights(model, folder, strict=strict)
        if said and self.is_main_process:
            print(said, flush=True)
        self.wait_for_everyone()

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Saves these objects too; they need state_dict and load_state_dict."""
        self._saving.register(objects)

    def register_save_state_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Calls `hook(models, weights, folder)` before each save, on all ranks; weights that the main rank's
        hook takes off the list are not saved. `remove()` on what this returns takes the hook off."""
        return self._saving.before_saving(hook)

    def register_load_state_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Calls `hook(models, folder)` before each load, on all ranks; models that the main rank's hook takes
        off the list are not loaded. `remove()` on what this returns takes the hook off."""
        return self._saving.before_loading(hook)

    def end_training(self) -> None:
        """Waits for saves in the background, hands on the last logged values, closes the trackers."""
        self._log.close()
        self._saving.close()

    @property
    def fast_forwarding(self) -> bool:
        """Whether a resumed run is in an epoch it has behind it, whose loaders give no batches: a loop that evaluates,
        or saves, once per epoch goes on with `if acc.fast_forwarding: continue`. Schedulers' steps are left out by
        themselves."""
        return self._loop.resuming.active

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(refused.explain(name))
