"""From what was asked of an Accelerator to the parts it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nbaccel.config import RunConfig, combine, duration_seconds
from nbaccel.core.data import Shard
from nbaccel.core.loop.control import Choices, Control
from nbaccel.core.loop.knobs import Knobs
from nbaccel.core.precision import Precision
from nbaccel.core.strategies.base import Strategy
from nbaccel.core.strategies.ddp import DDP, DDPOptions
from nbaccel.core.strategies.single import Single
from nbaccel.core.trackers import Tracker
from nbaccel.core.world import World
from nbaccel.errors import ConfigError
from nbaccel.fp8 import FP8Options
from nbaccel.layout import refuse_idle, require_one_rank
from nbaccel.parallel import (
    FSDP,
    ContextParallel,
    DeepSpeed,
    Megatron,
    Pipeline,
    TensorParallel,
    read_options,
)
from nbaccel.wire import events

__all__ = [
    "asked_config",
    "check_change",
    "check_flag",
    "choices",
    "choose_strategy",
    "ddp_options",
    "fp8_options",
    "loader_options",
    "make_control",
    "scheduler_repeat",
    "split_trackers",
]

_PLACE = "Accelerator(...)"


def asked_config(launched: RunConfig, **arguments: Any) -> RunConfig:
    """What the launch and the Accelerator's arguments ask together; None: not asked.

    Raises:
        ConfigError: they disagree; the message names both places.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    return combine(launched, RunConfig.from_mapping(given, place=_PLACE))


def check_change(config: RunConfig, name: str, value: Any) -> None:
    """Whether the script may set option `name` after the Accelerator was made.

    Raises:
        ConfigError: no such value is possible, or the launch has asked for another one.
    """
    changed = RunConfig.from_mapping({name: value}, place=f"accelerator.{name} = ...")
    if config.sources.get(name) not in (None, _PLACE):
        combine(config, changed)


def check_flag(name: str, value: object) -> None:
    """Raises a ConfigError unless it is true, false or not given."""
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{name} (from {_PLACE}) is {value!r}; it must be true or false")


def split_trackers(
    log_with: str | Tracker | Sequence[str | Tracker] | None,
) -> tuple[tuple[str, ...] | None, tuple[Tracker, ...]]:
    """The names among the trackers asked for (None: none), and the tracker objects."""
    if log_with is None:
        return None, ()
    listed: Sequence[Any] = log_with if isinstance(log_with, (list, tuple)) else [log_with]
    names = tuple(one for one in listed if isinstance(one, str))
    return names or None, tuple(one for one in listed if not isinstance(one, str))


def choose_strategy(config: RunConfig, world: World, ddp: DDPOptions, precision: Precision) -> Strategy:
    """How models are spread. One process has nothing to spread and trains as it is.

    Raises:
        ConfigError: what was asked cannot be done with this many ranks, or together.
    """
    name = config.strategy
    if name == "single":
        require_one_rank(world.size)
    refuse_idle(config)
    if world.device.type == "xla":
        return _on_xla(config, world)
    if name == "xla" or config.xla_spmd:
        asked = "strategy='xla'" if name == "xla" else "xla_spmd"
        raise ConfigError(f"{asked} needs XLA devices: launch with device='tpu'")
    if world.size == 1:
        if name == "pipeline":
            raise ConfigError(
                "strategy 'pipeline' divides a model over at least two ranks, and there is one; launch more, or leave "
                "it out and call the model and backward(loss)"
            )
        if name == "megatron":
            raise ConfigError(
                "strategy 'megatron' needs at least two ranks, whose process groups megatron-core's layers talk in; "
                "launch more"
            )
        return Single(world.device)
    _check_fp8(config, precision)
    if name == "deepspeed":
        _check_half(precision, name)
        # imported where it is asked for: DeepSpeed takes a second
        from nbaccel.core.strategies.deepspeed import Zero

        return Zero(
            world,
            options=read_options(DeepSpeed, config.deepspeed or {}, "deepspeed"),
            precision=precision,
            accumulation=config.gradient_accumulation_steps or 1,
            clipping=config.gradient_clipping,
        )
    accumulates = (config.gradient_accumulation_steps or 1) > 1
    if name == "pipeline":
        return _pipeline(config, world, precision, accumulates=accumulates)
    if name == "megatron":
        _check_half(precision, name)
        # imported where it is asked for: it needs megatron-core
        from nbaccel.core.strategies.megatron import MegatronCore

        return MegatronCore(world, options=read_options(Megatron, config.megatron or {}, "megatron"))
    if name in ("fsdp", "tensor_parallel", "context_parallel"):
        _check_half(precision, name)
        return _sharded(config, world, precision)
    return DDP(world, options=ddp, accumulates=accumulates)


def _on_xla(config: RunConfig, world: World) -> Strategy:
    if config.strategy not in (None, "auto", "xla", "ddp", "single"):
        raise ConfigError(
            f"strategy={config.strategy!r} cannot run on XLA devices; use 'xla', or leave it out"
        )
    if config.compile:
        raise ConfigError(
            f"compile={config.compile!r} cannot be honoured on XLA devices: torch.compile has nothing for them, and "
            "XLA compiles each step as a whole by itself. Leave compile out."
        )
    # imported where they are used: they need torch_xla
    if config.xla_spmd:
        from nbaccel.core.strategies.xla_spmd import XLASharded

        return XLASharded(world)
    from nbaccel.core.strategies.xla import XLA

    return XLA(world)


def _sharded(config: RunConfig, world: World, precision: Precision) -> Strategy:
    # imported where it is asked for: torch's sharding takes a second
    from nbaccel.core.strategies.fsdp import FullyShardedDataParallel
    from nbaccel.core.strategies.tensor_parallel import TensorParallelism

    options = read_options(FSDP, config.fsdp or {}, "fsdp")
    if config.tensor_parallel is not None or config.strategy == "tensor_parallel":
        tensor = read_options(TensorParallel, config.tensor_parallel or {}, "tensor_parallel")
        if config.strategy == "tensor_parallel" and tensor.size in (0, world.size):
            return TensorParallelism(world, options=tensor)
        if config.strategy == "tensor_parallel":
            # several copies of the model, whose gradients are averaged
            options = replace(options, sharding="no_shard")
        options = replace(options, tensor_parallel=tensor)
    if config.context_parallel is not None or config.strategy == "context_parallel":
        context = read_options(ContextParallel, config.context_parallel or {}, "context_parallel")
        if config.strategy == "context_parallel":
            options = replace(options, sharding="no_shard")
        options = replace(options, context_parallel=context)
    return FullyShardedDataParallel(world, options=options, dtype=precision.dtype)


def _pipeline(config: RunConfig, world: World, precision: Precision, *, accumulates: bool) -> Strategy:
    from nbaccel.core.strategies.pipeline import PipelineParallelism

    if precision.kind == "fp16":
        raise ConfigError(
            "mixed_precision='fp16' cannot go with strategy 'pipeline', whose backward is not ours to scale; use 'bf16'"
        )
    options = read_options(Pipeline, config.pipeline or {}, "pipeline")
    return PipelineParallelism(world, options=options, accumulates=accumulates)


def _check_half(precision: Precision, strategy: str) -> None:
    if precision.kind == "fp16" and precision.device_type == "cpu":
        raise ConfigError(
            f"mixed_precision='fp16' cannot go with strategy {strategy!r} on the CPU, where reductions of fp16 are "
            "emulated and slow; use 'bf16'"
        )


def _check_fp8(config: RunConfig, precision: Precision) -> None:
    if precision.kind == "fp8" and (config.strategy in ("deepspeed", "megatron") or _divides(config)):
        raise ConfigError(
            "mixed_precision='fp8' goes with one process, strategy 'ddp' and 'fsdp', not with DeepSpeed, Megatron nor "
            "tensor parallelism; use 'bf16', or one of those"
        )


def _divides(config: RunConfig) -> bool:
    return config.strategy == "tensor_parallel" or config.tensor_parallel is not None


def ddp_options(config: RunConfig, given: DDPOptions | None) -> DDPOptions:
    """DDP's options: the Accelerator's argument, or what the launch asked.

    Raises:
        ConfigError: both, and they differ.
    """
    asked = DDPOptions(**config.ddp) if config.ddp is not None else None
    if given is not None and asked is not None and given != asked:
        place = config.sources.get("ddp", "the launch")
        raise ConfigError(
            f"ddp is asked twice: {asked} by {place} and {given} by {_PLACE}. Ask for it in one place."
        )
    return given or asked or DDPOptions()


def fp8_options(config: RunConfig, given: FP8Options | None) -> FP8Options | None:
    """The options of "fp8": the Accelerator's argument, or what the launch asked.

    Raises:
        ConfigError: both, and they differ; or another precision was asked, which would ignore them.
    """
    asked = None if config.fp8 is None else read_options(FP8Options, config.fp8, "fp8")
    if given is not None and asked is not None and given != asked:
        place = config.sources.get("fp8", "the launch")
        raise ConfigError(
            f"fp8 is asked twice: {asked} by {place} and {given} by {_PLACE}. Ask for it in one place."
        )
    options = given or asked
    if options is not None and config.mixed_precision != "fp8":
        raise ConfigError(
            f"fp8 holds options of mixed_precision='fp8', but mixed_precision is {config.mixed_precision!r}; ask for "
            "'fp8' too, or leave fp8 out"
        )
    return options


def loader_options(config: RunConfig, shard: Shard | None) -> dict[str, Any]:
    """Of `ShardedLoader`, for the loaders that will be prepared.

    Args:
        shard: the Accelerator's argument, which may be a function.
    """
    return {
        "split_batches": bool(config.split_batches),
        "even_batches": bool(config.even_batches),
        "dispatch": bool(config.dispatch_batches),
        "shard": shard or config.shard or "interleaved",
        "per_sample_seed": bool(config.per_sample_seed),
        "seed": config.seed,
    }


def scheduler_repeat(config: RunConfig, world: World) -> int:
    """Scheduler steps per optimizer step."""
    return world.size if config.scheduler_steps == "per_rank" and not config.split_batches else 1


def choices(precision: Precision, strategy: Strategy) -> Choices:
    """What the run's options came to; a strategy that the planner chooses has its name later."""
    return lambda: {"mixed_precision": precision.kind, "strategy": strategy.name}


def make_control(config: RunConfig, world: World, knobs: Knobs, chosen: Choices) -> Control | None:
    """None where nobody can ask for anything, so that a step costs nothing for it.

    Args:
        chosen: gives what the run's options came to; `mixed_precision` among them.
    """
    every: int | float | None = None
    if isinstance(config.save_every, int):
        every = config.save_every
    elif config.save_every is not None:
        every = duration_seconds(config.save_every, what="save_every")
    after = None if config.stop_after is None else duration_seconds(config.stop_after, what="stop_after")
    if not events.active() and every is None and after is None:
        return None
    agreed = f"mixed_precision={chosen()['mixed_precision']}, accumulation={config.gradient_accumulation_steps or 1}"
    saves = config.project_dir is not None and (every or after or config.resume) is not None
    return Control(
        world, knobs, stop_after=after, save_every=every, save_on_stop=saves, agreed=agreed, chosen=chosen
    )
