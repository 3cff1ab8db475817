"""Sizes of the ways a model is spread, turned into `strategy=`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, final

from nbaccel.errors import ConfigError
from nbaccel.parallel import FSDP, ContextParallel, TensorParallel

__all__ = ["ParallelismConfig"]


@final
@dataclass
class ParallelismConfig:
    """Over how many ranks each way of spreading goes; their product is the number of ranks.

    Raises:
        ConfigError: a size below 1, or what has no counterpart here.
    """

    dp_replicate_size: int = 1
    """Copies of the model."""
    dp_shard_size: int = 1
    """Ranks over which parameters are sharded, by FSDP."""
    tp_size: int = 1
    """Ranks that share matrices."""
    cp_size: int = 1
    """Ranks that share a sequence; parameters are sharded over them too."""
    cp_backend: Literal["torch"] = "torch"
    sp_size: int = 1
    """Must be 1: DeepSpeed's sequence parallelism does not exist here."""
    tp_handler: Any = None
    cp_handler: Any = None
    sp_handler: Any = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name.endswith("_size") and getattr(self, field.name) < 1:
                raise ConfigError(f"ParallelismConfig: {field.name} must be at least 1")
            if field.name.endswith("_handler") and getattr(self, field.name) is not None:
                raise ConfigError(f"ParallelismConfig: {field.name} cannot be honoured; leave it out")
        if self.sp_size > 1:
            raise ConfigError(
                "ParallelismConfig: sp_size does not exist here; cp_size cuts sequences, by torch's context parallelism"
            )

    @property
    def total_size(self) -> int:
        """How many ranks it needs."""
        return math.prod((self.dp_replicate_size, self.dp_shard_size, self.tp_size, self.cp_size))

    def strategy(self, asked: Any = None) -> Any:
        """The same as nbaccel has it; None is copies on all ranks.

        Args:
            asked: the strategy of another plugin, whose other options are kept.

        Raises:
            ConfigError: that one cannot go with these sizes.
        """
        tensor = TensorParallel(size=self.tp_size) if self.tp_size > 1 else None
        context = ContextParallel(size=self.cp_size) if self.cp_size > 1 else None
        shards = self.dp_shard_size * self.cp_size
        if self.total_size == 1 or (asked is None and shards == 1):
            return tensor or asked
        if not (asked is None or isinstance(asked, FSDP)):
            raise ConfigError(f"ParallelismConfig cannot go together with {type(asked).__name__}")
        hybrid = {"sharding": "hybrid_shard", "shard_size": shards} if self.dp_replicate_size > 1 else {}
        return replace(asked or FSDP(), tensor_parallel=tensor, context_parallel=context, **hybrid)  # type: ignore[arg-type]

    def check(self, num_processes: int) -> None:
        """Whether there are as many ranks.

        Raises:
            ConfigError: there are not.
        """
        if self.total_size not in (1, num_processes):
            raise ConfigError(
                f"ParallelismConfig is for {self.total_size} ranks (the product of its sizes), and there are "
                f"{num_processes}"
            )
