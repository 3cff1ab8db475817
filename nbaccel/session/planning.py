"""`nbaccel.plan`: how a model would be trained, before there are any ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbaccel.config import RunConfig
from nbaccel.errors import ConfigError
from nbaccel.session.devices import choose_device
from nbaccel.session.environment import probe

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbaccel.core.plan import Machine, Plan

__all__ = ["plan"]

_COMPUTED = {"no": "", "bf16": "bfloat16", "fp16": "float16", "fp8": "bfloat16"}
"""What activations are kept in."""


def plan(
    model: Any,
    *,
    optimizer: str = "adamw",
    batch: Any = None,
    num_processes: int | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    mixed_precision: str = "no",
    ranks_per_host: int | None = None,
    machine: Machine | None = None,
) -> Plan:
    """How `model` can be trained on so many ranks: every way, what it takes, the fastest that fits.

    Nothing is started and no device is touched. `print(plan)` is a table.

    Args:
        model: a module, on the meta device too; or what `nbaccel estimate` reads: a folder, a file, a name.
        optimizer: "adamw", "adam", "rmsprop", "adagrad", "momentum" or "sgd".
        batch: what one rank's model is called with, to trace one step for activations and operations; None:
            the states alone are compared.
        num_processes: ranks; None: as many as a launch here would make.
        loss: `loss(model, batch)`; None: the output's `.loss`, else the mean of its first tensor.
        mixed_precision: "no", "bf16", "fp16" or "fp8".
        ranks_per_host: None: all on this host.
        machine: what each rank has, where that is another than this one (`nbaccel.core.plan.machine_for`).

    Raises:
        ConfigError: the model cannot be read or traced, or the optimizer or precision is not known.
    """
    import torch
    from torch import nn

    from nbaccel.core.plan import Activations, Setting, choose, measure, size_of, trace_step

    if not isinstance(model, (str, nn.Module)):
        raise ConfigError(f"plan takes a module, or text that names one, not a {type(model).__name__}")
    if mixed_precision not in _COMPUTED:
        raise ConfigError(f"mixed_precision is {mixed_precision!r}; it must be one of {', '.join(_COMPUTED)}")
    if isinstance(model, str) and batch is not None:
        raise ConfigError("a step can be traced of a module only; build it on the meta device and give that")
    size = size_of(model) if isinstance(model, nn.Module) else measure(model)
    found, ranks = (machine, num_processes) if machine and num_processes else _machine_here(num_processes)
    seen = Activations()
    notes: tuple[str, ...] = ("activations come on top: give batch=... to trace a step",)
    if batch is not None and isinstance(model, nn.Module):
        dtype = getattr(torch, computed) if (computed := _COMPUTED[mixed_precision]) else None
        seen, notes = trace_step(model, batch, dtype=dtype, loss=loss), ()
    setting = Setting(
        num_processes=ranks or 1,
        ranks_per_host=ranks_per_host or 0,
        optimizer=optimizer,
        mixed_precision=mixed_precision,
        activations=seen,
        device_type=(machine or found).device_type,
    )
    return choose(size, setting, machine or found, notes=notes)


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
