"""The plan for what `prepare` is given: made on rank 0 from what all ranks have, and told to all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from nbaccel.core.comm.collectives import broadcast_object_list, gather_object
from nbaccel.core.offload.limits import free_memory, own_limit
from nbaccel.core.plan import (
    Activations,
    Machine,
    Plan,
    Setting,
    Spread,
    choose,
    machine_for,
    optimizer_kind,
    size_of,
    spreads,
    trace_step,
    training_memory,
)
from nbaccel.core.plan.size import together
from nbaccel.core.precision import Precision
from nbaccel.core.rng import get_states, set_states
from nbaccel.core.world import World
from nbaccel.errors import ConfigError

__all__ = ["Given", "plan_for"]

_SMALL = 0.1
"""Of a rank's memory: where whole copies of the training state take less, dividing them gains nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What one call of prepare brings, before any of it is wrapped."""

    models: Sequence[nn.Module]
    optimizers: Sequence[Optimizer] = ()
    loaders: Sequence[DataLoader[Any]] = ()


def plan_for(given: Given, world: World, precision: Precision, refuse: Callable[[Spread], str]) -> Plan:
    """The same plan on every rank; all call it together.

    Where whole copies take a small part of the memory, nothing is traced and they are chosen. Else one sample
    of the first loader is read, on rank 0, for a batch to trace a step with.

    Args:
        refuse: why a way is out of the question although it fits; empty if it is not.

    Raises:
        ConfigError: all ways are; the same on every rank.
    """
    told = gather_object(_room(given.models, world), world=world)
    plan: Plan | ConfigError | None = None
    if world.is_main:
        device_bytes, host_bytes = (min(column) for column in zip(*told, strict=True))
        machine = _machine(world, device_bytes, host_bytes)
        try:
            plan = _made(given, world, precision, machine, refuse)
        except ConfigError as error:
            plan = error
    (agreed,) = broadcast_object_list([plan], world=world)
    if isinstance(agreed, ConfigError):
        raise agreed
    assert isinstance(agreed, Plan)
    return agreed


def _made(
    given: Given, world: World, precision: Precision, machine: Machine, refuse: Callable[[Spread], str]
) -> Plan:
    size = together([size_of(model) for model in given.models])
    optimizer, notes = optimizer_kind(given.optimizers)
    setting = Setting(
        num_processes=world.size,
        ranks_per_host=world.local_size,
        optimizer=optimizer,
        mixed_precision=precision.kind,
        device_type=world.device.type,
    )
    whole, *others = spreads(setting)
    share = training_memory(size, whole, setting).total / machine.device_bytes
    if not refuse(whole) and (share <= _SMALL or not others):
        needless = f"not needed: {whole.name} takes {share:.1%} of the memory before activations"
        plan = choose(
            size,
            setting,
            machine,
            refuse=lambda one: refuse(one) or ("" if one == whole else needless),
            notes=notes,
        )
        if others:
            plan = replace(plan, because="small, so that dividing it would gain nothing")
    else:
        seen, said = _traced(given, world, precision)
        setting = replace(setting, activations=seen)
        plan = choose(size, setting, machine, refuse=refuse, notes=(*notes, *said))
    return plan if plan.chosen is not None else _least(plan, refuse)


def _least(plan: Plan, refuse: Callable[[Spread], str]) -> Plan:
    """Nothing fits, by estimate: what takes least is tried all the same."""
    possible = [one for one in plan.candidates if not refuse(one.spread)]
    if not possible:
        raise ConfigError(f"no strategy can be chosen:\n{plan}")
    return replace(plan, chosen=min(possible, key=lambda one: one.memory.total))


# What a step keeps ---------------------------------------------------------------------------------------


def _traced(given: Given, world: World, precision: Precision) -> tuple[Activations, tuple[str, ...]]:
    """What a step of the first loader's batches keeps and computes, and why it is not known where it is not."""
    states = get_states(world.device)  # reading a sample may draw random numbers
    try:
        if len(given.models) > 1:
            raise ConfigError("several models came together")
        if not given.loaders:
            raise ConfigError("no loader came with the model")
        return trace_step(given.models[0], _batch(given.loaders[0]), dtype=precision.dtype), ()
    except ConfigError as error:
        return Activations(), (f"activations come on top: {error}",)
    finally:
        set_states(states, world.device)


def _batch(loader: DataLoader[Any]) -> Any:
    """A batch of the loader's size, of its first sample over and over.

    Raises:
        ConfigError: it cannot be had without reading on.
    """
    if isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        raise ConfigError("a batch of this loader cannot be had without reading on")
    try:
        return loader.collate_fn([loader.dataset[0]] * loader.batch_size)
    except Exception as error:  # the user's own code
        raise ConfigError(f"a sample cannot be read: {type(error).__name__}: {error}") from error


# What there is -------------------------------------------------------------------------------------------


def _room(models: Sequence[nn.Module], world: World) -> tuple[int, int]:
    """Bytes for training on this rank's device, those that the models take there included, and on its host."""
    host, own = free_memory(), own_limit()
    device = world.device
    free = host // world.local_size if own is None else min(own, host // world.local_size)
    if device.type in ("cuda", "xpu"):
        module: Any = torch.get_device_module(device)
        reserved = module.memory_reserved(device) - module.memory_allocated(device)
        free = int(module.mem_get_info(device)[0]) + reserved
    held = {p: p.nbytes for model in models for p in model.parameters() if p.device.type == device.type}
    return free + sum(held.values()), host


def _machine(world: World, device_bytes: int, host_bytes: int) -> Machine:
    device = world.device
    accelerated = device.type in ("cuda", "xpu")
    return machine_for(
        torch.get_device_module(device).get_device_name(device) if accelerated else "",
        device_type=device.type if accelerated else "cpu",
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        cores=torch.get_num_threads(),
    )
