"""From what is asked and what is here to what will be started: one pure function, before any process.

The rules of `resolve`, in order:
1. A process that already is a rank of another launcher runs in place.
2. The device: the one asked, else CUDA (ROCm too), else XPU, else MPS, else the CPU.
3. The ranks: as many as asked; else one for each accelerator chosen; else, on the CPU, one for each
   core this process may use, as far as memory goes.
4. Never two ranks on one accelerator (NCCL refuses it, and elsewhere it would be silent); on the CPU
   any number that memory, processes and open files allow, more than there are cores included.
5. Threads: the cores divided by the ranks, at least 1, unless OMP_NUM_THREADS says how many.
6. Precision: torch computes fp16 and bf16 on every kind of device here, so none is refused. What it
   only emulates, or does slowly, is a note: bf16 before compute capability 8.0, fp16 on a CPU.
7. On a TPU the runtime says how many ranks there are (`session/tpus`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nbaccel.config import RunConfig, TpuRuntime
from nbaccel.errors import ConfigError
from nbaccel.session.devices import (
    LABELS,
    Choice,
    Devices,
    PlannedDevice,
    asked_text,
    assign,
    choose_device,
    device_name,
    free_gpus,
)
from nbaccel.session.environment import Environment
from nbaccel.session.room import default_ranks, require_room, room_notes
from nbaccel.session.tpus import away_from_tpu, plan_tpu

__all__ = ["Plan", "resolve"]

_BACKENDS: dict[PlannedDevice, str] = {
    "cpu": "gloo",
    "cuda": "nccl",
    "xpu": "xccl",
    "mps": "gloo",
    "tpu": "gloo",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a launch will start."""

    num_processes: int
    """Ranks on this host."""
    device: PlannedDevice
    replicas: int = 1
    """Ranks in each process: more than one where the runtime makes them threads."""
    runtime: TpuRuntime | None = None
    """What drives the TPU."""
    unset: tuple[str, ...] = ()
    """Variables of this process that the ranks must not have."""
    device_indices: tuple[int, ...] = ()
    """By local rank, the index that torch in the rank gives its device; empty on the CPU."""
    device_names: tuple[str, ...] = ()
    """By local rank, the device for people to read; empty on the CPU."""
    threads: int = 1
    """Compute threads of each rank."""
    backend: str = "gloo"
    """The torch.distributed backend of the device's tensors."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """What the ranks need in their environment beyond this process's, before they touch a device."""
    in_place: bool = False
    """This process is itself one of the ranks, started by another launcher: start nothing, just call."""
    reasons: tuple[str, ...] = ()
    """Why each figure is what it is, one sentence each, for the run folder and whoever asks."""
    notes: tuple[str, ...] = ()
    """What the user should be told at the launch, one sentence each."""


def resolve(config: RunConfig, environment: Environment) -> Plan:
    """The launch that `config` asks for on this host.

    Raises:
        ConfigError: it cannot be done here; the message says what is here and what to paste instead.
    """
    if environment.already_a_rank:
        return _plan_in_place(config, environment)
    chosen = choose_device(config, environment)
    if chosen.device == "tpu":
        return _plan_on_tpu(config, environment, chosen)
    _refuse_tpu_options(config, chosen)
    num_processes, why = _choose_number(config, environment, chosen)
    devices = assign(config, chosen, num_processes)
    threads, why_threads, thread_notes = _choose_threads(environment, num_processes)
    place = f" (from {config.sources['num_processes']})" if "num_processes" in config.sources else ""
    require_room(
        num_processes,
        threads,
        environment.resources,
        spawned=_is_spawned(config, environment),
        asked=f"num_processes={num_processes}{place}",
    )
    return Plan(
        num_processes=num_processes,
        device=chosen.device,
        device_indices=devices.indices,
        device_names=devices.names,
        threads=threads,
        backend=_backend(chosen.device, environment),
        variables={
            **devices.variables,
            **away_from_tpu(environment.variables),
            **_thread_variables(environment, threads),
        },
        reasons=(chosen.reason, why, why_threads),
        notes=(
            *chosen.notes,
            *thread_notes,
            *_precision_notes(config, chosen, devices),
            *room_notes(num_processes, environment.resources),
        ),
    )


def _refuse_tpu_options(config: RunConfig, chosen: Choice) -> None:
    for name in ("tpu_runtime", "xla_spmd"):
        if getattr(config, name):
            raise ConfigError(
                f"{asked_text(config, name)}, but the ranks would use the {LABELS[chosen.device]}: no TPU chip was "
                f"found on this host. Leave {name} out, or try it on a CPU: PJRT_DEVICE=CPU and device='tpu'."
            )


def _plan_on_tpu(config: RunConfig, environment: Environment, chosen: Choice) -> Plan:
    if config.devices is not None:
        said = asked_text(config, "devices")
        raise ConfigError(f"{said} picks CUDA devices; a TPU's runtime takes all chips. Leave devices out.")
    tpu = plan_tpu(config, environment)
    threads, why_threads, thread_notes = _choose_threads(environment, tpu.ranks)
    asked = f"{tpu.ranks} ranks on {tpu.name}"
    spawned = _is_spawned(config, environment)
    require_room(tpu.processes, threads, environment.resources, spawned=spawned, asked=asked)
    return Plan(
        num_processes=tpu.ranks,
        device="tpu",
        replicas=tpu.replicas,
        runtime=tpu.runtime,
        unset=tpu.unset,
        device_indices=tuple(range(tpu.ranks)),
        device_names=tuple(f"{tpu.name} {rank}" for rank in range(tpu.ranks)),
        threads=threads,
        backend="cpu:gloo,tpu:tpu_dist" if tpu.runtime == "torch_tpu" else _BACKENDS["tpu"],
        variables={**tpu.variables, **_thread_variables(environment, threads)},
        reasons=(chosen.reason, tpu.why, why_threads),
        notes=(*tpu.notes, *thread_notes, *room_notes(tpu.processes, environment.resources)),
    )


def _choose_number(config: RunConfig, environment: Environment, chosen: Choice) -> tuple[int, str]:
    asked, listed = config.num_processes, config.devices
    if listed is not None and chosen.device == "cpu":
        said = asked_text(config, "devices")
        raise ConfigError(
            f"{said} picks accelerators, but the ranks would run on the CPU. Leave devices out."
        )
    if listed is not None and listed != "free":
        return _listed_number(config), "ranks: one for each of devices"
    if asked is not None:
        if chosen.device != "cpu" and asked > chosen.count:
            raise ConfigError(_too_many(config, chosen))
        return asked, "ranks: as asked"
    if listed == "free":
        count, said = free_gpus(config, chosen)
        return count, f"ranks: one for each GPU that is free ({said})"
    if chosen.device != "cpu":
        return chosen.count, f"ranks: one for each {LABELS[chosen.device]} device"
    return default_ranks(
        environment.resources,
        threads=lambda number: _choose_threads(environment, number)[0],
        spawned=_is_spawned(config, environment),
    )


def _is_spawned(config: RunConfig, environment: Environment) -> bool:
    return config.start_method == "spawn" or environment.system != "linux"


def _listed_number(config: RunConfig) -> int:
    listed, said = config.devices, asked_text(config, "devices")
    if not isinstance(listed, (tuple, list)) or not listed:
        raise ConfigError(
            f"{said}: list the indices of the accelerators, as in devices=[0, 1], or 'free'. "
            "Left out, all are used."
        )
    if config.num_processes not in (None, len(listed)):
        raise ConfigError(
            f"{asked_text(config, 'num_processes')}, but {said} names {len(listed)} and one rank runs on "
            f"each. Leave num_processes out, or list {config.num_processes} devices."
        )
    return len(listed)


def _too_many(config: RunConfig, chosen: Choice) -> str:
    label = LABELS[chosen.device]
    asked = asked_text(config, "num_processes")
    on_cpu = f'num_processes={config.num_processes}, device="cpu"'
    if chosen.device == "mps":
        return (
            f"{asked}, but a Mac has one MPS device, and torch has no backend through which processes "
            f"exchange its tensors. Paste num_processes=1, or {on_cpu}."
        )
    are = "is 1" if chosen.count == 1 else f"are {chosen.count}"
    return (
        f"{asked}, but there {are} {label} device{'s' * (chosen.count != 1)} for them, and each rank needs "
        f"its own. Paste num_processes={chosen.count}, or {on_cpu}."
    )


def _choose_threads(environment: Environment, num_processes: int) -> tuple[int, str, tuple[str, ...]]:
    cores, wanted = environment.resources.cores, environment.variables.get("OMP_NUM_THREADS", "")
    first = wanted.split(",")[0].strip()  # a list gives nested levels, the outermost first
    if first.isdigit() and int(first) > 0:
        threads = int(first)
        if num_processes > 1 and threads > 1 and num_processes * threads > cores:
            crowd = f"{num_processes} ranks with {threads} threads each share {cores} cores"
            return threads, "threads: OMP_NUM_THREADS", (f"OMP_NUM_THREADS={wanted} is kept: {crowd}.",)
        return threads, "threads: OMP_NUM_THREADS", ()
    threads = max(1, cores // num_processes)
    why = f"threads: {threads} per rank, {cores} cores for {num_processes} ranks"
    ignored = f"OMP_NUM_THREADS={wanted!r} is not a number of threads and is ignored."
    return threads, why, (ignored,) if wanted else ()


def _thread_variables(environment: Environment, threads: int) -> dict[str, str]:
    wanted = environment.variables.get("OMP_NUM_THREADS", "")
    return {} if wanted.split(",")[0].strip() == str(threads) else {"OMP_NUM_THREADS": str(threads)}


def _backend(device: PlannedDevice, environment: Environment) -> str:
    # There is no NCCL for Windows.
    return "gloo" if environment.system == "win32" else _BACKENDS[device]


def _precision_notes(config: RunConfig, chosen: Choice, devices: Devices) -> tuple[str, ...]:
    if config.mixed_precision == "fp16" and chosen.device == "cpu":
        return ("fp16 on a CPU is far slower than float32; mixed_precision='bf16' is the one made for it.",)
    if config.mixed_precision == "bf16":
        old = sorted(
            {gpu.name for gpu in devices.gpus if gpu.capability is not None and gpu.capability < (8, 0)}
        )
        if old:
            return (f"{', '.join(old)} only emulates bf16, slowly; use mixed_precision='fp16' there.",)
    return ()


def _plan_in_place(config: RunConfig, environment: Environment) -> Plan:
    rank, world, local, here = _place_of(environment.variables)
    already = f"this process already is rank {rank} of {world} (RANK and WORLD_SIZE, as torchrun sets them)"
    if config.num_processes not in (None, here, world) or config.devices is not None:
        name = "devices" if config.devices is not None else "num_processes"
        raise ConfigError(
            f"{asked_text(config, name)}, but {already}. Leave {name} out, or unset RANK to launch from here."
        )
    chosen = choose_device(config, environment)
    # Some launchers show each rank its own device and nothing else.
    index = local if local < chosen.count else 0
    on_device = chosen.device != "cpu"
    threads, why_threads, _ = _choose_threads(environment, here)
    return Plan(
        num_processes=here,
        device=chosen.device,
        device_indices=(index,) if on_device else (),
        device_names=(device_name(chosen, index),) if on_device else (),
        threads=threads,
        backend=_backend(chosen.device, environment),
        in_place=True,
        reasons=(chosen.reason, f"ranks: {already}", why_threads),
        notes=(f"The function runs here and nothing is started: {already}.", *chosen.notes),
    )


def _place_of(variables: Mapping[str, str]) -> tuple[int, int, int, int]:
    """Rank, world size, local rank and local world size, as another launcher set them."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, world = variables["RANK"], variables["WORLD_SIZE"]
    said = (rank, world, variables.get("LOCAL_RANK", rank), variables.get("LOCAL_WORLD_SIZE", world))
    if not all(text.isdigit() for text in said):
        shown = ", ".join(f"{name}={text!r}" for name, text in zip(names, said, strict=True))
        raise ConfigError(
            f"{shown}: these variables make this process a rank of another launch, but are not all numbers. "
            "Unset them to launch from here."
        )
    return int(said[0]), int(said[1]), int(said[2]), int(said[3])
