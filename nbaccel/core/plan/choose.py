"""From a model, a setting and a machine to the fastest way to train that fits; all of them are shown."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from nbaccel.checks import choice
from nbaccel.core.plan.machine import Machine
from nbaccel.core.plan.memory import OPTIMIZERS, Memory, Setting, Spread, spreads, training_memory
from nbaccel.core.plan.size import Size
from nbaccel.core.plan.step_time import StepTime, step_time
from nbaccel.errors import ConfigError
from nbaccel.parallel import StrategyLike

__all__ = ["Candidate", "Plan", "choose", "runnable_here"]

_ROOM = 0.92
"""Of the device's memory: the rest goes to its runtime, fragments and libraries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to spread the model, what it takes, and why it is not taken (empty: it could be)."""

    spread: Spread
    memory: Memory
    time: StepTime
    why_not: str = ""

    @property
    def seconds_per_batch(self) -> float:
        """Of the batches that all ranks compute together, one of them: ranks under tensor parallelism share
        theirs."""
        return self.time.total * self.spread.tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What was chosen, and all that was considered. `str(plan)` is a table."""

    chosen: Candidate | None
    """None: nothing fits. One that is tried nevertheless says in `why_not` why it should not be."""
    candidates: tuple[Candidate, ...]
    size: Size
    setting: Setting
    machine: Machine
    notes: tuple[str, ...] = ()
    because: str = ""
    """Why it was chosen, where that is not its speed."""

    @property
    def strategy(self) -> StrategyLike:
        """What to ask of an Accelerator for what was chosen.

        Raises:
            ConfigError: nothing fits.
        """
        if self.chosen is None:
            raise ConfigError(self.why())
        return self.chosen.spread.strategy

    def why(self) -> str:
        """One sentence."""
        if self.chosen is None:
            least = min(self.candidates, key=lambda one: one.memory.total)
            return (
                f"nothing fits: {least.spread.name} takes least and needs {_bytes(least.memory.total)} of "
                f"{_bytes(self.machine.device_bytes)}"
            )
        taken = f"{_bytes(self.chosen.memory.total)} of {_bytes(self.machine.device_bytes)} per rank"
        if self.chosen.why_not:
            return f"{self.chosen.spread.name}: nothing fits, and this takes least ({taken})"
        others = [one for one in self.candidates if not one.why_not]
        faster = "the only one left" if len(others) == 1 else f"the fastest of {len(others)} that fit"
        return f"{self.chosen.spread.name}: {self.because or faster} ({taken})"

    def __str__(self) -> str:
        head = (
            f"{self.size.name}: {self.size.parameters:,} parameters, {self.setting.optimizer}, "
            f"{self.setting.num_processes} rank(s) on {self.machine.device_type} with "
            f"{_bytes(self.machine.device_bytes)} each"
        )
        columns = (
            "",
            "strategy",
            "weights",
            "gradients",
            "optimizer",
            "working",
            "together",
            "step",
            "why not",
        )
        rows = [columns, *(self._row(one) for one in self.candidates)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
        lines = [
            "  ".join(
                text.ljust(width) if i in (0, 1, 8) else text.rjust(width)
                for i, (text, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([head, *lines, self.why(), *self.notes])

    def _row(self, one: Candidate) -> tuple[str, ...]:
        held = one.memory
        sizes = (held.weights, held.gradients, held.optimizer, held.working, held.total)
        mark = "→" if one is self.chosen else ""
        return (mark, one.spread.name, *map(_bytes, sizes), _seconds(one.seconds_per_batch), one.why_not)


def runnable_here(spread: Spread) -> str:
    """Why this installation cannot run a candidate; empty if it can."""
    if spread.family == "zero" and importlib.util.find_spec("deepspeed") is None:
        return "pip install 'nbaccel[deepspeed]'"
    if spread.family == "tensor_parallel":
        return "only when asked for, TensorParallel(size=…): it needs a plan of the model's layers"
    return ""


def choose(
    size: Size,
    setting: Setting,
    machine: Machine,
    *,
    refuse: Callable[[Spread], str] = runnable_here,
    notes: tuple[str, ...] = (),
) -> Plan:
    """The fastest candidate that fits, in a plan with all of them.

    Args:
        refuse: why a candidate is out of the question although it fits; empty if it is not.

    Raises:
        ConfigError: the optimizer is not known.
    """
    choice("optimizer", setting.optimizer, list(OPTIMIZERS))
    found = [_candidate(size, spread, setting, machine, refuse) for spread in spreads(setting)]
    good = [one for one in found if not one.why_not]
    chosen = min(good, key=lambda one: one.seconds_per_batch, default=None)
    return Plan(
        chosen=chosen, candidates=tuple(found), size=size, setting=setting, machine=machine, notes=notes
    )


def _candidate(
    size: Size, spread: Spread, setting: Setting, machine: Machine, refuse: Callable[[Spread], str]
) -> Candidate:
    memory = training_memory(size, spread, setting)
    room = _ROOM * machine.device_bytes
    on_host = memory.host * setting.local_size
    why = ""
    if memory.total > room:
        why = f"needs {_bytes(memory.total)} of {_bytes(int(room))} usable"
    elif on_host > _ROOM * machine.host_bytes:
        why = f"needs {_bytes(on_host)} of the host's {_bytes(machine.host_bytes)}"
    else:
        why = refuse(spread)
    return Candidate(
        spread=spread, memory=memory, time=step_time(size, spread, setting, machine), why_not=why
    )


def _bytes(count: int) -> str:
    for unit, each in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= each:
            return f"{count / each:.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
