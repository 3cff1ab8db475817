"""Which accelerators the ranks get: the kind, how many there are to take, and which one is whose.

Pure functions of what is asked and what is here. A device counts only when the installed torch was
built for it and the environment does not hide it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from nbaccel.config import RunConfig
from nbaccel.errors import ConfigError
from nbaccel.session.accelerators import Gpu, visible_gpus
from nbaccel.session.environment import Environment

__all__ = [
    "LABELS",
    "Choice",
    "Devices",
    "PlannedDevice",
    "asked_text",
    "assign",
    "choose_device",
    "free_gpus",
]

PlannedDevice = Literal["cpu", "cuda", "xpu", "mps", "tpu"]

LABELS: dict[PlannedDevice, str] = {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU", "mps": "MPS", "tpu": "TPU"}
# devices="free" without a number of ranks takes the GPUs that have less than this in use.
_FREE_MEMORY = 0.1
_FREE_UTILIZATION = 10
_GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A kind of device and how many of it there are to take."""

    device: PlannedDevice
    count: int = 0
    gpus: tuple[Gpu, ...] = ()
    """The visible ones, where they are known one by one."""
    numbered: bool = True
    """`gpus` is in the order of CUDA's own numbers; not so among unlike GPUs, which CUDA sorts by speed."""
    entries: tuple[str, ...] | None = None
    """The list in the environment that already picks among the devices, if there is one."""
    mask: str = "CUDA_VISIBLE_DEVICES"
    """The variable that picks."""
    reason: str = ""
    notes: tuple[str, ...] = ()
    hide: Mapping[str, str] = field(default_factory=dict)
    """Variables that keep accelerators out of sight of ranks that asked for the CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """The devices of the ranks, by local rank; all empty on the CPU."""

    indices: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


def choose_device(config: RunConfig, environment: Environment) -> Choice:
    """The kind of device the ranks compute on.

    Raises:
        ConfigError: the one asked is not here, or cannot be used.
    """
    wanted = config.device or "auto"
    if wanted == "cpu":
        return _the_cpu(environment)
    if wanted == "tpu":
        return Choice(device="tpu", reason="device: TPU, as asked")
    here, why_not = _devices_here(environment)
    if wanted == "auto" and here:
        return here[0]
    if wanted == "auto":
        reason = "device: the CPU, for no accelerator can be used here"
        return Choice(device="cpu", reason=reason, notes=_unused_notes(environment, why_not))
    for choice in here:
        if choice.device == wanted:
            return choice
    present = ", ".join(f"{choice.count} {LABELS[choice.device]}" for choice in here) or "none"
    why = why_not.get(wanted, f"no {wanted} device was found on this host")
    raise ConfigError(
        f"{asked_text(config, 'device')} cannot be honoured: {why}. "
        f'Accelerators that can be used here: {present}. To run on the CPU, paste device="cpu" '
        "(in a command: --device cpu)."
    )


def _devices_here(environment: Environment) -> tuple[list[Choice], dict[str, str]]:
    """The accelerators that ranks could use, best first, and why not for those that they could not."""
    there = environment.accelerators
    here: list[Choice] = []
    why_not: dict[str, str] = {}
    gpus = visible_gpus(there.gpus, environment.variables, there.torch_build)
    if there.tpu_chips and there.tpu_runtimes:
        here.append(
            Choice(device="tpu", count=there.tpu_chips, reason=f"device: TPU, {there.tpu_chips} chips")
        )
    if there.torch_build not in ("cuda", "rocm", "unknown"):
        built = f"built for {there.torch_build.upper()}, not CUDA"
        why_not["cuda"] = f"the torch that is installed ({there.torch_version}) is {built}"
    elif gpus:
        here.append(_cuda(environment, gpus))
    elif there.gpus:
        why_not["cuda"] = f"{_hiding(environment)} hides all {len(there.gpus)} GPUs of this host"
    else:
        why_not["cuda"] = "no CUDA device was found on this host"
    if there.xpus and there.torch_build in ("xpu", "unknown"):
        here.append(Choice(device="xpu", count=there.xpus, reason=f"device: XPU, {there.xpus} here"))
    if there.mps:
        here.append(Choice(device="mps", count=1, reason="device: MPS, the GPU of this Mac"))
    return here, why_not


def _cuda(environment: Environment, gpus: tuple[Gpu, ...]) -> Choice:
    there, variables = environment.accelerators, environment.variables
    # HIP reads CUDA's variable too, and its own first.
    mask = "HIP_VISIBLE_DEVICES" if there.torch_build == "rocm" else "CUDA_VISIBLE_DEVICES"
    picked = variables.get(mask, variables.get("CUDA_VISIBLE_DEVICES"))
    alike = len({gpu.name for gpu in there.gpus}) == 1
    by_address = variables.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or (picked or "").startswith("GPU-")
    return Choice(
        device="cuda",
        count=len(gpus),
        gpus=gpus,
        numbered=alike or by_address,
        entries=None if picked is None else tuple(entry.strip() for entry in picked.split(",")),
        mask=mask,
        reason=f"device: CUDA, {len(gpus)} visible of {len(there.gpus)} here",
        notes=_mig_notes(environment),
    )


def _the_cpu(environment: Environment) -> Choice:
    # A library that picks its own device takes a GPU when it sees one: what was asked must hold there too.
    hide: dict[str, str] = {}
    if environment.accelerators.gpus and environment.accelerators.torch_build != "cpu":
        names = ("HIP", "CUDA") if environment.accelerators.torch_build == "rocm" else ("CUDA",)
        hide = {f"{name}_VISIBLE_DEVICES": "" for name in names}
    return Choice(device="cpu", reason="device: the CPU, as asked", hide=hide)


def _unused_notes(environment: Environment, why_not: Mapping[str, str]) -> tuple[str, ...]:
    """What the user may have expected to be used, when it is the CPU in the end."""
    there = environment.accelerators
    notes = []
    if there.gpus and "cuda" in why_not:
        notes.append(f"The ranks use the CPU: {why_not['cuda']}.")
    if there.tpu_chips:
        notes.append(
            f"The ranks use the CPU: {there.tpu_chips} TPU chips are here, but no runtime for them: "
            "pip install 'nbaccel[tpu]' (TorchTPU) or 'nbaccel[xla]' (torch_xla, with torch 2.9)."
        )
    return tuple(notes)


def _hiding(environment: Environment) -> str:
    names = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
    return " and ".join(f"{n}={environment.variables[n]!r}" for n in names if n in environment.variables)


def _mig_notes(environment: Environment) -> tuple[str, ...]:
    slices = environment.variables.get("CUDA_VISIBLE_DEVICES", "").count("MIG-")
    if slices < 2:
        return ()
    return (f"CUDA_VISIBLE_DEVICES names {slices} MIG slices; CUDA gives a process only the first of them.",)


def assign(config: RunConfig, chosen: Choice, num_processes: int) -> Devices:
    """Which device each rank gets.

    Libraries take the device whose index is LOCAL_RANK. So where devices are picked, the ranks see only
    those, in rank order, and the index of each is its local rank again.

    Raises:
        ConfigError: a device that is picked is not there, or cannot be told.
    """
    if chosen.device in ("cpu", "tpu"):
        return Devices(variables=chosen.hide)  # a TPU's runtime gives each rank its own
    places = tuple(range(num_processes))
    variables: dict[str, str] = {}
    if config.devices is not None:
        places, variables = _picked(config, chosen, num_processes)
    return Devices(
        indices=tuple(range(num_processes)),
        names=tuple(device_name(chosen, place) for place in places),
        gpus=tuple(chosen.gpus[place] for place in places) if chosen.numbered and chosen.gpus else (),
        variables=variables,
    )


def _picked(config: RunConfig, chosen: Choice, num_processes: int) -> tuple[tuple[int, ...], dict[str, str]]:
    """The places among the visible devices that are picked, and the variables that say so to the ranks."""
    if chosen.device != "cuda":
        asked = asked_text(config, "devices")
        raise ConfigError(f"{asked} is built for CUDA only, and these ranks would use {chosen.device}")
    order: dict[str, str] = {}
    if config.devices == "free":
        gpus = sorted(_with_load(config, chosen), key=_load)[:num_processes]
        places = tuple(sorted(chosen.gpus.index(gpu) for gpu in gpus))
        if not chosen.numbered:
            order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}  # NVML's numbers, by which the load was read
    else:
        places = _listed(config, chosen)
    entries = chosen.entries or tuple(str(index) for index in range(chosen.count))
    return places, {**order, chosen.mask: ",".join(entries[place] for place in places)}


def _listed(config: RunConfig, chosen: Choice) -> tuple[int, ...]:
    asked = asked_text(config, "devices")
    places: list[int] = []
    for index in config.devices or ():
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < chosen.count:
            are = f"they are 0 to {chosen.count - 1}" if chosen.count > 1 else "there is only 0"
            raise ConfigError(f"{asked}: {index!r} is not the index of a visible CUDA device; {are}")
        if index in places:
            raise ConfigError(f"{asked}: {index} is there twice, and each rank needs its own")
        places.append(index)
    return tuple(places)


def device_name(chosen: Choice, place: int) -> str:
    """The device at this place among the visible ones, for people to read."""
    if not chosen.gpus or not chosen.numbered:
        return f"{LABELS[chosen.device]} {place}"
    return f"GPU {chosen.gpus[place].index} {chosen.gpus[place].name}".strip()


def free_gpus(config: RunConfig, chosen: Choice) -> tuple[int, str]:
    """How many of the visible GPUs nobody uses, and what each is used, in words.

    Raises:
        ConfigError: none is free, or it cannot be told.
    """
    gpus = _with_load(config, chosen)
    said = ", ".join(
        f"GPU {gpu.index}: {(gpu.memory_used or 0) / _GIB:.1f} GiB, {gpu.utilization or 0} %" for gpu in gpus
    )
    count = sum(_is_free(gpu) for gpu in gpus)
    if count == 0:
        raise ConfigError(
            f"{asked_text(config, 'devices')}, but every GPU is in use ({said}). "
            "Say how many to take all the same (num_processes=1), or which (devices=[0])."
        )
    return count, said


def _with_load(config: RunConfig, chosen: Choice) -> tuple[Gpu, ...]:
    asked = asked_text(config, "devices")
    if chosen.device != "cuda" or any(gpu.memory_used is None for gpu in chosen.gpus):
        raise ConfigError(
            f"{asked} needs NVML, which tells how much each NVIDIA GPU is used: pip install 'nbaccel[gpu]', "
            "or name the devices by index."
        )
    if not chosen.numbered and chosen.entries is not None:
        raise ConfigError(
            f"{asked}: the GPUs here are not alike, so CUDA and NVML number them differently. Set "
            "CUDA_DEVICE_ORDER=PCI_BUS_ID before the kernel starts, or name the devices by index."
        )
    return chosen.gpus


def _load(gpu: Gpu) -> tuple[int, int, int]:
    """Least used first: whole GiB of memory, as small differences mean nothing; then work; then place."""
    return (gpu.memory_used or 0) // _GIB, gpu.utilization or 0, gpu.index


def _is_free(gpu: Gpu) -> bool:
    used = (gpu.memory_used or 0) / (gpu.memory_total or 1)
    return used < _FREE_MEMORY and (gpu.utilization or 0) < _FREE_UTILIZATION


def asked_text(config: RunConfig, name: str) -> str:
    """An option as it was asked, and where, for the beginning of a message."""
    value = getattr(config, name)
    shown = list(value) if isinstance(value, tuple) else value
    place = config.sources.get(name)
    return f"{name}={shown!r}{f' (from {place})' if place else ''}"
