"""Accelerators counted from recorded trees and from an NVML of recorded answers; nothing is opened."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import nbaccel
from nbaccel.session.accelerators import Gpu, TorchBuild, read_accelerators, read_nvml, visible_gpus

GIB = 1 << 30


def gpus(count: int) -> tuple[Gpu, ...]:
    return tuple(Gpu(index=index, uuid=f"GPU-{index}a-{index}b", name="Tesla T4") for index in range(count))


def indices(visible: tuple[Gpu, ...]) -> list[int]:
    return [gpu.index for gpu in visible]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("-1", []),
        ("2", [2]),
        ("3,1", [3, 1]),
        (" 1 , 2 ", [1, 2]),
        ("0,-1,2", [0]),
        ("0,9,2", [0]),
        ("1,1", []),
        ("GPU-2a-2b,GPU-0a", [2, 0]),
        ("GPU-2a,GPU-unknown,GPU-1a", [2]),
        ("GPU-", []),
        ("GPU-1a,GPU-1a", []),
        ("NoDevFiles", []),
        ("MIG-GPU-2a-2b/1/0,MIG-GPU-2a-2b/2/0", [2]),
        ("MIG-5c", [0]),
    ],
)
def test_visible_gpus_when_cuda_variable_is(value: str | None, expected: list[int]) -> None:
    variables = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    assert indices(visible_gpus(gpus(4), variables, "cuda")) == expected


@settings(deadline=None)
@given(st.lists(st.sampled_from(["", "0", "1", "2", "3", "9", "-1", " 2", "1gpu", "p", "03"]), max_size=5))
def test_visible_gpus_agrees_with_torch(entries: list[str]) -> None:
    value = ",".join(entries)
    numbers = [int(entry.strip(" gpu")) for entry in entries if entry.strip()[:1].isdigit()]
    assume(len(set(numbers)) == len(numbers))  # what torch says of repeats behind an invalid entry is its own
    with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": value}):
        named: Any = torch.cuda._parse_visible_devices()
    out = [place for place, index in enumerate(named) if index >= 4]
    expected = named[: out[0]] if out else named
    assert indices(visible_gpus(gpus(4), {"CUDA_VISIBLE_DEVICES": value}, "cuda")) == expected


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"ROCR_VISIBLE_DEVICES": "2,3"}, [2, 3]),
        ({"ROCR_VISIBLE_DEVICES": "2,3", "HIP_VISIBLE_DEVICES": "1"}, [3]),
        ({"HIP_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": "0"}, [1]),
        ({"CUDA_VISIBLE_DEVICES": "0"}, [0]),
    ],
)
def test_visible_gpus_when_rocm(variables: dict[str, str], expected: list[int]) -> None:
    assert indices(visible_gpus(gpus(4), variables, "rocm")) == expected


def write(root: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


NVIDIA = """\
Model: \t\t Tesla T4
IRQ:   \t\t 45
GPU UUID: \t {uuid}
Video BIOS: \t 90.04.38.00.03
Bus Type: \t PCIe
Device Minor: \t {minor}
GPU Excluded:\t No
"""


def test_gpus_when_the_nvidia_driver_shows_them(tmp_path: Path) -> None:
    base = "proc/driver/nvidia/gpus"
    files = {
        f"{base}/0000:00:05.0/information": NVIDIA.format(uuid="GPU-????????-????", minor=1),
        f"{base}/0000:00:04.0/information": NVIDIA.format(uuid="GPU-8932f937-d72c", minor=0),
    }
    found = read_accelerators(write(tmp_path, files), system="linux", machine="x86_64")
    assert found.gpus == (
        Gpu(index=0, uuid="GPU-8932f937-d72c", name="Tesla T4"),
        Gpu(index=1, uuid="", name="Tesla T4"),
    )
    assert found.gpus_by == "proc"


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="becomes another user, so needs root"
)
def test_gpus_when_the_device_file_is_shut_are_left_out(tmp_path: Path) -> None:
    base = "proc/driver/nvidia/gpus"
    files = {
        f"{base}/0000:00:04.0/information": NVIDIA.format(uuid="GPU-a", minor=0),
        f"{base}/0000:00:05.0/information": NVIDIA.format(uuid="GPU-b", minor=1),
        "dev/nvidia0": "",
        "dev/nvidia1": "",
    }
    write(tmp_path, files)
    (tmp_path / "dev/nvidia0").chmod(0o600)
    for folder in [tmp_path, *tmp_path.parents[:3]]:
        folder.chmod(0o755)
    code = """
import os, sys
from pathlib import Path
from nbaccel.session.accelerators import read_accelerators
os.setuid(65534)
found = read_accelerators(Path(sys.argv[1]), system="linux", machine="x86_64")
print([gpu.uuid for gpu in found.gpus])
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(nbaccel.__file__).parents[1])}
    command = [sys.executable, "-c", code, str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.stdout == "['GPU-b']\n", ended.stderr


def test_gpus_when_the_amd_topology_shows_them(tmp_path: Path) -> None:
    nodes = "sys/class/kfd/kfd/topology/nodes"
    files = {
        f"{nodes}/0/properties": "cpu_cores_count 64\nsimd_count 0\nunique_id 0\n",
        f"{nodes}/0/name": "\n",
        f"{nodes}/2/properties": "cpu_cores_count 0\nsimd_count 416\nunique_id 18\n",
        f"{nodes}/2/name": "aldebaran\n",
        f"{nodes}/10/properties": "simd_count 416\nunique_id 0\n",
        f"{nodes}/10/name": "aldebaran\n",
    }
    found = read_accelerators(write(tmp_path, files), system="linux", machine="x86_64")
    assert found.gpus == (
        Gpu(index=0, uuid="GPU-0000000000000012", name="aldebaran"),
        Gpu(index=1, name="aldebaran"),
    )
    assert found.gpus_by == "kfd"


def test_tpus_when_google_also_sells_the_network_card(tmp_path: Path) -> None:
    devices = "sys/bus/pci/devices"
    files: dict[str, str] = {}
    for address, vendor, device in [
        ("0000:00:04.0", "0x1ae0", "0x0063"),
        ("0000:00:05.0", "0x1ae0", "0x0063"),
        ("0000:00:06.0", "0x1ae0", "0x0042"),  # gVNIC
        ("0000:00:07.0", "0x10de", "0x0063"),
    ]:
        files |= {f"{devices}/{address}/vendor": f"{vendor}\n", f"{devices}/{address}/device": f"{device}\n"}
    assert read_accelerators(write(tmp_path, files), system="linux", machine="x86_64").tpu_chips == 2


def test_xpus_when_render_nodes_are_intel(tmp_path: Path) -> None:
    files = {
        "sys/class/drm/renderD128/device/vendor": "0x8086\n",
        "sys/class/drm/renderD129/device/vendor": "0x1002\n",
        "sys/class/drm/card0/device/vendor": "0x8086\n",
    }
    assert read_accelerators(write(tmp_path, files), system="linux", machine="x86_64").xpus == 1


@pytest.mark.parametrize(
    ("system", "machine", "mps"),
    [("darwin", "arm64", True), ("darwin", "x86_64", False), ("linux", "arm64", False)],
)
def test_mps_when_on(tmp_path: Path, system: str, machine: str, mps: bool) -> None:
    assert read_accelerators(tmp_path, system=system, machine=machine).mps is mps


def test_torch_build_is_what_torch_says(tmp_path: Path) -> None:
    found = read_accelerators(tmp_path, system="linux", machine="x86_64")
    builds: dict[TorchBuild, str | None] = {"rocm": torch.version.hip, "cuda": torch.version.cuda}
    expected = next((build for build, version in builds.items() if version), "cpu")
    assert (found.torch_build, found.torch_version) == (expected, torch.__version__)


class RecordedNvml:
    """The answers of a host with one idle A100 and one sliced GPU that refuses some questions."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, driver: bool = True) -> None:
        self.driver = driver
        self.open = 0

    def nvmlInit(self) -> None:
        if not self.driver:
            raise self.NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str | bytes:
        return b"GPU-old" if handle else "GPU-new"

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:
        return b"NVIDIA A100"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(total=40 * GIB, used=(1 + handle) * GIB)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        if handle:
            raise self.NVMLError("Not Supported")
        return SimpleNamespace(gpu=7, memory=1)

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return (8, 0)


def test_nvml_when_a_gpu_does_not_answer_everything() -> None:
    nvml = RecordedNvml()
    found = read_nvml(nvml)
    common: Any = {"name": "NVIDIA A100", "memory_total": 40 * GIB, "capability": (8, 0)}
    assert found == (
        Gpu(index=0, uuid="GPU-new", memory_used=GIB, utilization=7, **common),
        Gpu(index=1, uuid="GPU-old", memory_used=2 * GIB, utilization=None, **common),
    )
    assert nvml.open == 0


def test_nvml_when_there_is_no_driver_is_unknown() -> None:
    assert read_nvml(RecordedNvml(driver=False)) is None


def test_the_real_nvml_package_has_what_is_asked() -> None:
    pynvml = pytest.importorskip("pynvml", reason="needs nvidia-ml-py (pip install 'nbaccel[gpu]')")
    asked = [name for name in vars(RecordedNvml) if name.lower().startswith("nvml")]
    assert [name for name in asked if not hasattr(pynvml, name)] == []
    assert len(asked) == 10


@pytest.mark.gpu
def test_gpus_of_this_machine_agree_with_torch_and_no_context_is_made() -> None:
    code = """
import platform, sys
from pathlib import Path
from nbaccel.session.accelerators import read_accelerators, visible_gpus
found = read_accelerators(system=sys.platform, machine=platform.machine())
assert "torch" not in sys.modules
import os, torch
visible = visible_gpus(found.gpus, os.environ, found.torch_build)
assert not torch.cuda.is_initialized()
print(len(visible) == torch.cuda.device_count(), [gpu.name for gpu in visible])
assert [gpu.name for gpu in visible] == [torch.cuda.get_device_name(i) for i in range(len(visible))]
"""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    environment = {**os.environ, "PYTHONPATH": str(Path(nbaccel.__file__).parents[1])}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.stdout.startswith("True"), ended.stderr
