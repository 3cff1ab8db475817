"""How a strategy groups the ranks: which sizes fit how many of them, and what a launch can know of it beforehand.

No torch here.
"""

from __future__ import annotations

from nbaccel.config import RunConfig
from nbaccel.errors import ConfigError
from nbaccel.parallel import (
    FSDP,
    ContextParallel,
    DeepSpeed,
    Megatron,
    Pipeline,
    TensorParallel,
    read_deepspeed,
    read_options,
)

__all__ = [
    "context_ranks",
    "copy_ranks",
    "refuse_idle",
    "require_layout",
    "require_one_rank",
    "shard_ranks",
    "tensor_ranks",
]

_OPTIONS_OF = {
    "ddp": ("ddp", "auto", None),
    "fsdp": ("fsdp",),
    "tensor_parallel": ("tensor_parallel", "fsdp"),
    "context_parallel": ("context_parallel", "fsdp"),
    "deepspeed": ("deepspeed",),
    "pipeline": ("pipeline",),
    "megatron": ("megatron",),
}
"""Keys that hold a strategy's options, with the strategies that read them."""


def require_layout(config: RunConfig, num_ranks: int, on_each: int) -> None:
    """That so many ranks can be spread as `config` asks, and that a file it names is there.

    Says nothing of what it leaves open: a script may ask for it.

    Args:
        num_ranks: on all hosts.
        on_each: those of one host.

    Raises:
        ConfigError: they cannot; the ranks would refuse it too.
    """
    name = config.strategy
    if name in (None, "auto"):
        return
    refuse_idle(config)
    if name == "single":
        require_one_rank(num_ranks)
    try:
        if name == "deepspeed":
            given = read_options(DeepSpeed, config.deepspeed or {}, "deepspeed").config
            if given is not None:
                read_deepspeed(given)
        elif num_ranks == 1:
            return  # nothing is spread, whatever is asked
        elif name == "pipeline":
            copy_ranks("pipeline", read_options(Pipeline, config.pipeline or {}, "pipeline").size, num_ranks)
        elif name == "megatron":
            copy_ranks("megatron", read_options(Megatron, config.megatron or {}, "megatron").size, num_ranks)
        elif name in ("fsdp", "tensor_parallel", "context_parallel"):
            _require_sharded(config, num_ranks, on_each)
    except ConfigError as error:
        key, _, rest = str(error).partition(": ")
        place = config.sources.get(key)
        raise ConfigError(f"{key} (from {place}): {rest}" if place else str(error)) from None


def require_one_rank(num_ranks: int) -> None:
    """What the strategy "single" is for.

    Raises:
        ConfigError: there are several.
    """
    if num_ranks > 1:
        raise ConfigError(
            f"strategy='single' was asked for, but there are {num_ranks} ranks; use 'ddp' or launch one"
        )


def refuse_idle(config: RunConfig) -> None:
    """Options of a strategy that is not the one in force would be ignored.

    Raises:
        ConfigError: there are some.
    """
    for options, strategies in _OPTIONS_OF.items():
        if getattr(config, options) is not None and config.strategy not in strategies:
            place = config.sources.get(options, "an unnamed place")
            asked = repr(config.strategy) if config.strategy else "not given"
            raise ConfigError(
                f"{options} (from {place}) holds options of strategy {strategies[0]!r}, but strategy is {asked}; ask "
                f"for strategy={strategies[0]!r} too, or leave {options} out"
            )


def _require_sharded(config: RunConfig, num_ranks: int, on_each: int) -> None:
    tensor = 1
    if config.tensor_parallel is not None or config.strategy == "tensor_parallel":
        asked = read_options(TensorParallel, config.tensor_parallel or {}, "tensor_parallel")
        tensor = tensor_ranks(asked, num_ranks)
    if config.context_parallel is not None or config.strategy == "context_parallel":
        context = read_options(ContextParallel, config.context_parallel or {}, "context_parallel")
        context_ranks(context.size, num_ranks, tensor)
    if config.strategy == "fsdp":
        options = read_options(FSDP, config.fsdp or {}, "fsdp")
        if options.sharding != "auto":
            shard_ranks(options, num_ranks // tensor, on_each // tensor)


def tensor_ranks(options: TensorParallel, world_size: int) -> int:
    """Ranks that share one copy of the model's matrices.

    Raises:
        ConfigError: the ranks cannot be divided into groups of that size.
    """
    size = options.size or world_size
    if world_size % size:
        raise ConfigError(
            f"tensor_parallel: size {size} does not divide the {world_size} ranks; use a divisor, or launch "
            f"{size * (world_size // size) or size}"
        )
    return size


def context_ranks(asked: int, world_size: int, tensor_size: int) -> int:
    """Ranks that share a sequence.

    Raises:
        ConfigError: they cannot be divided so.
    """
    size = asked or world_size // tensor_size
    if world_size % (size * tensor_size):
        raise ConfigError(
            f"context_parallel: {size} ranks for a sequence do not divide {world_size} ranks; choose a divisor"
        )
    return size


def shard_ranks(options: FSDP, data: int, local: int) -> int:
    """Ranks that share one copy of the parameters.

    Args:
        data: ranks with data, or a part of a sequence, of their own.
        local: those of them on this machine.

    Raises:
        ConfigError: they cannot be divided so.
    """
    shards = data
    if options.sharding == "no_shard":
        shards = 1
    elif options.sharding == "hybrid_shard":
        shards = options.shard_size or max(1, local)
        if data % shards:
            raise ConfigError(
                f"fsdp: shard_size is {shards}, which does not divide the {data} ranks with data of their own; choose "
                "a divisor"
            )
    kept = options.reshard_after_forward
    if kept is not None and not isinstance(kept, bool) and shards % kept:
        raise ConfigError(
            f"fsdp: reshard_after_forward is {kept}, which does not divide the {shards} rank(s) that share a copy of "
            "the parameters; choose a divisor, true (all of them) or false (whole on each)"
        )
    return shards


def copy_ranks(strategy: str, asked: int, world_size: int) -> int:
    """Ranks that share one copy of the model under "pipeline" or "megatron".

    Raises:
        ConfigError: they cannot be divided so.
    """
    size = asked or world_size
    if world_size % size:
        raise ConfigError(
            f"{strategy}: {world_size} ranks cannot be divided into groups of {size}; launch a multiple of {size}, or "
            "choose a divisor"
        )
    return size
