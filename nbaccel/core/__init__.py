"""The training core: torch on this rank; knows no notebook, session or engine."""

from nbaccel.core.accelerator import Accelerator
from nbaccel.core.memory import find_executable_batch_size
from nbaccel.core.precision import ScalerOptions
from nbaccel.core.rng import set_seed
from nbaccel.core.strategies.ddp import DDPOptions

__all__ = ["Accelerator", "DDPOptions", "ScalerOptions", "find_executable_batch_size", "set_seed"]
