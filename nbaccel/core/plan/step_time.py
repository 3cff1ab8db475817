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
    """Seconds of the collectives, in rings: an all-reduce moves its bytes twice, a gather or a reduce-scatter once."""
    if setting.num_processes == 1:
        return 0.0
    if spread.family == "tensor_parallel":
        return _within_layers(size, spread, setting, machine, each)
    whole = each * size.parameters
    if spread.family == "ddp":
        buckets = 1 + whole / 25e6
        return 2 * _moved(whole, setting) / _across(setting, machine) + machine.latency * buckets
    if spread.name == "hybrid":
        local = setting.local_size
        inside = 3 * (local - 1) / local * whole / machine.link_bandwidth
        between = 2 * whole / local / _across(setting, machine)
        return inside + between + machine.latency * 4 * size.num_blocks
    return _of_shards(size, spread, setting, machine, whole)


def _moved(whole: float, setting: Setting) -> float:
    """Bytes that a rank sends in a ring, of so many that all have or get."""
    return (setting.num_processes - 1) / setting.num_processes * whole


def _across(setting: Setting, machine: Machine) -> float:
    """Bandwidth of the narrowest link between all ranks."""
    several = setting.num_processes > setting.local_size
    return machine.network_bandwidth if several else machine.link_bandwidth


def _within_layers(size: Size, spread: Spread, setting: Setting, machine: Machine, each: float) -> float:
    """Four all-reduces of a block's output in each step, and one of gradients between the copies."""
    width = math.sqrt(size.largest_block / 12)  # a block of width h has 12 h^2 parameters
    rows = setting.activations.flops / (6 * max(size.parameters, 1))
    share = (spread.tensor - 1) / spread.tensor
    output = 2 * share * each * rows * width / machine.link_bandwidth + machine.latency
    seconds = size.num_blocks * 4 * output
    if setting.num_processes > spread.tensor:
        between = 2 * _moved(each * size.parameters, setting) / spread.tensor
        seconds += between / _across(setting, machine)
    return seconds


def _of_shards(size: Size, spread: Spread, setting: Setting, machine: Machine, whole: float) -> float:
    """Parameters gathered and gradients reduced, packed before each and unpacked after it."""
    if spread.weights > 1:
        passes = 2 + _gathered_again(size, spread, setting)
        moved, calls = passes * _moved(whole, setting), passes * (size.num_blocks + 1)
    else:
        # gradients are reduced to their owners, and what these have stepped is gathered
        passes = 1.0
        buckets = size.parameters // max(1, zero_buckets(size, setting.num_processes).reduce)
        moved, calls = 2 * _moved(whole, setting), 2 + buckets
    seconds = moved / _across(setting, machine) + machine.latency * calls
    seconds += 2 * passes * whole / machine.packing_bandwidth
    if spread.offload:
        seconds += 2 * whole / setting.num_processes / machine.host_bandwidth
    return seconds


def _gathered_again(size: Size, spread: Spread, setting: Setting) -> float:
    """The part of the parameters that backward gathers once more."""
    if spread.whole:
        return 0.0
    if spread.family != "zero":
        return 1.0
    live = zero_buckets(size, setting.num_processes, offloaded=spread.offload).live
    return 1 - min(1.0, live / max(size.parameters, 1))


def _optimizer(size: Size, spread: Spread, setting: Setting, machine: Machine) -> float:
    """Bound by memory: parameter, gradient and state are read, parameter and state written."""
    numbers = 3 + 2 * OPTIMIZERS[setting.optimizer]
    touched = numbers * size.element_bytes * size.trainable / spread.optimizer / spread.tensor
    # Stepping on the host: its memory is an order slower, and all ranks share it.
    bandwidth = 1e10 if spread.offload else machine.memory_bandwidth
    if spread.family == "zero":
        touched += 3 * 4 * size.trainable / spread.optimizer  # gradients flattened, parameters copied back
    return touched / bandwidth
