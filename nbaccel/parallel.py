"""How a model can be spread over the ranks: the options of each strategy, as a user writes them.

    Accelerator(strategy="fsdp")
    Accelerator(strategy="ddp", ddp=DDPOptions(bucket_cap_mb=50))
    Accelerator(strategy=FSDP(wrap="LlamaDecoderLayer", cpu_offload=True))
    Accelerator(strategy=FSDP(tensor_parallel=TensorParallel(size=2)))

and in YAML `strategy: fsdp` with `fsdp: {wrap: LlamaDecoderLayer}` beside it. No torch here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from nbaccel.checks import check_types, choice, count, which_there_are
from nbaccel.errors import ConfigError

__all__ = [
    "FSDP",
    "SHARDING_OF_ACCELERATE",
    "ContextParallel",
    "DDPOptions",
    "DeepSpeed",
    "Megatron",
    "ParallelStyle",
    "Pipeline",
    "StrategyLike",
    "TensorParallel",
    "named",
    "read_deepspeed",
    "read_options",
]

Sharding = Literal["full_shard", "shard_grad_op", "no_shard", "hybrid_shard", "auto"]
Dtype = Literal["float32", "bfloat16", "float16"]
ParallelStyle = Literal["column", "row", "column_gathered", "embedding", "sequence"]
T = TypeVar("T")
SHARDING_OF_ACCELERATE: dict[str, Sharding] = {
    "FULL_SHARD": "full_shard",
    "SHARD_GRAD_OP": "shard_grad_op",
    "NO_SHARD": "no_shard",
    "HYBRID_SHARD": "hybrid_shard",
    "1": "full_shard",
    "2": "shard_grad_op",
    "3": "no_shard",
    "4": "hybrid_shard",
}
"""By the names and numbers of its configuration files and plugins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DDPOptions:
    """What DistributedDataParallel is made with.

    Raises:
        ConfigError: a value that can never be honoured.
    """

    bucket_cap_mb: float | None = None
    """Size of the buckets gradients are averaged in; None: torch's default; 0: each gradient by itself."""
    find_unused_parameters: bool = False
    static_graph: bool = False
    """The same parameters are used in every step. Cannot go with gradient accumulation."""
    gradient_as_bucket_view: bool = True
    """Gradients live in the buckets: no copy, less memory."""
    broadcast_buffers: bool = True
    """Give all ranks rank 0's buffers before each forward."""
    comm_hook: Literal["fp16", "bf16", "power_sgd"] | None = None
    """Send gradients compressed."""
    power_sgd_rank: int = 1
    power_sgd_start: int = 1000
    """Optimizer steps before PowerSGD begins to compress."""

    def __post_init__(self) -> None:
        check_types("ddp", self)
        if self.bucket_cap_mb is not None and not 0 <= self.bucket_cap_mb < float("inf"):
            raise ConfigError(f"ddp: bucket_cap_mb is {self.bucket_cap_mb!r}; it must be a number, 0 or more")
        count("ddp: power_sgd_rank", self.power_sgd_rank, 1)
        count("ddp: power_sgd_start", self.power_sgd_start, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorParallel:
    """Each layer's matrices are divided over `size` neighbouring ranks, which see the same data.

    Raises:
        ConfigError: a value that can never be honoured.
    """

    size: int = 0
    """Ranks that share one copy of the model; 0: all of them."""
    plan: Literal["auto"] | Mapping[str, ParallelStyle | Any] = "auto"
    """How each module is divided: a style (or a `ParallelStyle` object of torch) by module name, in which `*`
    stands for one part of the name; "auto" knows Llama's and GPT-2's blocks and what is named like them."""

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 0:
            raise ConfigError(f"tensor_parallel: size is {self.size!r}; it must be a number of ranks")
        if not (self.plan == "auto" or isinstance(self.plan, Mapping)):
            raise ConfigError(f"tensor_parallel: plan is {self.plan!r}; it must be 'auto' or styles by name")
        if isinstance(self.plan, Mapping):
            for name, style in self.plan.items():
                if isinstance(style, (str, int, float, list, Mapping, NoneType)):  # else an object of torch's
                    choice(f"tensor_parallel: the style of {name!r}", style, get_args(ParallelStyle))


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextParallel:
    """Each sequence is cut over `size` neighbouring ranks, which see the same batch; for sequences that do not
    fit. What is cut is said in the loop, by `Accelerator.maybe_context_parallel`.

    Raises:
        ConfigError: a value that can never be honoured.
    """

    size: int = 0
    """Ranks that share a sequence; 0: all of them."""

    def __post_init__(self) -> None:
        count("context_parallel: size", self.size, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """The layers of an nn.Sequential are divided over `size` neighbouring ranks, and microbatches pass through
    them; `Accelerator.pipeline_step` takes the place of forward and backward.

    Raises:
        ConfigError: a value that can never be honoured.
    """

    loss: Callable[[Any, Any], Any] | None = None
    """The loss of (outputs, targets), a mean over the samples; computed on the last rank. Needed."""
    size: int = 0
    """Stages of a model; 0: all ranks. With fewer than there are ranks, copies are averaged."""
    microbatches: int | None = None
    """Into how many parts a batch is cut; None: twice as many as stages. More leave ranks less idle."""
    split: Sequence[str] | None = None
    """Names of the layers that begin the second stage and later ones; None: stages of about as many parameters."""

    def __post_init__(self) -> None:
        check_types("pipeline", self)
        count("pipeline: size", self.size, 0)
        if self.microbatches is not None:
            count("pipeline: microbatches", self.microbatches, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Megatron:
    """A model made of megatron-core's tensor-parallel layers, built after the Accelerator, which makes the process
    groups they talk in; gradients are averaged over the copies.

    Raises:
        ConfigError: a value that can never be honoured.
    """

    size: int = 0
    """Neighbouring ranks that share one copy of the model; 0: all of them."""

    def __post_init__(self) -> None:
        count("megatron: size", self.size, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class FSDP:
    """Parameters, gradients and optimizer state are sharded over the ranks (PyTorch's `fully_shard`).

    Raises:
        ConfigError: a value that can never be honoured.
    """

    sharding: Sharding = "full_shard"
    """full_shard: everything; shard_grad_op: parameters stay whole from forward to backward; hybrid_shard:
    full_shard among `shard_size` ranks, copies among the rest; no_shard: copies everywhere, as DDP; auto: the
    planner chooses the fastest that fits, offload to main memory among them."""
    shard_size: int | None = None
    """Ranks that share one copy under hybrid_shard; None: those of one machine."""
    wrap: Literal["auto", "none"] | str | int | type | Sequence[str | type] | Callable[[Any], bool] = "auto"
    """Which modules are gathered one at a time. "auto": the blocks that repeat (or the classes the model names
    itself in `_no_split_modules`); classes or their names; a number: modules of at least so many parameters; a
    function of the module; "none": the model as a whole."""
    reshard_after_forward: bool | int | None = None
    """Whether a block's parameters are given up after its forward; an int: kept sharded over so many ranks.
    None: as `sharding` says."""
    param_dtype: Dtype | None = None
    """What parameters are gathered and computed in; None: the mixed precision's."""
    reduce_dtype: Dtype | None = "float32"
    """What gradients are reduced in; None: that of the gradients."""
    cpu_offload: bool = False
    """Shards, gradients and optimizer state stay in main memory; the optimizer steps there."""
    forward_prefetch: int = 0
    """Blocks whose gathering is begun during the forward of the one before."""
    backward_prefetch: int = 0
    """The same in backward; 0: torch's own order, one ahead."""
    activation_checkpointing: bool = False
    """Blocks compute their activations again in backward instead of keeping them."""
    tensor_parallel: TensorParallel | None = None
    """Divide matrices too, over the inner dimension of a 2-D mesh."""
    context_parallel: ContextParallel | None = None
    """Cut sequences too; parameters are sharded over the ranks of one sequence as over the others."""

    def __post_init__(self) -> None:
        for name in ("forward_prefetch", "backward_prefetch"):
            count(f"fsdp: {name}", getattr(self, name), 0)
        if self.shard_size is not None:
            count("fsdp: shard_size", self.shard_size, 1)
            if self.sharding != "hybrid_shard":
                raise ConfigError(
                    f"fsdp: shard_size belongs to sharding='hybrid_shard', not {self.sharding!r}"
                )
        if self.sharding == "auto":
            for name, default in (
                ("reshard_after_forward", None),
                ("cpu_offload", False),
                ("tensor_parallel", None),
            ):
                if getattr(self, name) != default:
                    raise ConfigError(
                        f"fsdp: {name} cannot go with sharding='auto', which decides about it; name the sharding"
                    )
        reshard = self.reshard_after_forward
        if isinstance(reshard, int) and not isinstance(reshard, bool):
            count("fsdp: reshard_after_forward", reshard, 2)
        if isinstance(self.wrap, int):
            count("fsdp: wrap", self.wrap, 1)
        elif not (isinstance(self.wrap, str) or callable(self.wrap)) and not (
            isinstance(self.wrap, Sequence)
            and self.wrap
            and all(isinstance(one, (str, type)) for one in self.wrap)
        ):
            raise ConfigError(
                f"fsdp: wrap is {self.wrap!r}; it must be 'auto', 'none', a class or its name, a list of them, a "
                "number of parameters or a function of a module"
            )
        check_types("fsdp", self)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSpeed:
    """DeepSpeed's ZeRO: optimizer state (stage 1), gradients (2) and parameters (3) sharded over the ranks.

    Raises:
        ConfigError: a value that can never be honoured.
    """

    stage: Literal[0, 1, 2, 3, "auto"] = "auto"
    """"auto": the planner chooses the fastest of 1 to 3 that fits; 0 shards nothing."""
    config: str | Mapping[str, Any] | None = None
    """A DeepSpeed JSON of yours, or its dict; "auto" in it is filled, and what it does not say is ours."""
    offload_optimizer: Literal["cpu", "nvme"] | None = None
    """Where the optimizer state lives and the optimizer steps, if not on the device."""
    offload_param: Literal["cpu", "nvme"] | None = None
    """Where parameters live between uses; stage 3 only."""
    nvme_path: str | None = None
    """A folder on the disk, for "nvme"."""
    overlap_comm: bool | None = None
    """Communicate on a stream of its own while the device computes: more memory. None: in stage 3 only."""
    communication_dtype: Literal["fp16", "bf16", "fp32"] | None = None
    """What gradients are sent in; None: float32, as under the other strategies."""
    reduce_bucket_size: int | None = None
    """Numbers of gradients that are sent at a time. None, here and below: by the size of the model."""
    allgather_bucket_size: int | None = None
    """Numbers of parameters that are gathered at a time after a step, in stages 1 and 2; even."""
    prefetch_bucket_size: int | None = None
    """Numbers of parameters that stage 3 gathers ahead of their use."""
    max_live_parameters: int | None = None
    """Numbers of parameters that stage 3 holds whole at once; the more, the fewer are gathered again in backward. None:
    three quarters of the model and at most 10⁹; with `offload_param`, one block."""
    param_persistence_threshold: int | None = None
    """Parameters of stage 3 with fewer numbers stay whole on every rank."""
    leaf_modules: Sequence[str] = ()
    """Classes of modules whose parameters stage 3 gathers all at once, with no hooks inside: mixtures of experts,
    of which ranks run different ones."""
    activation_checkpointing: bool = False
    """Blocks compute their activations again in backward instead of keeping them."""
    untested_optimizer: bool = False
    """Take optimizers of other classes than those known to treat each number by itself."""

    def __post_init__(self) -> None:
        check_types("deepspeed", self)
        if self.offload_param is not None and self.stage != 3:
            raise ConfigError("deepspeed: offload_param needs stage=3, where parameters are sharded")
        if self.offload_optimizer == "nvme" and self.stage != 3:
            raise ConfigError("deepspeed: offload_optimizer='nvme' needs stage=3")
        if "nvme" in (self.offload_optimizer, self.offload_param) and not self.nvme_path:
            raise ConfigError("deepspeed: offloading to 'nvme' needs nvme_path, a folder on that disk")
        for name, least in _ZERO_SIZES.items():
            if getattr(self, name) is not None:
                count(f"deepspeed: {name}", getattr(self, name), least)
        if (self.allgather_bucket_size or 0) % 2:
            raise ConfigError(
                f"deepspeed: allgather_bucket_size is {self.allgather_bucket_size}; it must be an even number of "
                "elements"
            )
        for name in _STAGE_THREE:
            if getattr(self, name) and self.stage not in (3, "auto"):
                raise ConfigError(f"deepspeed: {name} needs stage=3, where parameters are sharded")


_ZERO_SIZES = {
    "reduce_bucket_size": 1,
    "allgather_bucket_size": 1,
    "prefetch_bucket_size": 0,
    "max_live_parameters": 0,
    "param_persistence_threshold": 0,
}
_STAGE_THREE = ("prefetch_bucket_size", "max_live_parameters", "param_persistence_threshold", "leaf_modules")

StrategyLike: TypeAlias = str | FSDP | TensorParallel | DeepSpeed | ContextParallel | Pipeline | Megatron
"""What `strategy=` takes everywhere."""


def named(strategy: object, where: str = "strategy") -> dict[str, Any]:
    """RunConfig's keys and values for what was given as `strategy=`: a name, or one of the classes here.

    Args:
        where: "strategy", and who asked for it if that is known: "strategy (from nbaccel.yaml:3)".

    Raises:
        ConfigError: it is neither.
    """
    if strategy is None:
        return {}
    if isinstance(strategy, str):
        return {"strategy": strategy}
    if isinstance(strategy, TensorParallel):
        return {"strategy": "tensor_parallel", "tensor_parallel": _mapping(strategy)}
    if isinstance(strategy, FSDP):
        inner = {name: getattr(strategy, name) for name in ("tensor_parallel", "context_parallel")}
        rest = {name: _mapping(one) for name, one in inner.items() if one is not None}
        alone = dataclasses.replace(strategy, tensor_parallel=None, context_parallel=None)
        return {"strategy": "fsdp", "fsdp": _mapping(alone), **rest}
    if isinstance(strategy, ContextParallel):
        return {"strategy": "context_parallel", "context_parallel": _mapping(strategy)}
    if isinstance(strategy, Pipeline):
        return {"strategy": "pipeline", "pipeline": _mapping(strategy)}
    if isinstance(strategy, Megatron):
        return {"strategy": "megatron", "megatron": _mapping(strategy)}
    if isinstance(strategy, DeepSpeed):
        return {"strategy": "deepspeed", "deepspeed": _mapping(strategy)}
    if isinstance(strategy, Mapping):
        raise ConfigError(
            f"{where} is {dict(strategy)!r}; it must be a name, with the options beside it in a key of that name: "
            "`strategy: fsdp` and `fsdp: {wrap: LlamaDecoderLayer}`"
        )
    raise ConfigError(
        f"{where} is {strategy!r}; it must be a name ('ddp', 'fsdp', …), FSDP(...), TensorParallel(...), "
        "ContextParallel(...), Pipeline(...), DeepSpeed(...) or Megatron(...)"
    )


def read_options(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """The options of class `kind` from plain values, as YAML has them.

    Args:
        where: their key, and who asked for it if that is known: "fsdp (from nbaccel.yaml:3)".

    Raises:
        ConfigError: an option there is not, or a value that cannot be.
    """
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ConfigError(f"{where} has no option {name!r}{which_there_are(name, known)}")
    try:
        return kind(**values)
    except ConfigError as error:
        key, _, place = where.partition(" ")
        found = str(error).removeprefix(f"{key}: ")
        raise ConfigError(f"{where}: {found}" if place else str(error)) from error


def read_deepspeed(config: str | Mapping[str, Any]) -> dict[str, Any]:
    """A DeepSpeed configuration from a JSON file or a dict.

    Raises:
        ConfigError: it cannot be read.
    """
    if isinstance(config, Mapping):
        return json.loads(json.dumps(config))  # type: ignore[no-any-return]
    try:
        found = json.loads(Path(config).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"deepspeed: its configuration {config} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"deepspeed: its configuration {config} holds no object")
    return found


def _mapping(options: Any) -> dict[str, Any]:
    """The options that are not as they are by default."""
    return {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if getattr(options, field.name) != field.default
    }
