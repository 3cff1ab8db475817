"""What a launch starts on recorded TPU machines; none of them is here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nbaccel.config import RunConfig
from nbaccel.errors import ConfigError
from nbaccel.session.accelerators import Accelerators, read_accelerators
from nbaccel.session.environment import Environment
from nbaccel.session.resolve import resolve
from nbaccel.session.resources import Resources

XLA, TORCH_TPU = "torch_xla", "torch_tpu"
KAGGLE = {"KAGGLE_KERNEL_RUN_TYPE": "Interactive", "TPU_PROCESS_ADDRESSES": "local", "CLOUD_TPU_TASK_ID": "0"}
# What a kernel has that has used one chip through torch_xla (configure_one_chip_topology).
USED = {
    "PJRT_DEVICE": "TPU",
    "PJRT_LOCAL_PROCESS_COUNT": "1",
    "TPU_VISIBLE_CHIPS": "0",
    "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
    "TPU_PROCESS_BOUNDS": "1,1,1",
}
STALE = frozenset(USED) - {"PJRT_DEVICE"}
# And one that has used all of them (use_spmd).
MODES = {"XLA_USE_SPMD": "1", "XLA_AUTO_SPMD": "1"}
BOTH = (TORCH_TPU, XLA)
SPMD = {"XLA_USE_SPMD": "1"}


def host(chips: int, kind: str, variables: dict[str, str] | None = None, **facts: Any) -> Environment:
    facts.setdefault("tpu_runtimes", (XLA,))
    accelerators = Accelerators(torch_build="cpu", tpu_chips=chips, tpu_kind=kind, **facts)
    resources = Resources(cores=96, memory=330_000_000_000)
    return Environment(variables=variables or {}, resources=resources, accelerators=accelerators)


@dataclass(frozen=True)
class Case:
    """A recorded machine and what is to be started on it."""

    environment: Environment
    ranks: int
    replicas: int = 1
    runtime: str = XLA
    unset: frozenset[str] = frozenset()
    variables: dict[str, str] = field(default_factory=dict)
    config: RunConfig = field(default_factory=RunConfig)


MACHINES = {
    "colab v5e-1": Case(host(1, "v5e", {"COLAB_RELEASE_TAG": "release"}), 1),
    "colab v2-8": Case(host(4, "v2/v3", {"COLAB_RELEASE_TAG": "release"}), 8, replicas=2),
    "kaggle v3-8": Case(host(4, "v2/v3", KAGGLE), 8, replicas=2, unset=frozenset(list(KAGGLE)[1:])),
    "kaggle v5e-8": Case(host(8, "v5e", KAGGLE), 8, unset=frozenset(list(KAGGLE)[1:])),
    "v4-8 vm": Case(host(4, "v4", {"TPU_SKIP_MDS_QUERY": "1"}), 4, variables={"TPU_WORKER_ID": "0"}),
    "v5p-8 vm": Case(host(4, "v5p"), 4),
    "v6e-4 vm": Case(host(4, "v6e"), 4),
    "v5e-4 vm with TorchTPU": Case(
        host(4, "v5e", USED, tpu_runtimes=(TORCH_TPU,)), 4, runtime=TORCH_TPU, unset=STALE
    ),
    "v6e-8 vm with both runtimes": Case(host(8, "v6e", tpu_runtimes=BOTH), 8, runtime=TORCH_TPU),
    "v6e-8 vm with both, torch_xla asked": Case(
        host(8, "v6e", tpu_runtimes=BOTH), 8, config=RunConfig(tpu_runtime=XLA)
    ),
    "v3-8 with both": Case(host(4, "v2/v3", tpu_runtimes=BOTH), 8, replicas=2),
    "v5e-8, one process for all": Case(
        host(8, "v5e", KAGGLE),
        1,
        unset=frozenset(list(KAGGLE)[1:]),
        variables=SPMD,
        config=RunConfig(xla_spmd=True),
    ),
    "v3-8, one process for all, with both": Case(
        host(4, "v2/v3", tpu_runtimes=BOTH), 1, variables=SPMD, config=RunConfig(xla_spmd=True)
    ),
    "kernel that used a chip before": Case(host(4, "v4", USED), 4, unset=STALE),
    "kernel in SPMD mode": Case(host(4, "v4", MODES), 4, unset=frozenset(MODES)),
    "kernel in SPMD mode with TorchTPU": Case(
        host(4, "v5e", MODES, tpu_runtimes=(TORCH_TPU,)), 4, runtime=TORCH_TPU, unset=frozenset(MODES)
    ),
    "kernel in SPMD mode, and so is the launch": Case(
        host(4, "v4", MODES),
        1,
        unset=frozenset({"XLA_AUTO_SPMD"}),
        variables=SPMD,
        config=RunConfig(xla_spmd=True),
    ),
    "the number that fits": Case(host(8, "v5e"), 8, config=RunConfig(num_processes=8)),
    "v3-8, the number that fits": Case(host(4, "v2/v3"), 8, replicas=2, config=RunConfig(num_processes=8)),
}


@pytest.mark.parametrize("name", MACHINES)
def test_plan_on_recorded_machine(name: str) -> None:
    case = MACHINES[name]
    plan = resolve(case.config, case.environment)
    assert (plan.num_processes, plan.replicas, plan.runtime) == (case.ranks, case.replicas, case.runtime)
    assert (plan.device, plan.backend) == ("tpu", "gloo" if case.runtime == XLA else "cpu:gloo,tpu:tpu_dist")
    assert set(plan.unset) == case.unset
    assert plan.variables.items() >= case.variables.items()
    assert plan.variables.get("PJRT_DEVICE") == ("TPU" if case.runtime == XLA else None)
    assert all("TPU" in one for one in plan.device_names)
    assert "GPU" not in " ".join((*plan.reasons, *plan.notes))


def test_one_chip_is_said() -> None:
    (note,) = resolve(RunConfig(), host(1, "v5e")).notes
    assert note == "This TPU has one chip, so one rank runs (TPU v5e)."


@pytest.mark.parametrize(
    ("config", "environment", "fits", "why"),
    [
        ({"num_processes": 8}, host(1, "v5e"), 1, "one TPU v5e chip"),
        ({"num_processes": 8}, host(1, "v6e", tpu_runtimes=BOTH), 1, "there is one TPU v6e chip"),
        ({"num_processes": 8}, host(4, "v4"), 4, "4 TPU v4 chips"),
        ({"num_processes": 4}, host(8, "v5e"), 8, "8 TPU v5e chips"),
        ({"num_processes": 4}, host(4, "v2/v3"), 8, "4 TPU v2/v3 chips with two cores each"),
        ({"num_processes": 2}, host(4, "v6e", tpu_runtimes=(TORCH_TPU,)), 4, "TorchTPU's ranks take one each"),
        ({"num_processes": 8, "xla_spmd": True}, host(8, "v5e"), 1, "one process computes on all devices"),
        ({"num_processes": 2, "device": "tpu"}, host(0, "", {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4"}), 4, "=4"),
    ],
)  # fmt: skip
def test_number_that_does_not_fit_names_the_one_that_does(
    config: dict[str, Any], environment: Environment, fits: int, why: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(RunConfig(**config, sources={"num_processes": "the launch"}), environment)
    message = str(caught.value)
    assert message.startswith(f"num_processes={config['num_processes']} (from the launch) does not fit")
    assert why in message
    assert f"Paste num_processes={fits}, or leave it out." in message


def test_kernel_that_holds_the_chips_is_named() -> None:
    held = host(8, "v5e", tpu_held=True)
    environment = Environment(
        accelerators=held.accelerators, resources=held.resources, opened_by="Cell In[3] line 2"
    )
    with pytest.raises(ConfigError, match=r"holds the TPU chips \(opened by Cell In\[3\] line 2\)") as caught:
        resolve(RunConfig(), environment)
    assert "when the kernel restarts" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "environment", "why"),
    [
        ({"device": "tpu"}, host(8, "v5e", tpu_runtimes=()), r"nbaccel\[xla\]"),
        ({"device": "tpu"}, host(0, ""), "no TPU chip was found"),
        ({"device": "tpu"}, host(0, "", tpu_runtimes=()), "no TPU chip was found"),
        ({"device": "tpu"}, host(0, "", {"PJRT_DEVICE": "CPU"}, tpu_runtimes=()), r"nbaccel\[xla\]"),
        ({}, host(8, "v5e", tpu_held=True), r"holds the TPU chips, and"),
        ({"device": "tpu", "tpu_runtime": XLA}, host(8, "v6e", tpu_runtimes=(TORCH_TPU,)), r"nbaccel\[xla\]"),
        ({"tpu_runtime": TORCH_TPU}, host(8, "v6e"), r"nbaccel\[tpu\]"),
        (
            {"tpu_runtime": TORCH_TPU, "xla_spmd": True},
            host(8, "v6e", tpu_runtimes=(TORCH_TPU,)),
            "a mode of torch_xla",
        ),
        ({}, host(4, "v2/v3", tpu_runtimes=(TORCH_TPU,)), "knows no chips before v4"),
        ({"xla_spmd": True}, host(0, ""), "xla_spmd.*the ranks would use the CPU"),
        ({"tpu_runtime": XLA, "device": "cpu"}, host(8, "v5e"), "tpu_runtime.*the ranks would use the CPU"),
        ({}, host(4, "v4", {"TPU_WORKER_HOSTNAMES": "a,b"}), "one host of a slice of 2"),
        ({"devices": (0,)}, host(4, "v4"), "Leave devices out"),
    ],
)
def test_what_cannot_be_done_is_refused(config: dict[str, Any], environment: Environment, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        resolve(RunConfig(**config), environment)


def test_replicas_on_the_cpu_have_a_thread_each() -> None:
    environment = host(0, "", {"PJRT_DEVICE": "CPU", "TPU_VISIBLE_CHIPS": "0"})
    plan = resolve(RunConfig(device="tpu", num_processes=200), environment)
    assert (plan.num_processes, plan.replicas) == (200, 200)
    assert plan.unset == ("TPU_VISIBLE_CHIPS",)
    assert plan.variables.items() >= {"CPU_NUM_DEVICES": "200", "XLA_THREAD_POOL_SIZE": "200"}.items()
    assert resolve(RunConfig(), environment).device == "cpu"


@pytest.mark.parametrize(
    ("config", "environment"),
    [
        ({"device": "cpu"}, host(8, "v5e", {"PJRT_DEVICE": "TPU"}, tpu_held=True)),
        ({}, host(0, "", {"PJRT_DEVICE": "TPU"})),
        ({}, host(8, "v5e", {"PJRT_DEVICE": "TPU"}, tpu_runtimes=())),
    ],
)
def test_ranks_on_the_cpu_leave_the_chips_alone(config: dict[str, Any], environment: Environment) -> None:
    plan = resolve(RunConfig(**config, num_processes=2), environment)
    assert (plan.device, plan.variables["PJRT_DEVICE"]) == ("cpu", "CPU")
    assert "PJRT_DEVICE" not in resolve(RunConfig(num_processes=2), host(0, "")).variables


def test_one_process_on_the_cpu_has_all_its_devices() -> None:
    environment = host(0, "", {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4"})
    plan = resolve(RunConfig(device="tpu", xla_spmd=True), environment)
    assert (plan.num_processes, plan.replicas) == (1, 1)
    assert plan.variables.items() >= {"CPU_NUM_DEVICES": "4", "XLA_USE_SPMD": "1"}.items()


def test_chips_are_told_by_their_pci_ids(tmp_path: Path) -> None:
    for index, device in enumerate(("0x0063", "0x0063", "0x0042")):  # the last is a network card
        folder = tmp_path / f"sys/bus/pci/devices/0000:00:0{index}.0"
        folder.mkdir(parents=True)
        (folder / "vendor").write_text("0x1ae0\n")
        (folder / "device").write_text(f"{device}\n")
    found = read_accelerators(tmp_path, system="linux", machine="x86_64")
    assert (found.tpu_chips, found.tpu_kind, found.tpu_held) == (2, "v5e", False)
