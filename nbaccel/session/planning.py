"""`nbaccel.plan`: how a model would be trained, before there are any ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbaccel.checks import choice, count
from nbaccel.config import RunConfig
from nbaccel.errors import ConfigError
from nbaccel.session.devices import choose_device
from nbaccel.session.environment import probe

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.optim import Optimizer

    from nbaccel.core.plan import Activations, Machine, Plan

__all__ = ["plan"]

_COMPUTED = {"no": "", "bf16": "bfloat16", "fp16": "float16", "fp8": "bfloat16"}
"""What activations are kept in."""


def plan(
    model: Any,
    *,
    optimizer: str | Optimizer | type[Optimizer] = "adamw",
    batch: Any = None,
    num_processes: int | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    mixed_precision: str = "no",
    ranks_per_host: int | None = None,
    machine: Machine | None = None,
) -> Plan:
    """How `model` can be trained on so many ranks: every way, what it takes, the fastest that fits.

    Nothing is started and no device is touched; the model is as it was, as far as
    `nbaccel.core.model.unchanged` says. `print(plan)` is a table.

    Args:
        model: a module, on the meta device too; or what `nbaccel estimate` reads: a folder, a file, a name.
        optimizer: "adamw", "adam", "rmsprop", "adagrad", "momentum" or "sgd"; or an optimizer or its class.
        batch: what one rank's model is called with, to trace one step for activations and operations. None,
            or where the step cannot be traced, which a note says: the states alone are compared.
        num_processes: ranks; None: as many as a launch here would make.
        loss: `loss(model, batch)`; None: the output's `.loss`, else the mean of its first tensor.
        mixed_precision: "no", "bf16", "fp16" or "fp8".
        ranks_per_host: None: all on one host.
        machine: what each rank has, where that is another than this one (`nbaccel.core.plan.machine_for`).

    Raises:
        ConfigError: the model cannot be read, or an option cannot be.
    """
    from torch import nn

    from nbaccel.core.plan import Activations, Setting, choose, measure, size_of

    if not isinstance(model, (str, nn.Module)):
        raise ConfigError(f"plan takes a module, or text that names one, not a {type(model).__name__}")
    choice("mixed_precision", mixed_precision, list(_COMPUTED))
    _check_ranks(num_processes, ranks_per_host)
    if isinstance(model, str) and batch is not None:
        raise ConfigError("a step can be traced of a module only; build it on the meta device and give that")
    kind, notes = _kind(optimizer)
    size = size_of(model) if isinstance(model, nn.Module) else measure(model)
    found, ranks = (machine, num_processes) if machine and num_processes else _machine_here(num_processes)
    seen = Activations()
    said: tuple[str, ...] = ("activations come on top: give batch=... to trace a step",)
    if batch is not None and isinstance(model, nn.Module):
        seen, said = _traced(model, batch, _COMPUTED[mixed_precision], loss)
    setting = Setting(
        num_processes=ranks,
        ranks_per_host=ranks_per_host or 0,
        optimizer=kind,
        mixed_precision=mixed_precision,
        activations=seen,
        device_type=(machine or found).device_type,
    )
    return choose(size, setting, machine or found, notes=(*notes, *said))


def _check_ranks(num_processes: int | None, ranks_per_host: int | None) -> None:
    for name, number in (("num_processes", num_processes), ("ranks_per_host", ranks_per_host)):
        if number is not None:
            count(name, number, 1)
    if num_processes and ranks_per_host and num_processes > ranks_per_host and num_processes % ranks_per_host:
        raise ConfigError(
            f"{num_processes} ranks cannot be divided into hosts of {ranks_per_host}; give a ranks_per_host that "
            "divides num_processes"
        )


def _kind(optimizer: Any) -> tuple[str, tuple[str, ...]]:
    """The planner's word for an optimizer, and what had to be assumed."""
    from torch.optim import Optimizer

    from nbaccel.core.plan import optimizer_kind
    from nbaccel.core.plan.memory import OPTIMIZERS

    if isinstance(optimizer, Optimizer) or (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        return optimizer_kind([optimizer])
    choice("optimizer", optimizer, list(OPTIMIZERS))
    return str(optimizer), ()


def _traced(
    model: nn.Module, batch: Any, computed: str, loss: Callable[[Any, Any], Any] | None
) -> tuple[Activations, tuple[str, ...]]:
    """What a step keeps and computes, and why it is not known where it is not."""
    import torch

    from nbaccel.core.plan import Activations, trace_step

    try:
        return trace_step(model, batch, dtype=getattr(torch, computed) if computed else None, loss=loss), ()
    except ConfigError as error:
        return Activations(), (f"activations come on top: {error}",)


def _machine_here(num_processes: int | None) -> tuple[Machine, int]:
    """What a rank of a launch here would have, and how many there would be."""
    from nbaccel.core.plan import machine_for

    environment = probe()
    chosen = choose_device(RunConfig(), environment)
    ranks = num_processes or max(1, chosen.count)
    host = environment.resources.memory or 0
    if chosen.device == "cpu":
        cores = max(1, environment.resources.cores) / ranks
        share = host // ranks
        return machine_for("", device_type="cpu", device_bytes=share, host_bytes=host, cores=cores), ranks
    gpus = [gpu for gpu in chosen.gpus if gpu.memory_total]
    smallest = min((gpu.memory_total or 0 for gpu in gpus), default=0)
    if not smallest:
        raise ConfigError(
            f"the memory of this machine's {chosen.device} devices is not known; give machine=machine_for(...)"
        )
    name = gpus[0].name
    return machine_for(name, device_type=chosen.device, device_bytes=smallest, host_bytes=host), ranks
