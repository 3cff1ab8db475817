"""How long one optimizer step takes, estimated: computing, communication that nothing hides, the optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nbaccel.core.plan.machine import Machine
from nbaccel.core.plan.memory import OPTIMIZERS, Setting, Spread, zero_buckets
from nbaccel.core.plan.size import Size

__all__ = ["StepTime", "step_time"]

_HOOKS = {"single": 0.0, "ddp": 2e-4, "tensor_parallel": 3e-4, "fsdp": 8e-4, "zero": 1.5e-3}
"""Seconds of Python around a block in each step, by family (seen on one CPU core)."""
_HIDDEN = 0.9
"""Part of the communication that computing hides, where there is enough of it and the device can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of one step of a rank."""

    compute: float
    communication: float
    """What the ranks wait for."""
    optimizer: float
    overhead: float

    @property
    def total(self) -> float:
        """Of the whole step."""
        return self.compute + self.communication + self.optimizer + self.overhead


def step_time(size: Size, spread: Spread, setting: Setting, machine: Machine) -> StepTime:
    """One step with the batch that was traced; without one, of computing nothing."""
    narrow = setting.mixed_precision in ("bf16", "fp16", "fp8")
    each = 2.0 if narrow else size.element_bytes
    compute = setting.activations.flops / (machine.narrow_flops if narrow else machine.flops) / spread.tensor
    communication = _communication(size, spread, setting, machine, each)
    if machine.overlaps and spread.tensor == 1:
        communication -= _HIDDEN * min(communication, compute)
    return StepTime(
        compute=compute,
        communication=communication,
        optimizer=_optimizer(size, spread, setting, machine),
        overhead=_HOOKS[spread.family] * max(size.num_blocks, 1),
    )


def _communication(size: Size, spread: Spread, setting: Setting, machine: Machine, each: float) -> float:
    """Ring collectives: an all-reduce moves its bytes twice, a gather or a reduce-scatter once."""
    n, local = setting.num_processes, setting.local_size
    if n == 1:
        return 0.0
    inside, across = (
        machine.link_bandwidth,
        machine.network_bandwidth if n > local else machine.link_bandwidth,
    )
    whole = each * size.parameters
    ring = (n - 1) / n
    seconds = 0.0
    if spread.family == "tensor_parallel":
        # Four all-reduces of a block's output in each step; a block of width h has 12 h^2 parameters.
        width = math.sqrt(size.largest_block / 12)
        rows = setting.activations.flops / (6 * max(size.parameters, 1))
        share = (spread.tensor - 1) / spread.tensor
        seconds = size.num_blocks * 4 * (2 * share * each * rows * width / inside + machine.latency)
        if n > spread.tensor:
            seconds += 2 * ring * whole / spread.tensor / across
        return seconds
    if spread.family == "ddp":
        return 2 * ring * whole / across + machine.latency * (1 + whole / 25e6)
    if spread.name == "hybrid":
        group = (local - 1) / local
        return 3 * group * whole / inside + 2 * whole / local / across + machine.latency * 4 * size.num_blocks
    if spread.weights > 1:
        passes = 2 if spread.whole else 3  # one gathering less
        moved, calls = passes * ring * whole, passes * (size.num_blocks + 1)
    else:
        # DeepSpeed's reduction of stage 1 and 2 is an all-reduce on gloo; then parameters are gathered.
        passes = 1
        moved, calls = 2 * ring * whole, 2 + size.parameters // max(1, zero_buckets(size, n).reduce)
    seconds = moved / across + machine.latency * calls + 2 * passes * whole / machine.packing_bandwidth
    if spread.offload:
        seconds += 2 * whole / n / machine.host_bandwidth
    return seconds


def _optimizer(size: Size, spread: Spread, setting: Setting, machine: Machine) -> float:
    """Bound by memory: parameter, gradient and state are read, parameter and state written."""
    numbers = 3 + 2 * OPTIMIZERS[setting.optimizer]
    touched = numbers * size.element_bytes * size.trainable / spread.optimizer / spread.tensor
    # Stepping on the host: its memory is an order slower, and all ranks share it.
    bandwidth = 1e10 if spread.offload else machine.memory_bandwidth
    if spread.family == "zero":
        touched += 3 * 4 * size.trainable / spread.optimizer  # gradients flattened, parameters copied back
    return touched / bandwidth
