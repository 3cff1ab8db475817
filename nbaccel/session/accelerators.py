"""Which accelerators are here, counted without opening one.

The process that asks is the user's kernel: a CUDA or XLA context made there would stay, and would
hold memory and forbid forking. So NVIDIA GPUs are counted by NVML (the `nbaccel[gpu]` extra), else by
what the driver shows in /proc, and only as a last resort by torch, in a process of its own; AMD, Intel
and TPU devices by /sys. Whether the torch that is installed can use them is read from its version
file, not by importing it. Sources: the CUDA C Programming Guide on CUDA_VISIBLE_DEVICES, ROCm's "GPU
isolation techniques", Linux Documentation/gpu/amdgpu (kfd topology).
"""

from __future__ import annotations

import ctypes.util
import functools
import importlib.util
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from nbaccel.config import TpuRuntime
from nbaccel.rank.process import device_files
from nbaccel.session.resources import text_of

__all__ = ["Accelerators", "Gpu", "TorchBuild", "read_accelerators", "read_nvml", "visible_gpus"]

TorchBuild = Literal["cpu", "cuda", "rocm", "xpu", "unknown"]
Source = Literal["nvml", "proc", "kfd", "torch", ""]

# Google's PCI vendor id is also on its network cards and disks: the device ids of TPUs, by generation.
_GOOGLE = "0x1ae0"
_TPUS = {
    "0x0027": "v2/v3",
    "0x0056": "",
    "0x005e": "v4",
    "0x0062": "v5p",
    "0x0063": "v5e",
    "0x006f": "v6e",
    "0x0076": "v7x",
}
# By the package that is imported, the preferred one first.
_TPU_RUNTIMES: tuple[TpuRuntime, ...] = ("torch_tpu", "torch_xla")
_INTEL = "0x8086"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One NVIDIA or AMD GPU of this host. What is not known is None or empty."""

    index: int
    """Its place in the order of PCI addresses."""
    uuid: str = ""
    name: str = ""
    memory_total: int | None = None
    """Bytes."""
    memory_used: int | None = None
    """Bytes, by every process on the host."""
    utilization: int | None = None
    """Percent of the last sample period in which a kernel ran."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerators:
    """The accelerators of this host and what the installed torch was built for."""

    torch_build: TorchBuild = "unknown"
    torch_version: str = ""
    gpus: tuple[Gpu, ...] = ()
    """All of them: what CUDA_VISIBLE_DEVICES leaves is `visible_gpus`."""
    gpus_by: Source = ""
    """How they were counted."""
    xpus: int = 0
    mps: bool = False
    tpu_chips: int = 0
    tpu_kind: str = ""
    """Their generation; "v2/v3" cannot be told apart from outside."""
    tpu_runtimes: tuple[TpuRuntime, ...] = ()
    """Those installed, the preferred one first."""
    tpu_held: bool = False
    """Whether this very process has opened a chip."""


def read_accelerators(root: Path = Path("/"), *, system: str, machine: str) -> Accelerators:
    """What is here. Opens no device in this process.

    Args:
        root: the folder that holds proc, sys and dev.
        system: as `sys.platform` says it.
        machine: as `platform.machine()` says it.
    """
    build, version = _torch_build()
    gpus, source = _read_gpus(root, build)
    tpus = _read_tpus(root)
    return Accelerators(
        torch_build=build,
        torch_version=version,
        gpus=gpus,
        gpus_by=source,
        xpus=_count_xpus(root),
        mps=system == "darwin" and machine == "arm64",
        tpu_chips=len(tpus),
        tpu_kind=tpus[0] if tpus else "",
        tpu_runtimes=tuple(name for name in _TPU_RUNTIMES if importlib.util.find_spec(name)),
        tpu_held=bool(tpus) and any(file.startswith(("/dev/accel", "/dev/vfio")) for file in device_files()),
    )


def gpu_memory_by_process() -> dict[int, int]:
    """Bytes that each process holds on NVIDIA GPUs, by process id; empty where nobody tells (no nvidia-ml-py,
    or a container whose process ids the driver does not know)."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # noqa: BLE001  # ImportError, or NVML's own errors, which have a base of their own
        return {}
    held: dict[int, int] = {}
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            device = pynvml.nvmlDeviceGetHandleByIndex(index)
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(device):
                held[process.pid] = held.get(process.pid, 0) + (process.usedGpuMemory or 0)
    except pynvml.NVMLError:
        pass  # a device that does not say, as a MIG slice: what is known is told
    finally:
        pynvml.nvmlShutdown()
    return held


def visible_gpus(gpus: tuple[Gpu, ...], variables: Mapping[str, str], build: TorchBuild) -> tuple[Gpu, ...]:
    """The GPUs a rank will see, in the order in which torch numbers them.

    The list ends at the first entry that names no GPU and a repeated entry hides all, as the runtimes
    do it; an empty list or "-1" hides all. MIG slices: CUDA shows a process only the first, so they
    count as one device.
    """
    if build != "rocm":
        return _select(gpus, variables.get("CUDA_VISIBLE_DEVICES"))
    # ROCR's list is applied first, and HIP's counts within what it left.
    left = _select(gpus, variables.get("ROCR_VISIBLE_DEVICES"))
    return _select(left, variables.get("HIP_VISIBLE_DEVICES", variables.get("CUDA_VISIBLE_DEVICES")))


def _select(gpus: tuple[Gpu, ...], wanted: str | None) -> tuple[Gpu, ...]:
    if wanted is None:
        return gpus
    if wanted.startswith("MIG-"):
        owner = next((gpu for gpu in gpus if gpu.uuid and gpu.uuid[4:] in wanted), None)
        return (owner,) if owner else gpus[:1]
    chosen: list[Gpu] = []
    for entry in wanted.split(","):
        text = entry.strip()
        if text.startswith("GPU-"):  # an unambiguous beginning of the UUID is enough
            named = [gpu for gpu in gpus if gpu.uuid.startswith(text)]
        else:
            number = re.match(r"\+?(\d+)", text)
            named = [gpus[int(number[1])]] if number and int(number[1]) < len(gpus) else []
        if len(named) != 1:
            break
        if named[0] in chosen:
            return ()
        chosen += named
    return tuple(chosen)


def _torch_build() -> tuple[TorchBuild, str]:
    """What the installed torch was built for, from its version file: importing it takes a second."""
    spec = importlib.util.find_spec("torch")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        text = text_of(Path(folder) / "version.py")
        said = dict(re.findall(r"^(\w+)\s*(?::[^=]*)?=\s*['\"]([^'\"]*)['\"]", text, re.MULTILINE))
        if "__version__" in said:
            named: dict[str, TorchBuild] = {"hip": "rocm", "cuda": "cuda", "xpu": "xpu"}
            found = [named[key] for key in named if said.get(key)]
            return found[0] if found else "cpu", said["__version__"]
    return "unknown", ""


def _read_gpus(root: Path, build: TorchBuild) -> tuple[tuple[Gpu, ...], Source]:
    nvml = _import_nvml() if root == Path("/") else None
    found = read_nvml(nvml) if nvml is not None else None
    if found is not None:
        return found, "nvml"
    if gpus := _read_proc(root):
        return gpus, "proc"
    if gpus := _read_kfd(root):
        return gpus, "kfd"
    if build in ("cuda", "rocm", "unknown") and _hints_at_gpu(root) and (gpus := _ask_torch()):
        return gpus, "torch"
    return (), ""


def _import_nvml() -> ModuleType | None:
    with warnings.catch_warnings():
        # An old package of the same name warns that it is the wrong one; it answers all the same.
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module("pynvml")
        except ImportError:
            return None


def read_nvml(nvml: Any) -> tuple[Gpu, ...] | None:
    """The GPUs as NVML knows them; None where there is no driver to ask.

    Args:
        nvml: the module `pynvml`.
    """
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        return tuple(_nvml_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount()))
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()


def _nvml_gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def ask(name: str) -> Any:
        try:
            return getattr(nvml, name)(handle)
        except nvml.NVMLError:  # virtual and sliced GPUs do not answer everything
            return None

    memory, busy = ask("nvmlDeviceGetMemoryInfo"), ask("nvmlDeviceGetUtilizationRates")
    return Gpu(
        index=index,
        uuid=_plain(ask("nvmlDeviceGetUUID")),
        name=_plain(ask("nvmlDeviceGetName")),
        memory_total=memory.total if memory else None,
        memory_used=memory.used if memory else None,
        utilization=busy.gpu if busy else None,
        capability=ask("nvmlDeviceGetCudaComputeCapability"),
    )


def _read_proc(root: Path) -> tuple[Gpu, ...]:
    """What the NVIDIA driver shows of itself; one folder per GPU, named by its PCI address."""
    gpus: list[Gpu] = []
    for folder in sorted((root / "proc/driver/nvidia/gpus").glob("*")):
        said = dict(re.findall(r"^([\w ]+?):\s*(.*?)\s*$", text_of(folder / "information"), re.MULTILINE))
        if _is_closed(root / f"dev/nvidia{said.get('Device Minor', '')}"):
            continue
        uuid = said.get("GPU UUID", "")
        known = uuid if "?" not in uuid else ""  # "GPU-????…" until somebody has opened it
        gpus.append(Gpu(index=len(gpus), uuid=known, name=said.get("Model", "")))
    return tuple(gpus)


def _is_closed(node: Path) -> bool:
    """A batch system lists every GPU of the host and keeps the device files of the others' jobs shut."""
    try:
        node.open("rb", buffering=0).close()
    except PermissionError:
        return True
    except OSError:  # absent until the first use: the driver makes it
        return False
    return False


def _read_kfd(root: Path) -> tuple[Gpu, ...]:
    """AMD compute nodes that have SIMD units (the CPUs of the topology have none)."""
    gpus: list[Gpu] = []
    nodes = (root / "sys/class/kfd/kfd/topology/nodes").glob("[0-9]*")
    for node in sorted(nodes, key=lambda path: int(path.name)):
        said = dict(re.findall(r"^(\w+) (\d+)$", text_of(node / "properties"), re.MULTILINE))
        if int(said.get("simd_count", 0)) > 0:
            unique = int(said.get("unique_id", 0))
            uuid = f"GPU-{unique:016x}" if unique else ""
            gpus.append(Gpu(index=len(gpus), uuid=uuid, name=text_of(node / "name").strip()))
    return tuple(gpus)


def _count_xpus(root: Path) -> int:
    """Intel GPUs with a render node. A GPU of several tiles counts once here."""
    vendors = (root / "sys/class/drm").glob("renderD*/device/vendor")
    return sum(text_of(vendor).strip() == _INTEL for vendor in vendors)


def _read_tpus(root: Path) -> list[str]:
    """The generation of each chip."""
    devices = (root / "sys/bus/pci/devices").glob("*")
    ids = [text_of(one / "device").strip() for one in devices if text_of(one / "vendor").strip() == _GOOGLE]
    return [_TPUS[one] for one in ids if one in _TPUS]


def _hints_at_gpu(root: Path) -> bool:
    """Is a driver here that neither NVML nor /proc spoke for (WSL, Windows)? Asking torch takes seconds."""
    if any((root / "dev" / name).exists() for name in ("nvidiactl", "dxg")):
        return True
    return sys.platform == "win32" and ctypes.util.find_library("nvcuda") is not None


_ASK_TORCH = """
import os
for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
    os.environ.pop(name, None)
import json, torch
found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps([[p.name, str(getattr(p, "uuid", "")), p.total_memory, p.major, p.minor] for p in found]))
"""


@functools.lru_cache(maxsize=1)  # the devices of a host do not change while a kernel lives
def _ask_torch() -> tuple[Gpu, ...]:
    try:
        ended = subprocess.run([sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    if ended.returncode != 0 or not ended.stdout.strip():
        return ()
    rows = json.loads(ended.stdout.splitlines()[-1])
    return tuple(
        Gpu(
            index=index,
            uuid=f"GPU-{uuid}" if uuid else "",
            name=name,
            memory_total=total,
            capability=(major, minor),
        )
        for index, (name, uuid, total, major, minor) in enumerate(rows)
    )


def _plain(text: str | bytes | None) -> str:
    return text.decode(errors="replace") if isinstance(text, bytes) else text or ""
