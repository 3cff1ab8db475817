"""accelerate's Accelerator: its arguments turned into nbaccel's, its names into those of `nbaccel.Accelerator`.

Everything that is not here is the same method there. Where the two behave differently, this one keeps to the
arrangement scripts count on (full last batches, contiguous shares, iterables read by rank 0), and to nbaccel's
arithmetic; docs/migration.md lists it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, final, get_args

from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from nbaccel import core
from nbaccel.compat.accelerate.data_loader import LoadedLoader, SkippedLoader, skip_first_batches
from nbaccel.compat.accelerate.parallelism_config import ParallelismConfig
from nbaccel.compat.accelerate.state import AcceleratorState, GradientState, asked, remember, type_of
from nbaccel.compat.accelerate.utils.dataclasses import (
    AORecipeKwargs,
    AutocastKwargs,
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    DistributedType,
    FP8RecipeKwargs,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    KwargsHandler,
    ProfileKwargs,
    ProjectConfiguration,
    TERecipeKwargs,
)
from nbaccel.compat.accelerate.utils.operations import reduction_of
from nbaccel.compat.accelerate.utils.other import save
from nbaccel.compat.accelerate.utils.plugins import (
    DeepSpeedPlugin,
    FullyShardedDataParallelPlugin,
    TorchDynamoPlugin,
    TorchTensorParallelPlugin,
)
from nbaccel.core.data import ShardedLoader
from nbaccel.core.nested import map_leaves
from nbaccel.core.refused import refuse_parameters
from nbaccel.core.trackers import Tracker
from nbaccel.core.world import join
from nbaccel.errors import ConfigError

__all__ = ["Accelerator", "DataLoaderConfiguration", "GradientAccumulationPlugin"]


@final
class Accelerator:
    """`nbaccel.Accelerator` with accelerate's arguments and names.

    Args:
        **options: those of `nbaccel.Accelerator`, such as `scheduler_steps="per_rank"`.

    Raises:
        ConfigError: what is asked does not exist here; the message names our way.
    """

    __slots__ = (
        "__weakref__",
        "_autocast",
        "_core",
        "_profile",
        "_state",
        "dataloader_config",
        "parallelism_config",
        "project_configuration",
    )

    def __init__(
        self,
        device_placement: bool = True,
        mixed_precision: str | None = None,
        gradient_accumulation_steps: int = 1,
        cpu: bool = False,
        dataloader_config: DataLoaderConfiguration | None = None,
        deepspeed_plugin: DeepSpeedPlugin | None = None,
        fsdp_plugin: FullyShardedDataParallelPlugin | None = None,
        torch_tp_plugin: TorchTensorParallelPlugin | None = None,
        rng_types: Sequence[Any] | None = None,
        log_with: Any = None,
        project_dir: Any = None,
        project_config: ProjectConfiguration | None = None,
        gradient_accumulation_plugin: GradientAccumulationPlugin | None = None,
        step_scheduler_with_optimizer: bool = True,
        kwargs_handlers: Sequence[Any] | None = None,
        dynamo_backend: Any = None,
        dynamo_plugin: TorchDynamoPlugin | None = None,
        parallelism_config: ParallelismConfig | None = None,
        **options: Any,
    ) -> None:
        self.dataloader_config = dataloader_config or DataLoaderConfiguration()
        self.project_configuration = _project(project_config, project_dir)
        by_kind = _by_kind(kwargs_handlers)
        self._autocast = by_kind.get(AutocastKwargs, AutocastKwargs())
        self._profile = by_kind.get(ProfileKwargs, ProfileKwargs())
        ddp, scaler = by_kind.get(DistributedDataParallelKwargs), by_kind.get(GradScalerKwargs)
        fp8 = [
            one for kind, one in by_kind.items() if kind in (AORecipeKwargs, FP8RecipeKwargs, TERecipeKwargs)
        ]
        if len(fp8) > 1:
            raise ConfigError(f"kwargs_handlers holds {len(fp8)} recipes for fp8")
        if group := by_kind.get(InitProcessGroupKwargs):
            join(asked(cpu, group.timeout))
        dynamo = dynamo_plugin or TorchDynamoPlugin(backend=dynamo_backend)
        steps, clipping = _accumulation(
            gradient_accumulation_steps, gradient_accumulation_plugin, deepspeed_plugin
        )
        given: dict[str, Any] = {
            "mixed_precision": None if mixed_precision is None else _value(mixed_precision),
            "gradient_accumulation_steps": steps,
            "gradient_clipping": clipping,
            "strategy": _strategy(parallelism_config, fsdp_plugin, deepspeed_plugin, torch_tp_plugin),
            "split_batches": self.dataloader_config.split_batches or None,
            "dispatch_batches": self.dataloader_config.dispatch_batches,
            "even_batches": None if self.dataloader_config.even_batches else False,
            "log_with": _trackers(log_with),
            "project_dir": self.project_configuration.project_dir,
            "keep": self.project_configuration.total_limit,
            "step_scheduler_with_optimizer": None if step_scheduler_with_optimizer else False,
            "ddp": ddp and ddp.options(),
            "scaler": scaler and scaler.options(),
            "fp8": fp8[0].options() if fp8 else None,
            "compile": dynamo.compile(),
        }
        for name in [name for name, value in given.items() if value is None or name in options]:
            if given.pop(name) is not None:
                raise ConfigError(f"{name} is asked twice: by accelerate's argument for it and by nbaccel's")
        self._core = core.Accelerator(cpu=cpu, device_placement=device_placement, **given, **options)
        if parallelism_config is not None:
            parallelism_config.check(self._core.num_processes)
        self.parallelism_config = parallelism_config
        if self.project_configuration.automatic_checkpoint_naming and self._core.project_dir is not None:
            # There scripts look for them, and for tracker files beside them.
            self._core._saving.project_dir = Path(self._core.project_dir) / "checkpoints"
        remember(self._core)
        self._state = AcceleratorState(accelerator=self._core)

    # Who and where -----------------------------------------------------------------------------------

    @property
    def state(self) -> AcceleratorState:
        """The ranks, and what this Accelerator computes in."""
        return self._state

    @property
    def gradient_state(self) -> GradientState:
        """Where the loop is in its accumulation window."""
        return GradientState(self._core)

    @property
    def distributed_type(self) -> DistributedType:
        """How the ranks are spread."""
        return type_of(self._core.world, self._core.strategy.name)

    @property
    def is_fsdp2(self) -> bool:
        """Whether models are sharded by FSDP."""
        return self._state.is_fsdp2

    is_composable_parallelism_enabled = is_fsdp2

    @property
    def should_save_model(self) -> bool:
        """Always: every rank calls `save_model`, and each writes its part."""
        return True

    @property
    def deepspeed_plugin(self) -> None:
        """None, as in the state."""

    @property
    def split_batches(self) -> bool:
        """Whether the loaders' batch size is that of all ranks together, by whoever asked for it."""
        return bool(self._core.config.split_batches) or self.dataloader_config.split_batches

    @property
    def dispatch_batches(self) -> bool | None:
        """Whether rank 0 reads for all ranks, by whoever asked for it; None: iterable data sets only."""
        launched = self._core.config.dispatch_batches
        return self.dataloader_config.dispatch_batches if launched is None else launched

    @property
    def even_batches(self) -> bool:
        """Whether last batches are filled with repeated samples on several ranks, by whoever asked for it."""
        launched = self._core.config.even_batches
        return self.dataloader_config.even_batches if launched is None else launched

    @even_batches.setter
    def even_batches(self, value: bool) -> None:
        if self._core.config.even_batches not in (None, value):
            raise ConfigError(
                f"even_batches={value} is set, but {self._core.config.even_batches} was asked of this Accelerator or "
                "its launch: ask for it in one place"
            )
        self.dataloader_config.even_batches = value

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-steps per optimizer step. Set on all ranks, between two windows, it holds from the next one on."""
        return self._core.gradient_accumulation_steps

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, value: int) -> None:
        self._core.gradient_accumulation_steps = value

    @property
    def sync_gradients(self) -> bool:
        """Whether this micro-step (or the last one) ends its window."""
        return self._core.sync_gradients

    @sync_gradients.setter
    def sync_gradients(self, value: bool) -> None:
        self._core.sync_gradients = value

    @property
    def use_seedable_sampler(self) -> bool:
        """Always: orders come from (seed, epoch)."""
        return True

    @property
    def use_stateful_dataloader(self) -> bool:
        """Whether `load_state` lets loaders go on within their epoch; every prepared loader has `state_dict`."""
        return self.dataloader_config.use_stateful_dataloader

    @property
    def non_blocking(self) -> bool:
        """Always: batches are moved while the loop computes."""
        return True

    @property
    def logging_dir(self) -> str | None:
        """Where tracker files go: the project's folder."""
        return self._core.project_dir

    @property
    def trackers(self) -> list[Tracker]:
        """The trackers that run, on the main process; on other ranks none."""
        return self._core._log.trackers

    @property
    def save_iteration(self) -> int:
        """How many checkpoints this Accelerator has saved into its project."""
        return self.project_configuration.iteration

    # Preparing ---------------------------------------------------------------------------------------

    def prepare(self, *args: Any, device_placement: Sequence[bool | None] | None = None) -> Any:
        """The objects made ready, in the order given."""
        places = device_placement or [None] * len(args)
        ready = [self._loaders_prepared(one, place) for one, place in zip(args, places, strict=True)]
        return self._core.prepare(*ready, device_placement=device_placement)

    def _loaders_prepared(self, value: Any, place: bool | None) -> Any:
        return map_leaves(
            lambda leaf: self.prepare_data_loader(leaf, place) if isinstance(leaf, DataLoader) else leaf,
            value,
        )

    def prepare_data_loader(
        self,
        data_loader: DataLoader[Any] | ShardedLoader,
        device_placement: bool | None = None,
        slice_fn_for_dispatch: Any = None,
    ) -> ShardedLoader:
        """The loader divided over the ranks as `dataloader_config` says."""
        options = self._loader_options(isinstance(data_loader.dataset, IterableDataset))
        if slice_fn_for_dispatch is not None:
            options["slice_fn_for_dispatch"] = slice_fn_for_dispatch  # refused there
        return self._core.prepare_data_loader(data_loader, device_placement, **options)

    def _loader_options(self, iterable: bool) -> dict[str, Any]:
        shard, seed = self._core.config.shard or "contiguous", self.dataloader_config.data_seed
        dispatch = self.dispatch_batches
        readers = self._core.strategy.data_axis.size
        if dispatch is None:
            dispatch = iterable and shard != "none" and readers == self._core.num_processes
        options: dict[str, Any] = {
            "dispatch": dispatch,
            "even_batches": self.even_batches and readers > 1,
            "tell_repeats": bool(self._core.config.even_batches),  # else it is only accelerate's default
            "shard": shard,
            "split_batches": self.split_batches,
        }
        return options if seed is None else {**options, "seed": seed}

    def skip_first_batches(
        self, dataloader: DataLoader[Any] | ShardedLoader | SkippedLoader, num_batches: int = 0
    ) -> SkippedLoader:
        """The loader without the first `num_batches` of each epoch; passes over itself are whole."""
        return skip_first_batches(dataloader, num_batches)

    # The loop ----------------------------------------------------------------------------------------

    def autocast(self, autocast_handler: AutocastKwargs | None = None) -> AbstractContextManager[Any]:
        """A context that computes in the precision in force."""
        asked = autocast_handler or self._autocast
        return self._core.autocast(enabled=asked.enabled, cache_enabled=asked.cache_enabled is not False)

    def profile(self, profile_handler: ProfileKwargs | None = None) -> AbstractContextManager[Any]:
        """A torch profiler; each rank writes its trace to the handler's `output_trace_dir`, if it has one."""
        asked = profile_handler or self._profile
        return self._core.profile(asked.output_trace_dir, **asked.options())

    def log(self, values: dict[str, Any], step: int | None = None, log_kwargs: Any = None) -> None:
        """Logs values to the trackers and the dashboard."""
        self._core.log(values, step, **({"log_kwargs": log_kwargs} if log_kwargs else {}))

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """The sum or mean over the ranks, times `scale`; "none" is the sum, as in accelerate."""
        return self._core.reduce(tensor, reduction_of(reduction), scale)

    # Saving ------------------------------------------------------------------------------------------

    def save(self, obj: Any, f: Any, safe_serialization: bool = False) -> None:
        """Writes `obj` to `f` on the main process."""
        save(obj, f, safe_serialization=safe_serialization)

    def save_state(
        self, output_dir: Any = None, safe_serialization: bool = True, **save_model_func_kwargs: Any
    ) -> str:
        """Saves everything prepared and registered; returns the folder.

        With automatic naming that is the next `checkpoint_<number>` of the project's folder `checkpoints`.
        """
        project = self.project_configuration
        folder = None if project.automatic_checkpoint_naming else output_dir
        path = self._core.save_state(folder, safe_serialization=safe_serialization, **save_model_func_kwargs)
        project.iteration += folder is None
        return path

    def load_state(
        self,
        input_dir: Any = None,
        load_kwargs: Any = None,
        *,
        strict: bool = True,
        allow_pickle: bool = False,
        **load_model_func_kwargs: Any,
    ) -> None:
        """Loads a checkpoint, the project's newest complete one if no folder is given.

        Loaders are put at the start of the epoch they were in (of the next one after its last batch), for the script
        to skip what it has seen; with `use_stateful_dataloader` they go on within it.
        """
        extra = {"load_kwargs": load_kwargs} if load_kwargs else {}
        refuse_parameters("load_state", {**extra, **load_model_func_kwargs})
        stateful = self.use_stateful_dataloader
        self._core._saving.load(
            input_dir,
            strict=strict,
            allow_pickle=allow_pickle,
            filled=lambda loader: LoadedLoader(loader, stateful=stateful),
        )

    def save_model(
        self,
        model: nn.Module,
        save_directory: Any,
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Writes the model's weights as safetensors."""
        self._core.save_model(model, save_directory, max_shard_size, safe_serialization=safe_serialization)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in Accelerator.__slots__:
            raise AttributeError(name)
        return getattr(self._core, name)


def _project(given: ProjectConfiguration | None, project_dir: Any) -> ProjectConfiguration:
    project = given or ProjectConfiguration()
    if project_dir is not None and project.project_dir is None:
        project.project_dir = str(project_dir)
    if project.save_on_each_node:
        raise ConfigError(
            "ProjectConfiguration(save_on_each_node=True): a checkpoint is one folder that all ranks see, on a file "
            "system they share. Leave it out."
        )
    elsewhere = project.logging_dir is not None and str(project.logging_dir) != str(project.project_dir)
    if elsewhere and join().is_main:
        warnings.warn(
            f"logging_dir={str(project.logging_dir)!r}: tracker files go below project_dir here", stacklevel=3
        )
    return project


def _by_kind(handlers: Sequence[Any] | None) -> dict[type, Any]:
    known = get_args(KwargsHandler)
    found: dict[type, Any] = {}
    for one in handlers or ():
        if type(one) not in known:
            raise ConfigError(
                f"kwargs_handlers: a {type(one).__name__} cannot be honoured; there are "
                f"{', '.join(kind.__name__ for kind in known)}, of nbaccel.compat.accelerate"
            )
        if type(one) in found:
            raise ConfigError(f"kwargs_handlers holds two {type(one).__name__}")
        found[type(one)] = one
    return found


def _accumulation(
    steps: int, plugin: GradientAccumulationPlugin | None, deepspeed: DeepSpeedPlugin | None
) -> tuple[int | None, float | None]:
    """Micro-steps per optimizer step and the norm to clip to, where somebody asks for them."""
    asked = {steps} - {1}
    clipping = None
    if plugin is not None:
        plugin.check()
        asked |= {plugin.num_steps or 1} - {1}
    if deepspeed is not None:
        asked |= {deepspeed.number("gradient_accumulation_steps") or 1} - {1}
        clipping = deepspeed.number("gradient_clipping")
    if len(asked) > 1:
        raise ConfigError(
            f"gradient_accumulation_steps is asked twice: {' and '.join(map(str, sorted(asked)))}"
        )
    return (asked.pop() if asked else None), clipping


def _strategy(parallelism: ParallelismConfig | None, *plugins: Any) -> Any:
    given = [one for one in plugins if one is not None]
    if len(given) > 1:
        names = " and ".join(type(one).__name__ for one in given)
        raise ConfigError(
            f"{names} cannot go together; nbaccel has FSDP(tensor_parallel=TensorParallel(...))"
        )
    asked = given[0].strategy() if given else None
    return asked if parallelism is None else parallelism.strategy(asked)


def _trackers(log_with: Any) -> Any:
    if isinstance(log_with, (list, tuple)):
        return [_value(one) for one in log_with]
    return _value(log_with)


def _value(choice: Any) -> Any:
    """The text of an enum's member."""
    return getattr(choice, "value", choice)
