"""What a launch on TPU chips starts: how many processes, how many replicas in each, with which variables.

Pure functions of what is asked and what is here; no runtime is asked, because asking one takes the chips. On
v2 and v3 a chip has two cores, which are two threads of one process; from v4 on a chip is one device and gets a
process of its own. In SPMD mode one process has them all. Sources: torch_xla 2.9 `_internal/tpu.py` and
`_internal/pjrt.py` (topology, variables), `runtime.py` (`use_spmd`). Recorded machines are in the tests; none of it
was run on chips.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nbaccel.config import RunConfig, TpuRuntime
from nbaccel.errors import ConfigError
from nbaccel.session.accelerators import Accelerators
from nbaccel.session.environment import Environment

__all__ = ["TpuPlan", "away_from_tpu", "plan_tpu"]

# Each makes a process believe it is a certain one of others, or alone: right in the kernel, wrong in ranks.
_OF_ONE_PROCESS = (
    "CLOUD_TPU_TASK_ID",
    "PJRT_LOCAL_PROCESS_COUNT",
    "PJRT_LOCAL_PROCESS_RANK",
    "TPU_PROCESS_ADDRESSES",
    "TPU_PROCESS_PORT",
    "TPU_VISIBLE_CHIPS",
    "TPU_VISIBLE_DEVICES",
)
# What `torch_xla.runtime.use_spmd` leaves in a kernel; ranks are in that mode where the launch asks for it.
_SPMD = "XLA_USE_SPMD"
_AUTO_SPMD = "XLA_AUTO_SPMD"
# What torch_xla sets beside TPU_VISIBLE_CHIPS for a process that has one chip to itself.
_BOUNDS = ("TPU_CHIPS_PER_PROCESS_BOUNDS", "TPU_PROCESS_BOUNDS")


@dataclass(frozen=True, slots=True, kw_only=True)
class TpuPlan:
    """The processes of a launch on this host's chips, or on torch_xla's CPU device."""

    runtime: TpuRuntime
    name: str
    """The device for people to read."""
    processes: int
    replicas: int = 1
    """Ranks in each process; more than one are threads of it."""
    variables: Mapping[str, str] = field(default_factory=dict)
    unset: tuple[str, ...] = ()
    """Variables of the kernel that the ranks must not have."""
    why: str = ""
    """Why so many ranks."""
    notes: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        """Ranks on this host."""
        return self.processes * self.replicas


def plan_tpu(config: RunConfig, environment: Environment) -> TpuPlan:
    """The launch on TPU that `config` asks for.

    Raises:
        ConfigError: it cannot be done here; the message names the number that fits.
    """
    there, variables = environment.accelerators, environment.variables
    on_cpu = _is_for(variables, "CPU")
    if not there.tpu_chips and not on_cpu:
        raise ConfigError(
            'device="tpu" cannot be honoured: no TPU chip was found on this host. To run on the CPU, paste '
            'device="cpu" (in a command: --device cpu); to try the code of a TPU there, set PJRT_DEVICE=CPU '
            "(torch_xla)."
        )
    runtime = _choose_runtime(config, environment)
    if runtime == "torch_xla" and on_cpu:
        return _on_cpu(config, environment)
    _require_one_host(variables)
    if there.tpu_held:
        by = f" (opened by {environment.opened_by})" if environment.opened_by else ""
        raise ConfigError(
            f"this kernel itself holds the TPU chips{by}, and a chip serves one process. They come "
            "back when the kernel restarts: use the device only inside the function that is launched."
        )
    if runtime == "torch_tpu":
        return _on_torch_tpu(config, environment)
    return _on_all_chips(config, environment) if config.xla_spmd else _on_chips(config, environment)


def away_from_tpu(variables: Mapping[str, str]) -> dict[str, str]:
    """What ranks on another device need, so that torch_xla, where something of theirs imports it, opens no chip and
    looks for none: a kernel that has only asked it for its device has PJRT_DEVICE=TPU."""
    return {"PJRT_DEVICE": "CPU"} if _is_for(variables, "TPU") else {}


def _is_for(variables: Mapping[str, str], device: str) -> bool:
    """Whether torch_xla has been told this device."""
    return variables.get("PJRT_DEVICE", "").upper() == device


def _choose_runtime(config: RunConfig, environment: Environment) -> TpuRuntime:
    """The one asked for, else TorchTPU, else torch_xla. On a CPU, on v2 and v3 and in SPMD mode only torch_xla
    will do."""
    installed, asked = environment.accelerators.tpu_runtimes, config.tpu_runtime
    on_cpu = _is_for(environment.variables, "CPU")
    if asked == "torch_tpu" and config.xla_spmd:
        raise ConfigError("xla_spmd is a mode of torch_xla: ask for tpu_runtime='torch_xla', or leave it out")
    if asked is None:
        old = environment.accelerators.tpu_kind == "v2/v3" and "torch_xla" in installed
        only_xla = on_cpu or old or config.xla_spmd or "torch_tpu" not in installed
        asked = "torch_xla" if only_xla else "torch_tpu"
    if asked not in installed:
        other = "nbaccel[xla]" if asked == "torch_xla" else "nbaccel[tpu]"
        either = " or 'nbaccel[tpu]' (TorchTPU)" if config.tpu_runtime is None and not config.xla_spmd else ""
        needs = f"tpu_runtime={asked!r}" if config.tpu_runtime else "device='tpu'"
        raise ConfigError(f"{needs} needs a runtime that is not installed: pip install '{other}'{either}")
    return asked


def _on_torch_tpu(config: RunConfig, environment: Environment) -> TpuPlan:
    """One process for each chip; what tells them apart is asked of the package when they are made
    (`engines.tpu`)."""
    there = environment.accelerators
    name, said = _name(there), _count(there)
    if there.tpu_kind == "v2/v3":
        raise ConfigError(
            "TorchTPU knows no chips before v4, and these are v2 or v3: pip install 'nbaccel[xla]' and ask for "
            "tpu_runtime='torch_xla'"
        )
    _require_number(
        config, there.tpu_chips, f"there {_are(there)} {said}, and TorchTPU's ranks take one each"
    )
    unset = (*_stale(environment.variables), *(name for name in _BOUNDS if name in environment.variables))
    return TpuPlan(
        runtime="torch_tpu",
        name=name,
        processes=there.tpu_chips,
        unset=unset,
        why=f"ranks: one for each chip of {said}",
        notes=_one_chip(name) if there.tpu_chips == 1 else (),
    )


def _on_chips(config: RunConfig, environment: Environment) -> TpuPlan:
    there = environment.accelerators
    chips, two_cores = there.tpu_chips, there.tpu_kind == "v2/v3"
    name, said = _name(there), _count(there)
    replicas = 2 if two_cores else 1
    ranks = chips * replicas
    fits = f"there {_are(there)} {said}" + (" with two cores each" if replicas > 1 else "")
    _require_number(config, ranks, f"{fits}, and the runtime takes all of them")
    kept, unset = _for_ranks(environment.variables)
    return TpuPlan(
        runtime="torch_xla",
        name=name,
        processes=chips,
        replicas=replicas,
        variables=kept,
        unset=unset,
        why=f"ranks: one for each {'core' if replicas > 1 else 'chip'} of {said}",
        notes=_one_chip(name) if ranks == 1 else (),
    )


def _one_chip(name: str) -> tuple[str, ...]:
    return (f"This TPU has one chip, so one rank runs ({name}).",)


def _on_all_chips(config: RunConfig, environment: Environment) -> TpuPlan:
    """SPMD: one process computes on every chip."""
    there = environment.accelerators
    _require_number(config, 1, "with xla_spmd one process computes on all devices")
    kept, unset = _for_ranks(environment.variables, spmd=True)
    return TpuPlan(
        runtime="torch_xla",
        name=_name(there),
        processes=1,
        # not left to `use_spmd`, which would come too late for a process that was told of one chip
        variables={**kept, _SPMD: "1"},
        unset=unset,
        why=f"ranks: one, whose arrays are sharded over all {there.tpu_chips} chips (xla_spmd)",
    )


def _name(there: Accelerators) -> str:
    """Of a chip, for people to read."""
    return f"TPU {there.tpu_kind}".strip()


def _count(there: Accelerators) -> str:
    """How many there are, in words."""
    return f"{there.tpu_chips} {_name(there)} chips" if there.tpu_chips > 1 else f"one {_name(there)} chip"


def _are(there: Accelerators) -> str:
    return "are" if there.tpu_chips > 1 else "is"


def _on_cpu(config: RunConfig, environment: Environment) -> TpuPlan:
    """torch_xla's own CPU device: replicas are threads of one process, as many as it is told."""
    variables, cores = environment.variables, environment.resources.cores
    told = variables.get("CPU_NUM_DEVICES", "")
    number = int(told) if told.isdigit() and int(told) > 0 else None
    if config.xla_spmd:
        _require_number(config, 1, "with xla_spmd one process computes on all devices")
        devices, replicas = number or cores, 1
        why = f"ranks: one, whose arrays are sharded over {devices} of torch_xla's CPU devices (xla_spmd)"
    else:
        if number is not None:
            _require_number(config, number, f"CPU_NUM_DEVICES={number}")
        devices = replicas = number or config.num_processes or 1
        why = f"ranks: {replicas} on torch_xla's CPU device (PJRT_DEVICE=CPU), threads of one process"
    # A computation that waits for other replicas holds a thread of the pool.
    pool = max(devices, cores)
    kept = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(devices), "XLA_THREAD_POOL_SIZE": str(pool)}
    if config.xla_spmd:
        kept[_SPMD] = "1"
    return TpuPlan(
        runtime="torch_xla",
        name="XLA CPU",
        processes=1,
        replicas=replicas,
        variables=kept,
        unset=_stale(variables, spmd=bool(config.xla_spmd)),
        why=why,
    )


def _stale(variables: Mapping[str, str], *, spmd: bool = False) -> tuple[str, ...]:
    """The kernel's own, which its ranks must not have."""
    modes = (_AUTO_SPMD,) if spmd else (_SPMD, _AUTO_SPMD)
    return tuple(name for name in (*_OF_ONE_PROCESS, *modes) if name in variables)


def _for_ranks(variables: Mapping[str, str], *, spmd: bool = False) -> tuple[dict[str, str], tuple[str, ...]]:
    """What the ranks need beyond the kernel's variables, and which of those they must not have."""
    unset = _stale(variables, spmd=spmd)
    if "TPU_VISIBLE_CHIPS" in variables:
        unset += tuple(name for name in _BOUNDS if name in variables)
    kept = {"PJRT_DEVICE": "TPU"}
    if "TPU_WORKER_ID" not in variables and variables.get("TPU_SKIP_MDS_QUERY"):
        # where the metadata server is not asked, torch_xla reads the host's number from the task's
        kept["TPU_WORKER_ID"] = "0"
    return kept, unset


def _require_number(config: RunConfig, fits: int, why: str) -> None:
    if config.num_processes in (None, fits):
        return
    place = f" (from {config.sources['num_processes']})" if "num_processes" in config.sources else ""
    raise ConfigError(
        f"num_processes={config.num_processes}{place} does not fit: {why}. "
        f"Paste num_processes={fits}, or leave it out."
    )


def _require_one_host(variables: Mapping[str, str]) -> None:
    hosts = [name for name in variables.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    if len(hosts) > 1:
        raise ConfigError(
            f"this is one host of a slice of {len(hosts)} (TPU_WORKER_HOSTNAMES), and a launch from here would "
            "wait for the others. Use a slice of one host (v5litepod-8, v4-8, v3-8 …)."
        )
