"""What is left to the planner: every strategy ("auto"), FSDP's sharding, ZeRO's stage."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nbaccel.config import RunConfig
from nbaccel.core.assembly import choose_strategy
from nbaccel.core.model.composed import is_composed
from nbaccel.core.precision import Precision
from nbaccel.core.strategies.base import Strategy
from nbaccel.core.strategies.ddp import DDPOptions
from nbaccel.core.world import World
from nbaccel.errors import ConfigError
from nbaccel.parallel import FSDP, DeepSpeed, named, read_options

if TYPE_CHECKING:
    from nbaccel.core.plan import Spread
    from nbaccel.core.planning import Given
    from nbaccel.core.strategies.auto import Auto

__all__ = ["leave_to_planner"]

_FAMILIES = {"auto": "", "fsdp": "fsdp", "deepspeed": "zero"}
"""Strategies of which the planner may choose the kind, with its name for them."""


def leave_to_planner(config: RunConfig, world: World, ddp: DDPOptions, precision: Precision) -> Auto | None:
    """The strategy that is chosen when the model is seen; None where what was asked leaves nothing open.

    Raises:
        ConfigError: whole copies cannot be made as asked, or what was asked leaves open what it decides, too.
    """
    asked = config.strategy
    if asked not in _FAMILIES or world.device.type == "xla" or (world.size == 1 and asked != "auto"):
        return None
    options: FSDP | DeepSpeed | None = None
    if asked == "fsdp":
        options = read_options(FSDP, config.fsdp or {}, "fsdp")
        if options.sharding != "auto":
            return None
        for other in ("tensor_parallel", "context_parallel"):
            if getattr(config, other) is not None:
                raise ConfigError(f"{other} cannot go with fsdp's sharding='auto'; name the sharding")
    elif asked == "deepspeed":
        from nbaccel.core.zero.settings import with_stage_of_file

        options = with_stage_of_file(read_options(DeepSpeed, config.deepspeed or {}, "deepspeed"))
        if options.stage != "auto":
            return None
    # imported where it is asked for: the planner needs torch's tracing
    from nbaccel.core.strategies.auto import Auto

    def build(spread: Spread) -> Strategy:
        chosen = named(_completed(options, spread))
        return choose_strategy(replace(config, **chosen), world, ddp, precision)

    rest: dict[str, Any] = {} if options is None else {"strategy": "auto", asked: None}
    return Auto(
        asked,
        world,
        precision,
        whole=choose_strategy(replace(config, **rest), world, ddp, precision),
        build=build,
        refuse=lambda spread, given: _why_not(spread, given, asked, options, precision),
        handles_precision=asked == "deepspeed",
    )


def _completed(options: FSDP | DeepSpeed | None, spread: Spread) -> object:
    """What was asked, with what was left open."""
    chosen = spread.strategy
    if isinstance(options, FSDP) and isinstance(chosen, FSDP):
        return replace(options, sharding=chosen.sharding, cpu_offload=chosen.cpu_offload)
    if isinstance(options, DeepSpeed) and isinstance(chosen, DeepSpeed):
        return replace(options, stage=chosen.stage)
    return chosen


def _why_not(
    spread: Spread, given: Given, asked: str, options: FSDP | DeepSpeed | None, precision: Precision
) -> str:
    """Why a way to spread is out of the question for what is given; empty if it is not."""
    from nbaccel.core.plan.choose import runnable_here

    if options is not None and spread.family != _FAMILIES[asked]:
        return f"strategy {asked!r} was asked for"
    shards = spread.family in ("fsdp", "zero")
    if shards and precision.kind == "fp16" and precision.device_type == "cpu":
        return "fp16 on the CPU goes with whole copies only: use 'bf16'"
    if shards and any(is_composed(p) for model in given.models for p in model.parameters()):
        return "quantised weights cannot be divided"
    if spread.family != "zero":
        return runnable_here(spread)
    if precision.kind == "fp8":
        return "fp8 does not go with DeepSpeed: use 'bf16'"
    if options is None and precision.kind == "fp16":
        return "with fp16 only when asked for, DeepSpeed(...): it scales the loss itself"
    if options is not None and spread.offload:
        return "offload_optimizer was not asked for"
    return runnable_here(spread) or _unfit(given, options)


def _unfit(given: Given, options: FSDP | DeepSpeed | None) -> str:
    from nbaccel.core.strategies.deepspeed import unfit

    if len(given.models) > 1:
        return "DeepSpeed trains one model"
    return unfit(given.optimizers, options if isinstance(options, DeepSpeed) else DeepSpeed())
