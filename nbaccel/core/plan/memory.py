"""What training holds in memory on one rank, by how the model is spread.

The shares are those of the ZeRO paper (Rajbhandari et al. 2020, section 5). What comes on top of them, how
many blocks FSDP2 holds gathered and what DeepSpeed keeps in buffers, was measured: tests/core/plan compares
the sums with peaks of real ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch.optim import Optimizer

from nbaccel.core.plan.activations import Activations
from nbaccel.core.plan.size import Size
from nbaccel.parallel import FSDP, DeepSpeed, StrategyLike, TensorParallel

__all__ = [
    "OPTIMIZERS",
    "Buckets",
    "Memory",
    "Setting",
    "Spread",
    "optimizer_kind",
    "spreads",
    "training_memory",
    "zero_buckets",
]

OPTIMIZERS: dict[str, int] = {"adamw": 2, "adam": 2, "rmsprop": 1, "adagrad": 1, "momentum": 1, "sgd": 0}
"""Numbers of state per parameter, each as wide as the parameter, as torch.optim keeps them."""
_KINDS = {"AdamW": "adamw", "Adam": "adam", "RMSprop": "rmsprop", "Adagrad": "adagrad"}
_GATHERED = 3.5
"""Blocks that FSDP2 holds at once: one at work, one prefetched, and the buffers they come and go in."""
_ZERO_GATHERED = 2.5
"""Blocks that ZeRO-3 holds beside those that `zero_buckets` lets live: the buffers they come and go in."""
_LIVE = 0.75
"""Part of the parameters that ZeRO-3 keeps whole from forward to backward. With all of them it takes more memory than
DeepSpeed as transformers sets it up; with one block it gathers half as much again (benchmarks/strategies.py)."""

Family = Literal["single", "ddp", "fsdp", "zero", "tensor_parallel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is to be trained, and with what."""

    num_processes: int = 1
    ranks_per_host: int = 0
    """0: all of them on one host."""
    optimizer: str = "adamw"
    mixed_precision: str = "no"
    activations: Activations = field(default_factory=Activations)
    device_type: str = "cpu"

    @property
    def local_size(self) -> int:
        """Ranks on a host."""
        return min(self.ranks_per_host or self.num_processes, self.num_processes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Over how many ranks each part of the training state is divided; 1: whole on every rank."""

    name: str
    family: Family
    weights: int = 1
    gradients: int = 1
    optimizer: int = 1
    tensor: int = 1
    """Ranks that compute one batch together."""
    offload: bool = False
    """The state lives in host memory and comes to the device block by block."""
    whole: bool = False
    """Sharded weights stay whole from forward to backward."""

    @property
    def strategy(self) -> StrategyLike:
        """What to ask of an Accelerator for it."""
        if self.family == "zero":
            if self.offload:
                return DeepSpeed(stage=3, offload_optimizer="cpu", offload_param="cpu")
            return DeepSpeed(stage=3 if self.weights > 1 else 2 if self.gradients > 1 else 1)
        if self.family == "fsdp":
            if self.whole:
                return FSDP(sharding="shard_grad_op")
            return FSDP(sharding="hybrid_shard") if self.name == "hybrid" else FSDP(cpu_offload=self.offload)
        return TensorParallel(size=self.tensor) if self.family == "tensor_parallel" else self.family


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one rank, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    working: int
    """What the worst moment of a step takes beside these: activations, gathered blocks, buffers, temporaries."""
    host: int = 0
    """Of this rank, in host memory."""

    @property
    def total(self) -> int:
        """On the device, at the worst moment of a step."""
        return self.weights + self.gradients + self.optimizer + self.working


@dataclass(frozen=True, slots=True, kw_only=True)
class Buckets:
    """DeepSpeed's buffers for a model of a size, in elements. Its own defaults are for models of 10^10."""

    reduce: int
    live: int
    prefetch: int
    persistent: int
    sub_group: int


def zero_buckets(size: Size, num_processes: int, *, offloaded: bool = False) -> Buckets:
    """Buffers that stay small beside the model; DeepSpeed's defaults where the model is large.

    Args:
        offloaded: parameters live in host memory or on disk, so that the device's is what is short.
    """
    live = size.largest_block if offloaded else max(size.largest_block, int(_LIVE * size.parameters))
    return Buckets(
        reduce=min(500_000_000, max(size.largest_parameter, size.parameters // 16)),
        live=min(1_000_000_000, live),
        prefetch=min(50_000_000, size.largest_block // 2),
        persistent=min(100_000, size.largest_parameter // 16),
        sub_group=min(1_000_000_000, max(size.largest_parameter, size.parameters // num_processes // 4)),
    )


def optimizer_kind(optimizers: Sequence[Optimizer | type[Optimizer]]) -> tuple[str, tuple[str, ...]]:
    """Which of `OPTIMIZERS` keeps what these do, by the one with most state, and what had to be assumed."""
    if not optimizers:
        return "adamw", ("no optimizer came with the model: AdamW's state is assumed",)
    names = {(one if isinstance(one, type) else type(one)).__name__ for one in optimizers}
    for name, kind in _KINDS.items():
        if name in names:
            return kind, ()
    if names == {"SGD"}:
        groups = [group for one in optimizers if isinstance(one, Optimizer) for group in one.param_groups]
        return "momentum" if any(group.get("momentum") for group in groups) else "sgd", ()
    return "adamw", (f"the state of {', '.join(sorted(names))} is not known: AdamW's is assumed",)


def spreads(setting: Setting) -> list[Spread]:
    """The ways to spread a model over so many ranks."""
    n, local = setting.num_processes, setting.local_size
    if n == 1:
        return [Spread(name="single", family="single")]
    found = [
        Spread(name="ddp", family="ddp"),
        Spread(name="zero-1", family="zero", optimizer=n),
        Spread(name="zero-2", family="zero", gradients=n, optimizer=n),
        Spread(name="fsdp grad op", family="fsdp", weights=n, gradients=n, optimizer=n, whole=True),
        Spread(name="fsdp", family="fsdp", weights=n, gradients=n, optimizer=n),
        Spread(name="zero-3", family="zero", weights=n, gradients=n, optimizer=n),
    ]
    if 1 < local < n and n % local == 0:
        found.append(Spread(name="hybrid", family="fsdp", weights=local, gradients=local, optimizer=local))
    if setting.device_type != "cpu":
        found += [
            Spread(name="fsdp offload", family="fsdp", weights=n, gradients=n, optimizer=n, offload=True),
            Spread(name="zero-3 offload", family="zero", weights=n, gradients=n, optimizer=n, offload=True),
        ]
    found += [
        Spread(name=f"tensor parallel {t}", family="tensor_parallel", tensor=t)
        for t in (2, 4, 8)
        if t <= local and local % t == 0
    ]
    return found


def training_memory(size: Size, spread: Spread, setting: Setting) -> Memory:
    """What training takes on one rank at the worst moment of a step.

    Raises:
        KeyError: an optimizer that is not in `OPTIMIZERS`.
    """
    weights = size.element_bytes * size.parameters / spread.weights / spread.tensor
    gradients = size.element_bytes * size.trainable / spread.gradients / spread.tensor
    state = (
        OPTIMIZERS[setting.optimizer] * size.element_bytes * size.trainable / spread.optimizer / spread.tensor
    )
    if spread.family == "zero":
        # A copy of this rank's share in float32, which the optimizer steps.
        narrow = _narrow_bytes(size, setting)
        weights = narrow * size.parameters / spread.weights
        weights += 4 * size.trainable / spread.optimizer
        gradients = narrow * size.trainable / spread.gradients
        state = OPTIMIZERS[setting.optimizer] * 4 * size.trainable / spread.optimizer
    working = _WORKING[spread.family](size, spread, setting, gradients)
    on_device = 0.0 if spread.offload else weights + gradients + state
    return Memory(
        weights=0 if spread.offload else int(weights) + size.buffer_bytes,
        gradients=0 if spread.offload else int(gradients),
        optimizer=0 if spread.offload else int(state),
        working=max(0, int(working)),
        host=int(weights + gradients + state - on_device),
    )


def _narrow_bytes(size: Size, setting: Setting) -> float:
    """Bytes of a parameter as it is computed with."""
    return 2.0 if setting.mixed_precision in ("bf16", "fp16", "fp8") else size.element_bytes


def _step_temporaries(setting: Setting, *, largest: float, together: float) -> float:
    """Bytes an optimizer step takes beside its state.

    On the CPU torch steps one tensor after another, with two more of its size; elsewhere all together, with
    one more of theirs.
    """
    if OPTIMIZERS[setting.optimizer] == 0:
        return 0.0
    return 2 * largest if setting.device_type == "cpu" else together


def _whole(size: Size, spread: Spread, setting: Setting, gradients: float) -> float:
    """Single, DDP and tensor parallel: gradients that are not yet there leave room for activations, unless
    DDP's buckets hold it."""
    seen, share = setting.activations, spread.tensor
    step = _step_temporaries(
        setting,
        largest=size.element_bytes * size.largest_parameter / share,
        together=size.element_bytes * size.parameters / share,
    )
    each = _narrow_bytes(size, setting)
    # What autocast makes of the weights lives from forward to backward.
    copies = each * size.parameters / share if each < size.element_bytes else 0.0
    if spread.family == "ddp":
        backward = float(seen.peak)
    elif spread.family == "single":
        backward = seen.with_gradients - gradients
    else:
        backward = seen.peak / share - gradients
    return max(backward + copies, seen.held + step)


def _fsdp(size: Size, spread: Spread, setting: Setting, gradients: float) -> float:
    """What is outside the blocks stays gathered to the end of backward, where its gradients meet it twice:
    whole, and in the buffer they are sent from."""
    seen, each = setting.activations, _narrow_bytes(size, setting)
    blocks, outside = _GATHERED * each * size.largest_block, each * size.outside
    step = _step_temporaries(
        setting,
        largest=size.element_bytes * size.largest_parameter / spread.weights,
        together=size.element_bytes * size.parameters / spread.weights,
    )
    gathered = each * size.parameters if spread.whole else outside + blocks
    during = seen.peak + gathered - (0 if spread.offload else gradients)
    at_end = seen.held + (2 * outside if spread.whole else max(3 * outside, outside + blocks))
    return max(during, at_end, 0 if spread.offload else seen.held + step)


def _zero(size: Size, spread: Spread, setting: Setting, gradients: float) -> float:
    """Backward fills a bucket and what a stage keeps; the step takes flat float32 gradients of this rank's
    share, with temporaries of as much as is stepped together."""
    seen, each = setting.activations, _narrow_bytes(size, setting)
    buckets = zero_buckets(size, setting.num_processes, offloaded=spread.offload)
    share = size.trainable / spread.optimizer
    stepped = min(share, buckets.sub_group) if spread.weights > 1 else share
    step = 4 * stepped + _step_temporaries(setting, largest=4 * stepped, together=4 * stepped)
    live = buckets.live + _ZERO_GATHERED * size.largest_block + size.outside
    gathered = each * min(live, size.parameters + 2 * size.largest_block) if spread.weights > 1 else 0.0
    around = gathered + 2 * each * min(buckets.reduce, size.trainable)
    if spread.offload:
        return seen.peak + around
    # Not yet there at the peak of activations, nor any more in the step; stage 3 has its buffer from the start.
    absent = gradients if spread.weights == 1 else 0.0
    return max(seen.peak + around - absent, seen.held + around, seen.held + step - absent)


_WORKING: dict[Family, Callable[[Size, Spread, Setting, float], float]] = {
    "single": _whole,
    "ddp": _whole,
    "tensor_parallel": _whole,
    "fsdp": _fsdp,
    "zero": _zero,
}
