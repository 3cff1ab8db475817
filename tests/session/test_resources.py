"""Resources over recorded /proc and /sys trees, and in real cgroups where this machine lets us make one."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import nbaccel
from nbaccel.session.resources import Resources, read_resources

REPOSITORY = Path(nbaccel.__file__).parents[1]
GIB = 1 << 30

V1_MOUNTS = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 {root} /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory
38 31 0:35 {root} /sys/fs/cgroup/pids rw,nosuid - cgroup cgroup rw,pids
40 31 0:37 {root} /sys/fs/cgroup/systemd rw,nosuid - cgroup cgroup rw,xattr,name=systemd
"""
V2_MOUNT = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def tree(root: Path, files: dict[str, str]) -> Path:
    plain = {
        "proc/self/status": "Name:\tpython\nUid:\t1000\t1000\t1000\t1000\nCpus_allowed_list:\t0-15\n",
        "proc/meminfo": "MemTotal: 67108864 kB\nMemFree: 1 kB\nMemAvailable:   33554432 kB\n",
        "proc/self/limits": (
            "Limit                     Soft Limit           Hard Limit           Units\n"
            "Max processes             unlimited            unlimited            processes\n"
            "Max open files            1024                 1048576              files\n"
        ),
    }
    for path, text in {**plain, **files}.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_resources_when_nothing_limits(tmp_path: Path) -> None:
    found = read_resources(tree(tmp_path, {}))
    assert (found.cores, found.memory, found.tasks, found.files) == (16, 32 * GIB, None, 1024)
    assert "affinity" in found.cores_by
    assert found.memory_by == "the memory available on this machine"


@pytest.mark.parametrize(
    ("allowed", "cores"),
    [("0", 1), ("0-3", 4), ("0,2,4-7,31", 7), ("0-127", 128)],
    ids=lambda value: str(value),
)
def test_cores_when_affinity_lists_them(tmp_path: Path, allowed: str, cores: int) -> None:
    status = f"Name:\tpython\nCpus_allowed_list:\t{allowed}\n"
    assert read_resources(tree(tmp_path, {"proc/self/status": status})).cores == cores


@pytest.mark.parametrize(
    ("cpu_max", "cores"),
    [
        ("max 100000", 16),
        ("400000 100000", 4),
        ("390000 100000", 3),
        ("150000 100000", 1),
        ("5000 100000", 1),
    ],
)
def test_cores_when_cgroup_v2_has_a_quota(tmp_path: Path, cpu_max: str, cores: int) -> None:
    files = {
        "proc/self/mountinfo": V2_MOUNT.format(root="/"),
        "proc/self/cgroup": "0::/job\n",
        "sys/fs/cgroup/job/cpu.max": cpu_max + "\n",
    }
    assert read_resources(tree(tmp_path, files)).cores == cores


def test_cores_when_only_a_parent_has_the_quota(tmp_path: Path) -> None:
    files = {
        "proc/self/mountinfo": V2_MOUNT.format(root="/"),
        "proc/self/cgroup": "0::/kubepods.slice/pod1/container\n",
        "sys/fs/cgroup/kubepods.slice/cpu.max": "800000 100000\n",
        "sys/fs/cgroup/kubepods.slice/pod1/cpu.max": "200000 100000\n",
        "sys/fs/cgroup/kubepods.slice/pod1/container/cpu.max": "max 100000\n",
    }
    found = read_resources(tree(tmp_path, files))
    assert found.cores == 2
    assert "/kubepods.slice/pod1 (2 cores)" in found.cores_by


def test_cores_when_cgroup_v1_has_a_quota(tmp_path: Path) -> None:
    files = {
        "proc/self/mountinfo": V1_MOUNTS.format(root="/"),
        "proc/self/cgroup": "5:cpuacct,cpu:/a/b\n4:memory:/\n1:name=systemd:/x\n",
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "300000\n",
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_period_us": "100000\n",
    }
    assert read_resources(tree(tmp_path, files)).cores == 3


@pytest.mark.parametrize("path", ["/docker/abc", "/../../docker/abc", "/"])
@pytest.mark.parametrize("mount_root", ["/docker/abc", "/"])
def test_limits_when_a_container_shows_only_its_own_cgroup(
    tmp_path: Path, path: str, mount_root: str
) -> None:
    files = {
        "proc/self/mountinfo": V1_MOUNTS.format(root=mount_root),
        "proc/self/cgroup": f"5:cpu,cpuacct:{path}\n4:memory:{path}\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "0\n",
    }
    found = read_resources(tree(tmp_path, files))
    assert (found.cores, found.memory) == (2, 2 * GIB)


def test_memory_when_cgroup_v2_limits_it_and_caches_files(tmp_path: Path) -> None:
    files = {
        "proc/self/mountinfo": V2_MOUNT.format(root="/"),
        "proc/self/cgroup": "0::/job/step\n",
        "sys/fs/cgroup/job/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/job/memory.current": f"{3 * GIB}\n",
        "sys/fs/cgroup/job/memory.stat": f"anon {2 * GIB}\ninactive_file {GIB}\nactive_file 0\n",
        "sys/fs/cgroup/job/step/memory.max": "max\n",
        "sys/fs/cgroup/job/step/memory.high": "max\n",
    }
    found = read_resources(tree(tmp_path, files))
    assert (found.memory, found.memory_by) == (2 * GIB, "the memory limit of cgroup /job")


def test_memory_when_cgroup_v1_counts_children_in_its_totals(tmp_path: Path) -> None:
    stat = f"inactive_file 0\nhierarchical_memory_limit 1\ntotal_inactive_file {GIB}\n"
    files = {
        "proc/self/mountinfo": V1_MOUNTS.format(root="/"),
        "proc/self/cgroup": "4:memory:/batch\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/batch/memory.limit_in_bytes": f"{8 * GIB}\n",
        "sys/fs/cgroup/memory/batch/memory.usage_in_bytes": f"{3 * GIB}\n",
        "sys/fs/cgroup/memory/batch/memory.stat": stat,
    }
    assert read_resources(tree(tmp_path, files)).memory == 6 * GIB


def test_memory_when_the_limit_is_overdrawn_is_none_left(tmp_path: Path) -> None:
    files = {
        "proc/self/mountinfo": V2_MOUNT.format(root="/"),
        "proc/self/cgroup": "0::/job\n",
        "sys/fs/cgroup/job/memory.high": f"{GIB}\n",
        "sys/fs/cgroup/job/memory.current": f"{2 * GIB}\n",
    }
    assert read_resources(tree(tmp_path, files)).memory == 0


def test_tasks_when_a_cgroup_limits_pids(tmp_path: Path) -> None:
    files = {
        "proc/self/mountinfo": V2_MOUNT.format(root="/"),
        "proc/self/cgroup": "0::/user/job\n",
        "sys/fs/cgroup/user/pids.max": "300\n",
        "sys/fs/cgroup/user/pids.current": "280\n",
        "sys/fs/cgroup/user/job/pids.max": "100\n",
        "sys/fs/cgroup/user/job/pids.current": "5\n",
    }
    found = read_resources(tree(tmp_path, files))
    assert (found.tasks, found.tasks_by) == (20, "pids.max of cgroup /user (300)")


@pytest.mark.parametrize(("uid", "tasks"), [("1000", 100 - 7 - 1), ("0", None)], ids=["user", "root"])
def test_tasks_when_the_user_is_limited(tmp_path: Path, uid: str, tasks: int | None) -> None:
    files = {
        "proc/self/status": f"Uid:\t{uid}\t{uid}\t{uid}\t{uid}\nCpus_allowed_list:\t0\n",
        "proc/self/limits": "Max processes             100                  100                  processes\n",
        "proc/11/status": f"Uid:\t{uid}\t{uid}\t{uid}\t{uid}\nThreads:\t7\n",
        "proc/12/status": f"Uid:\t{uid}\t{uid}\t{uid}\t{uid}\nThreads:\t1\n",
        "proc/13/status": "Uid:\t5\t5\t5\t5\nThreads:\t50\n",
    }
    assert read_resources(tree(tmp_path, files)).tasks == tasks


def test_resources_when_proc_is_absent(tmp_path: Path) -> None:
    found = read_resources(tmp_path)
    assert found.cores >= 1
    assert (found.tasks, found.files) == (None, None)


# Real cgroups.


def own_cgroup(controller: str) -> tuple[Path, bool]:
    """The cgroup this process is in, and whether it is of v2. Skips where there is none to use."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        folder = Path("/sys/fs/cgroup") / controllers / path.lstrip("/")
        if controller in controllers.split(",") and (folder / "cgroup.procs").exists():
            return folder, False
    children = Path("/sys/fs/cgroup/cgroup.subtree_control")
    if children.exists() and controller in children.read_text().split():
        return children.parent, True
    pytest.skip(f"no {controller} cgroup hierarchy is mounted here that could have children of ours")


@contextlib.contextmanager
def cgroup(
    controller: str, *, v1: dict[str, str], v2: dict[str, str], nested: bool = False
) -> Iterator[Path]:
    """A cgroup with these settings, or an unlimited child of it; gone at the end."""
    parent, is_v2 = own_cgroup(controller)
    folder = parent / f"nbaccel-test-{uuid.uuid4().hex[:8]}"
    made: list[Path] = []
    try:
        try:
            folder.mkdir()
            made.append(folder)
            for name, text in (v2 if is_v2 else v1).items():
                (folder / name).write_text(text)
            if nested:
                if is_v2:
                    (folder / "cgroup.subtree_control").write_text(f"+{controller}")
                (folder / "inner").mkdir()
                made.append(folder / "inner")
        except OSError as error:
            pytest.skip(f"this user cannot make a {controller} cgroup here: {error}")
        yield made[-1]
    finally:
        for one in reversed(made):
            one.rmdir()


def run_in(folder: Path, code: str) -> str:
    """What `code` prints in a process that is in this cgroup."""
    join = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
    command = ["sh", "-c", join, str(folder), sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment.pop("OMP_NUM_THREADS", None)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def resources_in(folder: Path) -> Resources:
    code = """
import dataclasses, json
from nbaccel.session.environment import probe
print(json.dumps(dataclasses.asdict(probe().resources)))
"""
    return Resources(**json.loads(run_in(folder, code)))


@pytest.mark.parametrize("nested", [False, True], ids=["own", "parent"])
def test_cores_in_a_real_cgroup_with_a_quota(nested: bool) -> None:
    v1 = {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "100000"}
    with cgroup("cpu", v1=v1, v2={"cpu.max": "100000 100000"}, nested=nested) as folder:
        found = resources_in(folder)
    assert found.cores == 1
    if len(os.sched_getaffinity(0)) > 1:
        assert "CPU quota of cgroup" in found.cores_by
        assert read_resources().cores > 1


@pytest.mark.parametrize("nested", [False, True], ids=["own", "parent"])
def test_memory_in_a_real_cgroup_with_a_limit(nested: bool) -> None:
    size = 700 << 20
    v1 = {"memory.limit_in_bytes": str(size)}
    with cgroup("memory", v1=v1, v2={"memory.max": str(size)}, nested=nested) as folder:
        found = resources_in(folder)
    assert found.memory is not None
    assert size - (200 << 20) < found.memory < size
    assert "memory limit of cgroup" in found.memory_by


def test_launch_in_a_real_cgroup_with_little_memory_is_sized_by_it() -> None:
    code = """
from nbaccel.config import RunConfig
from nbaccel.errors import ConfigError
from nbaccel.session.environment import probe
from nbaccel.session.resolve import resolve
print(resolve(RunConfig(), probe()).num_processes)
try:
    resolve(RunConfig(num_processes=200), probe())
except ConfigError as error:
    print(error)
"""
    size = 500 << 20
    v1 = {"memory.limit_in_bytes": str(size)}
    with cgroup("memory", v1=v1, v2={"memory.max": str(size)}) as folder:
        number, message = run_in(folder, code).splitlines()
    assert number == "1"
    assert "memory limit of cgroup" in message
    assert message.endswith("Paste num_processes=1.")


def test_rank_killed_for_memory_in_a_real_cgroup_is_told_so() -> None:
    code = """
import torch
from nbaccel import notebook_launcher
from nbaccel.errors import WorkerError

def hog():
    import os
    if os.environ["RANK"] == "1":
        torch.ones(1 << 30)
    return "done"

try:
    notebook_launcher(hog, num_processes=2)
except WorkerError as error:
    print(sorted(error.exitcodes.items()), error)
print(notebook_launcher(lambda: "goes on", num_processes=2))
"""
    size = 1500 << 20
    v1 = {"memory.limit_in_bytes": str(size)}
    with cgroup("memory", v1=v1, v2={"memory.max": str(size)}) as folder:
        told = run_in(folder, code)
    assert "rank 1 of 2 was ended by SIGKILL" in told
    assert "the kernel killed it because memory ran out (the memory limit of cgroup" in told
    assert "which is 1.57 GB" in told
    assert told.splitlines()[-1] == "[0-1] 'goes on'"


def test_tasks_in_a_real_cgroup_with_a_limit_on_pids() -> None:
    with cgroup("pids", v1={"pids.max": "50"}, v2={"pids.max": "50"}) as folder:
        found = resources_in(folder)
    assert found.tasks is not None
    assert 40 <= found.tasks < 50
    assert "pids.max" in found.tasks_by


def test_resources_of_this_machine_are_within_what_it_has() -> None:
    found = read_resources()
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    assert 1 <= found.cores <= (len(affinity(0)) if affinity else os.cpu_count() or 1)
    if sys.platform == "linux":
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert found.memory is not None
        assert 0 < found.memory <= total
