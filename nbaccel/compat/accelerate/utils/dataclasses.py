"""accelerate's configuration objects, as scripts fill them in. They can be changed afterwards, as there.

What each asks is done by `nbaccel.compat.accelerate.accelerator`; what cannot be done is refused there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from datetime import timedelta
from enum import Enum
from typing import Any

from nbaccel.compat.accelerate.names import look_up
from nbaccel.core.precision import ScalerOptions
from nbaccel.core.strategies.ddp import DDPOptions
from nbaccel.errors import ConfigError
from nbaccel.fp8 import FP8Options

__all__ = [
    "AORecipeKwargs",
    "AutocastKwargs",
    "ComputeEnvironment",
    "DDPCommunicationHookType",
    "DataLoaderConfiguration",
    "DistributedDataParallelKwargs",
    "DistributedType",
    "DynamoBackend",
    "FP8RecipeKwargs",
    "GradScalerKwargs",
    "GradientAccumulationPlugin",
    "InitProcessGroupKwargs",
    "KwargsHandler",
    "LoggerType",
    "PrecisionType",
    "ProfileKwargs",
    "ProjectConfiguration",
    "RNGType",
    "TERecipeKwargs",
]


class DistributedType(str, Enum):
    """How the ranks are spread; equal to its value as text."""

    NO = "NO"
    MULTI_CPU = "MULTI_CPU"
    MULTI_GPU = "MULTI_GPU"
    MULTI_XPU = "MULTI_XPU"
    MULTI_NPU = "MULTI_NPU"
    MULTI_MLU = "MULTI_MLU"
    MULTI_SDAA = "MULTI_SDAA"
    MULTI_MUSA = "MULTI_MUSA"
    MULTI_HPU = "MULTI_HPU"
    MULTI_NEURON = "MULTI_NEURON"
    DEEPSPEED = "DEEPSPEED"
    FSDP = "FSDP"
    XLA = "XLA"
    MEGATRON_LM = "MEGATRON_LM"


class ComputeEnvironment(str, Enum):
    """Where scripts run."""

    LOCAL_MACHINE = "LOCAL_MACHINE"
    AMAZON_SAGEMAKER = "AMAZON_SAGEMAKER"


def _to_dict(self: Any) -> dict[str, Any]:
    """Its fields, copied."""
    return {one.name: copy.deepcopy(getattr(self, one.name)) for one in fields(self)}


def _to_kwargs(self: Any) -> dict[str, Any]:
    """Its fields that are not as by default, copied."""
    usual = _to_dict(type(self)())
    return {name: value for name, value in _to_dict(self).items() if value != usual[name]}


class PrecisionType(str, Enum):
    """In which numbers a model computes."""

    NO = "no"
    FP8 = "fp8"
    FP16 = "fp16"
    BF16 = "bf16"


class LoggerType(str, Enum):
    """The trackers, by name."""

    ALL = "all"
    AIM = "aim"
    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    TRACKIO = "trackio"
    COMETML = "comet_ml"
    MLFLOW = "mlflow"


class RNGType(str, Enum):
    """The random generators, by name."""

    TORCH = "torch"
    CUDA = "cuda"
    XPU = "xpu"
    XLA = "xla"
    GENERATOR = "generator"


class DDPCommunicationHookType(str, Enum):
    """In which form DistributedDataParallel sends gradients."""

    NO = "no"
    FP16 = "fp16"
    BF16 = "bf16"
    POWER_SGD = "power_sgd"
    BATCHED_POWER_SGD = "batched_power_sgd"


class DynamoBackend(str, Enum):
    """What torch.compile compiles with; all but the first and inductor are refused."""

    NO = "NO"
    EAGER = "EAGER"
    AOT_EAGER = "AOT_EAGER"
    INDUCTOR = "INDUCTOR"
    AOT_TS_NVFUSER = "AOT_TS_NVFUSER"
    NVPRIMS_NVFUSER = "NVPRIMS_NVFUSER"
    CUDAGRAPHS = "CUDAGRAPHS"
    OFI = "OFI"
    FX2TRT = "FX2TRT"
    ONNXRT = "ONNXRT"
    TENSORRT = "TENSORRT"
    AOT_TORCHXLA_TRACE_ONCE = "AOT_TORCHXLA_TRACE_ONCE"
    TORCHXLA_TRACE_ONCE = "TORCHXLA_TRACE_ONCE"
    TVM = "TVM"
    HPU_BACKEND = "HPU_BACKEND"
    NEURON = "NEURON"


@dataclass
class DataLoaderConfiguration:
    """How loaders are divided over the ranks."""

    split_batches: bool = False
    """The batch size is that of all ranks together."""
    dispatch_batches: bool | None = None
    """Rank 0 reads for all; None: iterable data sets only."""
    even_batches: bool = True
    """Repeat samples in the last batch so that all ranks' batches are full."""
    use_seedable_sampler: bool = False
    """Always so here."""
    data_seed: int | None = None
    """The seed of the order; None: that of torch."""
    non_blocking: bool = False
    """Always so here."""
    use_stateful_dataloader: bool = False
    """`load_state` lets loaders go on within their epoch; without it the script skips what it has seen."""


@dataclass
class ProjectConfiguration:
    """Where checkpoints and tracker files go."""

    project_dir: str | None = None
    logging_dir: str | None = None
    """Tracker files go below `project_dir` here; asking for another place warns."""
    automatic_checkpoint_naming: bool = False
    """`save_state` takes the next folder of the project, whatever folder it is given."""
    total_limit: int | None = None
    """How many checkpoints of the project are kept."""
    iteration: int = 0
    save_on_each_node: bool = False
    """Refused: a checkpoint is one folder that all ranks see."""

    def set_directories(self, project_dir: str | None = None) -> None:
        """Makes it the project's folder, and that of the trackers unless they have one."""
        self.project_dir = project_dir
        self.logging_dir = project_dir if self.logging_dir is None else self.logging_dir


@dataclass
class GradientAccumulationPlugin:
    """Micro-steps per optimizer step, and what the schedulers make of them."""

    to_dict, to_kwargs = _to_dict, _to_kwargs

    num_steps: int | None = None
    adjust_scheduler: bool = True
    """Schedulers step with the optimizer only."""
    sync_with_dataloader: bool = True
    """A window ends with its epoch; False is refused."""
    sync_each_batch: bool = False
    """Average gradients in every micro-step; refused, for the result is the same."""

    def check(self) -> None:
        """Refuses what is not done here."""
        if not self.sync_with_dataloader:
            raise ConfigError(
                "GradientAccumulationPlugin(sync_with_dataloader=False) cannot be honoured: a window ends "
                "with its epoch, so that no gradient is lost. Leave it out."
            )
        if self.sync_each_batch:
            raise ConfigError(
                "GradientAccumulationPlugin(sync_each_batch=True) does not exist here: gradients are averaged once "
                "per window, with the same result. Leave it out; strategy=FSDP(...) keeps memory low by itself."
            )


@dataclass
class AutocastKwargs:
    """What `autocast` is entered with."""

    to_dict, to_kwargs = _to_dict, _to_kwargs

    enabled: bool = True
    cache_enabled: bool | None = None


@dataclass
class GradScalerKwargs:
    """The gradient scaler of fp16."""

    to_dict, to_kwargs = _to_dict, _to_kwargs

    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    enabled: bool = True

    def options(self) -> ScalerOptions:
        """The same as nbaccel has it."""
        if not self.enabled:
            raise ConfigError("GradScalerKwargs(enabled=False): fp16 cannot do without its scaler; use bf16")
        return ScalerOptions(
            init_scale=self.init_scale,
            growth_factor=self.growth_factor,
            backoff_factor=self.backoff_factor,
            growth_interval=self.growth_interval,
        )


@dataclass
class InitProcessGroupKwargs:
    """What the process group is made with; its backend follows from the device."""

    to_dict, to_kwargs = _to_dict, _to_kwargs

    backend: str | None = "nccl"
    init_method: str | None = None
    timeout: timedelta | None = None

    def __post_init__(self) -> None:
        if self.init_method is not None:
            raise ConfigError(
                "InitProcessGroupKwargs(init_method=...) is the launcher's business; leave it out"
            )


@dataclass
class ProfileKwargs:
    """What `profile` is entered with."""

    to_dict, to_kwargs = _to_dict, _to_kwargs

    activities: list[str] | None = None
    schedule_option: dict[str, int] | None = None
    on_trace_ready: Callable[..., Any] | None = None
    record_shapes: bool = False
    profile_memory: bool = False
    with_stack: bool = False
    with_flops: bool = False
    with_modules: bool = False
    output_trace_dir: str | None = None

    def options(self) -> dict[str, Any]:
        """The options of torch.profiler.profile.

        Raises:
            ConfigError: torch's profiler has no such activity.
        """
        from torch import profiler

        names = ("record_shapes", "profile_memory", "with_stack", "with_flops", "with_modules")
        made: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.activities is not None:
            known = {name.lower(): one for name, one in profiler.ProfilerActivity.__members__.items()}
            unknown = [one for one in self.activities if str(one).lower() not in known]
            if unknown:
                raise ConfigError(
                    f"ProfileKwargs(activities=): {unknown[0]!r} is none of torch's profiler, which has "
                    f"{', '.join(known)}"
                )
            made["activities"] = [known[one.lower()] for one in self.activities]
        if self.schedule_option is not None:
            made["schedule"] = profiler.schedule(**self.schedule_option)
        if self.on_trace_ready is not None:
            made["on_trace_ready"] = self.on_trace_ready
        return made


@dataclass
class DistributedDataParallelKwargs:
    """DistributedDataParallel's options."""

    to_dict, to_kwargs = _to_dict, _to_kwargs

    dim: int = 0
    broadcast_buffers: bool = True
    bucket_cap_mb: int = 25
    find_unused_parameters: bool = False
    check_reduction: bool = False
    gradient_as_bucket_view: bool = False
    """Always so here: gradients live in the buckets."""
    static_graph: bool = False
    comm_hook: DDPCommunicationHookType | str = DDPCommunicationHookType.NO
    comm_wrapper: Any = DDPCommunicationHookType.NO
    comm_state_option: dict[str, Any] = field(default_factory=dict)

    def options(self) -> DDPOptions:
        """The same as nbaccel has it."""
        hook = DDPCommunicationHookType(self.comm_hook).value
        if self.dim != 0 or self.check_reduction or DDPCommunicationHookType(self.comm_wrapper).value != "no":
            raise ConfigError(
                "DistributedDataParallelKwargs: dim, check_reduction and comm_wrapper do not exist here"
            )
        if hook == "batched_power_sgd":
            raise ConfigError("comm_hook 'batched_power_sgd' does not exist here; use 'power_sgd'")
        state = dict(self.comm_state_option)
        options = DDPOptions(
            bucket_cap_mb=None if self.bucket_cap_mb == 25 else self.bucket_cap_mb,
            find_unused_parameters=self.find_unused_parameters,
            static_graph=self.static_graph,
            broadcast_buffers=self.broadcast_buffers,
            comm_hook=None if hook == "no" else hook,  # type: ignore[arg-type]
            power_sgd_rank=state.pop("matrix_approximation_rank", 1),
            power_sgd_start=state.pop("start_powerSGD_iter", 1000),
        )
        if state:
            raise ConfigError(f"comm_state_option: {', '.join(state)} cannot be given here")
        return options


@dataclass
class AORecipeKwargs:
    """Float8 by torchao; details are given by `fp8=FP8Options(recipe=..., skip=[...])`."""

    to_dict, to_kwargs = _to_dict, _to_kwargs

    config: Any = None
    module_filter_func: Callable[..., bool] | None = None
    pad_inner_dim: bool | None = None
    enable_fsdp_float8_all_gather: bool | None = None

    def options(self) -> FP8Options:
        """The same as nbaccel has it."""
        _refuse_given(self, ())
        return FP8Options()


@dataclass
class TERecipeKwargs:
    """Float8 by transformer-engine; its recipe is that package's default here."""

    to_dict, to_kwargs = _to_dict, _to_kwargs

    use_autocast_during_eval: bool | None = None
    margin: int | None = None
    interval: int | None = None
    fp8_format: Any = None
    amax_history_len: int | None = None
    amax_compute_algo: Any = None
    override_linear_precision: Any = None
    use_mxfp8_block_scaling: bool | None = None

    def options(self) -> FP8Options:
        """The same as nbaccel has it."""
        _refuse_given(self, ())
        return FP8Options(backend="transformer_engine")


@dataclass
class FP8RecipeKwargs:
    """Float8 by the backend named: "AO" or "TE"."""

    to_dict, to_kwargs = _to_dict, _to_kwargs

    backend: str | None = None
    opt_level: str | None = None

    def options(self) -> FP8Options:
        """The same as nbaccel has it."""
        _refuse_given(self, ("backend",))
        known = {"AO": "torchao", "TE": "transformer_engine"}
        name = (self.backend or "TE").upper()
        if name not in known:
            raise ConfigError(
                f"FP8RecipeKwargs(backend={self.backend!r}) does not exist here; use 'AO' or 'TE'"
            )
        return FP8Options(backend=known[name])  # type: ignore[arg-type]


KwargsHandler = (
    AORecipeKwargs
    | AutocastKwargs
    | DistributedDataParallelKwargs
    | FP8RecipeKwargs
    | GradScalerKwargs
    | InitProcessGroupKwargs
    | ProfileKwargs
    | TERecipeKwargs
)
"""What `kwargs_handlers` holds, for annotations and isinstance."""


def _refuse_given(recipe: Any, but: tuple[str, ...]) -> None:
    given = [name for name, value in vars(recipe).items() if value is not None and name not in but]
    if given:
        raise ConfigError(
            f"{type(recipe).__name__}({given[0]}=...) does not exist here; give Accelerator(fp8=FP8Options(...)), "
            "which names the recipe and the layers to leave out"
        )


def __getattr__(name: str) -> Any:
    return look_up(__name__, name)
