"""Plans for machines of all kinds, each a recorded value; nothing is started here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbaccel.config import RunConfig
from nbaccel.errors import ConfigError
from nbaccel.session.accelerators import Accelerators, Gpu
from nbaccel.session.environment import Environment
from nbaccel.session.resolve import Plan, resolve
from nbaccel.session.resources import Resources
from nbaccel.session.room import MAX_RANKS, RANK_MEMORY

GB = 10**9
GIB = 1 << 30


def host(
    *,
    cores: int = 4,
    memory: int | None = 32 * GB,
    variables: dict[str, str] | None = None,
    system: str = "linux",
    resources: dict[str, Any] | None = None,
    **accelerators: Any,
) -> Environment:
    build = {"torch_build": "cuda", "torch_version": "2.13.0+cu126"}
    return Environment(
        variables=variables or {},
        system=system,
        resources=Resources(
            cores=cores,
            cores_by="the CPU affinity of this process",
            memory=memory,
            memory_by="the memory available on this machine",
            **(resources or {}),
        ),
        accelerators=Accelerators(**{**build, **accelerators}),
    )


def gpu(index: int, *, used: int | None = None, busy: int = 0, name: str = "Tesla T4", cc: int = 7) -> Gpu:
    return Gpu(
        index=index,
        uuid=f"GPU-{index}{index}",
        name=name,
        memory_total=None if used is None else 16 * GIB,
        memory_used=used,
        utilization=None if used is None else busy,
        capability=(cc, 5),
    )


def gpus(count: int, **facts: Any) -> tuple[Gpu, ...]:
    return tuple(gpu(index, **facts) for index in range(count))


CPU_TORCH: dict[str, Any] = {"torch_build": "cpu", "torch_version": "2.13.0+cpu"}


@dataclass(frozen=True)
class Case:
    environment: Environment
    num_processes: int
    device: str
    threads: int
    backend: str
    indices: tuple[int, ...] = ()


MACHINES = {
    "colab gpu": Case(host(cores=2, memory=11 * GB, gpus=gpus(1)), 1, "cuda", 2, "nccl", (0,)),
    "colab tpu": Case(host(cores=24, memory=45 * GB, tpu_chips=1, **CPU_TORCH), 24, "cpu", 1, "gloo"),
    "kaggle 2xT4": Case(host(memory=30 * GB, gpus=gpus(2)), 2, "cuda", 2, "nccl", (0, 1)),
    "kaggle tpu": Case(host(cores=96, memory=330 * GB, tpu_chips=8, **CPU_TORCH), 96, "cpu", 1, "gloo"),
    "plain laptop": Case(host(cores=8, memory=12 * GB), 8, "cpu", 1, "gloo"),
    "mac": Case(host(cores=10, system="darwin", mps=True, **CPU_TORCH), 1, "mps", 10, "gloo", (0,)),
    "windows with a GPU": Case(host(system="win32", gpus=gpus(1)), 1, "cuda", 4, "gloo", (0,)),
    "amd": Case(host(cores=16, torch_build="rocm", gpus=gpus(4)), 4, "cuda", 4, "nccl", (0, 1, 2, 3)),
    "intel": Case(host(torch_build="xpu", xpus=2), 2, "xpu", 2, "xccl", (0, 1)),
    "small container": Case(host(cores=16, memory=GB), 3, "cpu", 5, "gloo"),
    "tiny container": Case(host(cores=16, memory=100_000_000), 1, "cpu", 16, "gloo"),
    "no figure for memory": Case(host(cores=3, memory=None), 3, "cpu", 1, "gloo"),
    "gpus and a cpu torch": Case(host(gpus=gpus(2), **CPU_TORCH), 4, "cpu", 1, "gloo"),
    "gpus hidden": Case(host(gpus=gpus(2), variables={"CUDA_VISIBLE_DEVICES": ""}), 4, "cpu", 1, "gloo"),
    "some gpus hidden": Case(
        host(gpus=gpus(8), variables={"CUDA_VISIBLE_DEVICES": "6,7"}), 2, "cuda", 2, "nccl", (0, 1)
    ),
    "integrated intel graphics, cuda torch": Case(host(xpus=1), 4, "cpu", 1, "gloo"),
    "fewer cores than gpus": Case(host(cores=1, gpus=gpus(2)), 2, "cuda", 1, "nccl", (0, 1)),
}


@pytest.mark.parametrize("name", MACHINES)
def test_plan_when_nothing_is_asked_on(name: str) -> None:
    case = MACHINES[name]
    plan = resolve(RunConfig(), case.environment)
    assert (plan.num_processes, plan.device, plan.threads, plan.backend, plan.device_indices) == (
        case.num_processes,
        case.device,
        case.threads,
        case.backend,
        case.indices,
    )
    assert plan.in_place is False
    assert len(plan.device_names) == len(plan.device_indices)
    assert len(plan.reasons) == 3


def refusal(config: RunConfig, environment: Environment) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(config, environment)
    return str(caught.value)


@pytest.mark.parametrize("value", [0, -1, "two", 1.5, True])
def test_num_processes_when_never_possible_is_refused_before_a_plan(value: Any) -> None:
    with pytest.raises(ConfigError, match="num_processes must be"):
        RunConfig(num_processes=value)


def test_ranks_when_more_than_cores_are_fine() -> None:
    plan = resolve(RunConfig(num_processes=16), host(cores=2))
    assert (plan.num_processes, plan.threads, plan.notes) == (16, 1, ())


def test_ranks_when_more_than_gpus_says_how_many_there_are_and_what_to_paste() -> None:
    asked = RunConfig(num_processes=4, sources={"num_processes": "notebook_launcher"})
    message = refusal(asked, host(gpus=gpus(2)))
    assert message.startswith("num_processes=4 (from notebook_launcher), but there are 2 CUDA devices")
    assert 'Paste num_processes=2, or num_processes=4, device="cpu".' in message
    assert resolve(RunConfig(num_processes=4, device="cpu"), host(gpus=gpus(2))).num_processes == 4
    assert "there is 1 CUDA device for" in refusal(asked, host(gpus=gpus(1)))


@pytest.mark.parametrize("device", ["auto", "mps"])
def test_ranks_when_more_than_one_on_mps_says_why(device: Any) -> None:
    mac = host(system="darwin", mps=True, **CPU_TORCH)
    message = refusal(RunConfig(num_processes=2, device=device), mac)
    assert "one MPS device" in message
    assert 'device="cpu"' in message
    assert resolve(RunConfig(num_processes=1, device=device), mac).device == "mps"


@pytest.mark.parametrize(
    ("resources", "config", "limit", "most"),
    [
        ({}, {}, f"at most {MAX_RANKS} on one host", MAX_RANKS),
        ({"memory": 2 * GB}, {}, "2.0 GB of memory (the memory available", 83),
        ({"memory": 2 * GB}, {"start_method": "spawn"}, "at 150 MB for an idle rank", 13),
        ({"files": 1024}, {}, "1024 open files per process (RLIMIT_NOFILE)", 192),
        (
            {"tasks": 100, "tasks_by": "pids.max of cgroup /job (128)"},
            {},
            "pids.max of cgroup /job (128)",
            20,
        ),
    ],
    ids=["hard cap", "memory", "memory spawned", "files", "tasks"],
)
def test_ten_thousand_ranks_names_what_gives_out_first(
    resources: dict[str, Any], config: dict[str, Any], limit: str, most: int
) -> None:
    environment = host(memory=10_000 * GB)
    environment = replace(environment, resources=replace(environment.resources, **resources))
    message = refusal(RunConfig(num_processes=10_000, **config), environment)
    assert message.startswith("num_processes=10000 is more than this host has room for:")
    assert f": {most} ranks, by " in message
    assert limit in message
    assert "Nothing was started." in message
    assert resolve(RunConfig(num_processes=most, **config), environment).num_processes == most
    assert f"{most} ranks" in refusal(RunConfig(num_processes=most + 1, **config), environment)


@pytest.mark.parametrize(
    ("cores", "resources", "expected"),
    [
        (
            64,
            {"tasks": 100, "tasks_by": "pids.max of cgroup /job (128)"},
            (11, "pids.max of cgroup /job (128)"),
        ),
        (64, {"files": 128}, (12, "RLIMIT_NOFILE")),
        (2000, {}, (MAX_RANKS, "the CPU affinity of this process")),
        (8, {"tasks": 3, "tasks_by": "pids.max of cgroup /job (9)"}, (1, "pids.max of cgroup /job (9)")),
    ],
    ids=["tasks", "files", "hard cap", "nearly nothing"],
)
def test_ranks_when_nobody_said_are_never_too_many(
    cores: int, resources: dict[str, Any], expected: tuple[int, str]
) -> None:
    plan = resolve(RunConfig(), host(cores=cores, memory=10_000 * GB, resources=resources))
    assert plan.num_processes == expected[0]
    assert expected[1] in plan.reasons[1]


def test_one_rank_is_tried_however_little_memory_there_is() -> None:
    assert resolve(RunConfig(num_processes=1), host(memory=1)).num_processes == 1


def test_memory_when_scarce_for_what_was_asked_is_noted() -> None:
    plan = resolve(RunConfig(num_processes=4), host(memory=GB))
    assert plan.notes == (
        "4 ranks share 1.0 GB of memory (the memory available on this machine): less than 300 MB each.",
    )


def test_shared_memory_when_tiny_is_noted() -> None:
    (note,) = resolve(RunConfig(), host(resources={"shared_memory": 64 << 20})).notes
    assert "/dev/shm has 67 MB free" in note
    assert "num_workers=0" in note


@pytest.mark.parametrize(
    ("environment", "note"),
    [
        (MACHINES["gpus hidden"].environment, "CUDA_VISIBLE_DEVICES='' hides all 2 GPUs"),
        (MACHINES["gpus and a cpu torch"].environment, "(2.13.0+cpu) is built for CPU, not CUDA"),
        (MACHINES["kaggle tpu"].environment, "8 TPU chips are here, but no runtime for them"),
    ],
    ids=["hidden", "torch", "tpu"],
)
def test_cpu_when_an_accelerator_could_be_expected_is_noted(environment: Environment, note: str) -> None:
    plan = resolve(RunConfig(), environment)
    assert [note in one for one in plan.notes] == [True]
    assert resolve(RunConfig(device="cpu"), environment).notes == ()


@pytest.mark.parametrize(
    ("device", "environment", "why"),
    [
        ("cuda", host(), "no CUDA device was found"),
        ("cuda", MACHINES["gpus hidden"].environment, "CUDA_VISIBLE_DEVICES='' hides all 2 GPUs"),
        ("cuda", MACHINES["gpus and a cpu torch"].environment, "is built for CPU, not CUDA"),
        ("cuda", MACHINES["mac"].environment, "Accelerators that can be used here: 1 MPS"),
        ("xpu", host(gpus=gpus(2)), "Accelerators that can be used here: 2 CUDA"),
        ("mps", host(), "no mps device was found"),
    ],
)
def test_device_when_asked_and_absent_is_refused(device: Any, environment: Environment, why: str) -> None:
    message = refusal(RunConfig(device=device, sources={"device": "the command line"}), environment)
    assert message.startswith(f"device='{device}' (from the command line) cannot be honoured")
    assert why in message
    assert 'paste device="cpu"' in message


def test_device_when_cpu_is_asked_hides_the_gpus_from_the_ranks() -> None:
    plan = resolve(RunConfig(device="cpu", num_processes=2), host(gpus=gpus(2)))
    assert plan.variables == {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
    amd = resolve(RunConfig(device="cpu", num_processes=4), host(gpus=gpus(2), torch_build="rocm"))
    assert amd.variables["HIP_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in resolve(RunConfig(device="cpu"), host()).variables


def test_devices_when_listed_are_all_the_ranks_see_in_their_order() -> None:
    plan = resolve(RunConfig(devices=(5, 4)), host(gpus=gpus(8)))
    assert (plan.num_processes, plan.device_indices) == (2, (0, 1))
    assert plan.device_names == ("GPU 5 Tesla T4", "GPU 4 Tesla T4")
    assert plan.variables["CUDA_VISIBLE_DEVICES"] == "5,4"


@pytest.mark.parametrize(
    ("variables", "build", "expected"),
    [
        ({"CUDA_VISIBLE_DEVICES": "4,5,6"}, "cuda", {"CUDA_VISIBLE_DEVICES": "6,4"}),
        ({"CUDA_VISIBLE_DEVICES": "GPU-44,GPU-55,GPU-66"}, "cuda", {"CUDA_VISIBLE_DEVICES": "GPU-66,GPU-44"}),
        ({"HIP_VISIBLE_DEVICES": "1,2,3"}, "rocm", {"HIP_VISIBLE_DEVICES": "3,1"}),
        ({"CUDA_VISIBLE_DEVICES": "1,2,3"}, "rocm", {"HIP_VISIBLE_DEVICES": "3,1"}),
        ({"ROCR_VISIBLE_DEVICES": "5,6,7"}, "rocm", {"HIP_VISIBLE_DEVICES": "2,0"}),
    ],
)
def test_devices_when_listed_count_within_those_visible(
    variables: dict[str, str], build: Any, expected: dict[str, str]
) -> None:
    environment = host(gpus=gpus(8), variables=variables, torch_build=build)
    plan = resolve(RunConfig(devices=(2, 0)), environment)
    assert {name: value for name, value in plan.variables.items() if "VISIBLE" in name} == expected


@pytest.mark.parametrize("listed", [2, ("0",), "all", {0: 1}], ids=repr)
def test_devices_when_they_are_no_indices(listed: Any) -> None:
    with pytest.raises(ConfigError, match=r"indices \(\[4, 5\]\) or 'free'; how many is num_processes"):
        RunConfig(devices=listed)


@pytest.mark.parametrize(
    ("config", "environment", "message"),
    [
        (
            {"devices": (0, 4)},
            host(gpus=gpus(4)),
            "4 is not the index of a visible CUDA device; they are 0 to 3",
        ),
        (
            {"devices": (-1,)},
            host(gpus=gpus(1)),
            "-1 is not the index of a visible CUDA device; there is only 0",
        ),
        ({"devices": (1, 1)}, host(gpus=gpus(2)), "1 is there twice"),
        ({"devices": ()}, host(gpus=gpus(2)), "list the indices"),
        ({"devices": (0, 1), "num_processes": 1}, host(gpus=gpus(2)), "names 2 and one rank runs on each"),
        ({"devices": (0,)}, host(), "the ranks would run on the CPU"),
        ({"devices": "free"}, host(), "the ranks would run on the CPU"),
        ({"devices": (0,), "device": "cpu"}, host(gpus=gpus(1)), "the ranks would run on the CPU"),
        ({"devices": (0,)}, MACHINES["mac"].environment, "built for CUDA only"),
        ({"devices": "free"}, host(gpus=gpus(2)), "pip install 'nbaccel[gpu]'"),
        ({"devices": "free"}, host(gpus=gpus(2, used=9 * GIB, busy=80)), "every GPU is in use"),
        ({"devices": "free", "num_processes": 3}, host(gpus=gpus(2, used=0)), "there are 2 CUDA devices"),
    ],
)
def test_devices_when_they_cannot_be_honoured(
    config: dict[str, Any], environment: Environment, message: str
) -> None:
    assert message in refusal(RunConfig(**config), environment)


BUSY = (gpu(0, used=15 * GIB, busy=99), gpu(1, used=GIB // 2, busy=70), gpu(2, used=GIB // 3), gpu(3, used=0))


def test_devices_when_free_takes_the_least_used() -> None:
    plan = resolve(RunConfig(devices="free", num_processes=2), host(gpus=BUSY))
    assert plan.variables["CUDA_VISIBLE_DEVICES"] == "2,3"
    plan = resolve(RunConfig(devices="free", num_processes=3), host(gpus=BUSY))
    assert plan.variables["CUDA_VISIBLE_DEVICES"] == "1,2,3"
    assert plan.device_indices == (0, 1, 2)


def test_devices_when_free_without_a_number_takes_those_nobody_uses() -> None:
    plan = resolve(RunConfig(devices="free"), host(gpus=BUSY))
    assert (plan.num_processes, plan.variables["CUDA_VISIBLE_DEVICES"]) == (2, "2,3")
    assert "GPU 0: 15.0 GiB, 99 %" in plan.reasons[1]


def test_devices_when_free_among_unlike_gpus_fixes_their_order() -> None:
    unlike = (gpu(0, used=9 * GIB), gpu(1, used=0, name="NVIDIA A100", cc=8))
    plan = resolve(RunConfig(devices="free", num_processes=1), host(gpus=unlike))
    assert plan.variables["CUDA_VISIBLE_DEVICES"] == "1"
    assert plan.variables["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    masked = host(gpus=unlike, variables={"CUDA_VISIBLE_DEVICES": "0,1"})
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in refusal(RunConfig(devices="free"), masked)
    # Which of them CUDA calls 0 is not known, so none is given a name that may be the other's.
    assert resolve(RunConfig(), host(gpus=unlike)).device_names == ("CUDA 0", "CUDA 1")


def test_mig_slices_count_as_one_device_and_say_so() -> None:
    environment = host(gpus=gpus(2), variables={"CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b"})
    plan = resolve(RunConfig(), environment)
    assert plan.num_processes == 1
    assert "names 2 MIG slices" in plan.notes[0]


@pytest.mark.parametrize(
    ("value", "ranks", "threads", "notes"),
    [
        ("2", 2, 2, 0),
        ("4", 4, 4, 1),
        ("3,2", 1, 3, 0),
        ("1", 8, 1, 0),
        ("64", 1, 64, 0),
        ("", 2, 2, 0),
        ("many", 2, 2, 1),
        ("0", 4, 1, 1),
    ],
)
def test_threads_when_the_user_set_them(value: str, ranks: int, threads: int, notes: int) -> None:
    plan = resolve(RunConfig(num_processes=ranks), host(variables={"OMP_NUM_THREADS": value}))
    assert (plan.threads, len(plan.notes)) == (threads, notes)
    assert int(plan.variables.get("OMP_NUM_THREADS", value.split(",")[0])) == threads


@pytest.mark.parametrize(
    ("precision", "environment", "note"),
    [
        ("bf16", host(gpus=gpus(1)), "Tesla T4 only emulates bf16"),
        ("bf16", host(gpus=gpus(1, name="NVIDIA A100", cc=8)), None),
        ("bf16", host(), None),
        ("fp16", host(), "fp16 on a CPU is far slower"),
        ("fp16", host(gpus=gpus(1)), None),
        ("fp16", MACHINES["mac"].environment, None),
        ("no", host(), None),
        ("auto", host(), None),
    ],
)
def test_precision_when_slow_on_the_device_is_noted(
    precision: Any, environment: Environment, note: str | None
) -> None:
    notes = resolve(RunConfig(mixed_precision=precision), environment).notes
    assert [one for one in notes if note and note in one] == list(notes)
    assert len(notes) == (note is not None)


@pytest.mark.parametrize(
    ("precision", "message"), [("bf17", "Did you mean 'bf16'"), ("fp4", "Did you mean 'fp")]
)
def test_precision_when_never_possible_is_refused_before_a_plan(precision: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig(mixed_precision=precision)


TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


def test_rank_of_another_launch_runs_in_place() -> None:
    plan = resolve(RunConfig(), host(cores=8, gpus=gpus(4), variables=TORCHRUN))
    assert (plan.in_place, plan.num_processes, plan.device, plan.device_indices) == (True, 4, "cuda", (1,))
    assert (plan.threads, plan.variables) == (2, {})
    assert "rank 5 of 8" in plan.notes[0]


def test_rank_of_another_launch_that_sees_one_device_takes_it() -> None:
    environment = host(gpus=gpus(4), variables={**TORCHRUN, "CUDA_VISIBLE_DEVICES": "1"})
    assert resolve(RunConfig(), environment).device_indices == (0,)


@pytest.mark.parametrize(
    ("config", "variables", "message"),
    [
        ({"num_processes": 2}, {}, "num_processes=2, but this process already is rank 5 of 8"),
        ({"devices": (0,)}, {}, "devices=[0], but this process already is rank 5 of 8"),
        ({}, {"RANK": "first"}, "RANK='first', WORLD_SIZE='8'"),
    ],
)
def test_rank_of_another_launch_asked_for_something_else_is_refused(
    config: dict[str, Any], variables: dict[str, str], message: str
) -> None:
    assert message in refusal(RunConfig(**config), host(gpus=gpus(4), variables={**TORCHRUN, **variables}))
    for same in (4, 8):
        assert resolve(RunConfig(num_processes=same), host(gpus=gpus(4), variables=TORCHRUN)).in_place


@given(
    asked=st.one_of(st.none(), st.integers(1, 3000)),
    cores=st.integers(1, 256),
    memory=st.one_of(st.none(), st.integers(0, 10**12)),
    count=st.integers(0, 8),
    device=st.sampled_from([None, "auto", "cpu", "cuda"]),
)
def test_plan_is_always_within_what_is_here(
    asked: int | None, cores: int, memory: int | None, count: int, device: Any
) -> None:
    environment = host(cores=cores, memory=memory, gpus=gpus(count))
    try:
        plan: Plan | None = resolve(RunConfig(num_processes=asked, device=device), environment)
    except ConfigError:
        plan = None
    if (
        plan is None
    ):  # what is asked is too much, or not here; or there are GPUs and no memory for their ranks
        assert asked or (device == "cuda" and not count) or (count > 1 and memory is not None)
        return
    assert 1 <= plan.num_processes <= MAX_RANKS
    assert asked in (None, plan.num_processes)
    assert plan.threads == max(1, cores // plan.num_processes)
    assert len(plan.device_indices) == (0 if plan.device == "cpu" else plan.num_processes)
    if asked is None and plan.device == "cpu":
        assert plan.num_processes <= cores
        assert memory is None or plan.num_processes == 1 or plan.num_processes * RANK_MEMORY <= memory
