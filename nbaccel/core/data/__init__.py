"""Data for the training loop: divided over the ranks, in an order that can be taken up anywhere."""

from nbaccel.core.data.loader import LoopControl, ShardedLoader
from nbaccel.core.data.plan import Shard
from nbaccel.core.data.seeding import derive_seed

__all__ = ["LoopControl", "Shard", "ShardedLoader", "derive_seed"]
