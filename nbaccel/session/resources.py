"""What the host lets this process use: cores, memory, processes, open files, shared memory.

Never the host's own figures: a container, a batch job or a notebook service gives a share, and a
launch sized by the host's count is throttled or killed. Read from /proc and /sys only (cgroup v1, v2
and both at once, every nested parent); `root` puts another tree in their place, which is how the
tests show machines that are not here. Sources: cgroups(7), proc(5), Linux Documentation/admin-guide
(cgroup-v1/memory, cgroup-v2, scheduler/sched-bwc).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Resources", "oom_kills", "read_resources", "text_of"]

# cgroup v1 writes "no limit" as the largest multiple of the page size; anything of that size means none.
_UNLIMITED = 1 << 60
# Above this the per-user limit on processes cannot matter, and counting the user's processes is spared.
_COUNT_TASKS_BELOW = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What this process may still take. None: not known here, or not limited."""

    cores: int
    """Cores this process may keep busy, at least 1 (a quota of 1.5 cores counts as 1)."""
    cores_by: str = ""
    """What says so, in words for a message."""
    memory: int | None = None
    """Bytes that can still be taken without swapping or being killed."""
    memory_by: str = ""
    tasks: int | None = None
    """Processes and threads together that can still be started."""
    tasks_by: str = ""
    files: int | None = None
    """Files one process may hold open."""
    shared_memory: int | None = None
    """Free bytes in /dev/shm."""


def read_resources(root: Path = Path("/")) -> Resources:
    """What the host lets the calling process use, now."""
    levels = list(_cgroup_levels(root))
    cores, cores_by = _cores(root, levels)
    memory, memory_by = _memory(root, levels)
    tasks, tasks_by = _tasks(root, levels)
    return Resources(
        cores=cores,
        cores_by=cores_by,
        memory=memory,
        memory_by=memory_by,
        tasks=tasks,
        tasks_by=tasks_by,
        files=_limit(root, "Max open files"),
        shared_memory=_free_bytes(root / "dev/shm"),
    )


@dataclass(frozen=True, slots=True)
class _Level:
    """One cgroup this process is in: its own or a parent of it."""

    folder: str
    name: str

    def text(self, file: str) -> str:
        return text_of(f"{self.folder}/{file}")

    def number(self, file: str) -> int | None:
        return _number(self.text(file))

    def stat(self, key: str) -> int:
        found = re.search(rf"^{key} (\d+)$", self.text("memory.stat"), re.MULTILINE)
        return int(found[1]) if found else 0


def _cgroup_levels(root: Path) -> Iterator[_Level]:
    """Every cgroup this process is in, own ones first, in every hierarchy that is mounted.

    Which controller a folder belongs to needs no telling: its limit files are there or they are not.
    """
    mounts = list(_cgroup_mounts(root))
    for line in text_of(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for mounted_controllers, mount_root, mount_point in mounts:
            if set(controllers.split(",")) - {""} != mounted_controllers:
                continue
            # Without a cgroup namespace the path is the host's, and the mount shows only a part of the tree.
            inside = os.path.relpath(path, mount_root) if path.startswith("/") else "."
            parts = [] if inside == "." or inside.startswith("..") or "/.." in path else inside.split("/")
            for depth in range(len(parts), -1, -1):
                below = "/".join(parts[:depth])
                yield _Level(os.path.join(root, mount_point.lstrip("/"), below), f"/{below}")
            break


def _cgroup_mounts(root: Path) -> Iterator[tuple[set[str], str, str]]:
    """(controllers, root of the mount in its hierarchy, mount point) of each cgroup mount; none in v2."""
    for line in text_of(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        options = set(kind[2].split(",")) if kind[0] == "cgroup" else set()
        # The options of a v1 mount are its controllers, or "name=systemd", beside mount flags.
        controllers = options - {"rw", "ro", "xattr", "clone_children", "noprefix", "cpuset_v2_mode"}
        controllers = {one for one in controllers if not one.startswith("release_agent")}
        yield controllers, _unescape(fields[3]), _unescape(fields[4])


def _cores(root: Path, levels: list[_Level]) -> tuple[int, str]:
    status = text_of(root / "proc/self/status")
    allowed = re.search(r"^Cpus_allowed_list:\s*(\S+)", status, re.MULTILINE)
    if allowed:
        count, by = _count_list(allowed[1]), "the CPU affinity of this process"
    elif hasattr(os, "sched_getaffinity"):
        count, by = len(os.sched_getaffinity(0)), "the CPU affinity of this process"
    else:
        count, by = os.cpu_count() or 1, "the cores of this machine"
    for level in levels:
        quota = _quota(level)
        # Rounded down: ranks step together, so one that the scheduler throttles holds up all of them.
        if quota is not None and max(1, int(quota)) < count:
            count, by = max(1, int(quota)), f"the CPU quota of cgroup {level.name} ({quota:g} cores)"
    return max(1, count), by


def _quota(level: _Level) -> float | None:
    v2 = level.text("cpu.max").split()
    if len(v2) == 2 and v2[0].isdigit() and int(v2[1]) > 0:
        return int(v2[0]) / int(v2[1])
    quota, period = level.number("cpu.cfs_quota_us"), level.number("cpu.cfs_period_us")
    if quota is not None and period and quota > 0:
        return quota / period
    return None


def _memory(root: Path, levels: list[_Level]) -> tuple[int | None, str]:
    free, by = _free_memory(root), "the memory available on this machine"
    for level in levels:
        room = _memory_room(level)
        if room is not None and (free is None or room < free):
            free, by = room, f"the memory limit of cgroup {level.name}"
    return free, by if free is not None else ""


def oom_kills(root: Path = Path("/")) -> tuple[int, str]:
    """How many processes the kernel has killed for want of memory where this one lives, and which limit says so.

    Counted by the innermost memory cgroup that can be read; without one, by the machine.
    """
    for level in _cgroup_levels(root):
        counter = level.text("memory.events") or level.text("memory.oom_control")
        if found := re.search(r"^oom_kill (\d+)$", counter, re.MULTILINE):
            limit = level.number("memory.max") or level.number("memory.limit_in_bytes")
            said = f", which is {limit / 1e9:.3g} GB" if limit is not None and limit < _UNLIMITED else ""
            return int(found[1]), f"the memory limit of cgroup {level.name}{said}"
    found = re.search(r"^oom_kill (\d+)$", text_of(root / "proc/vmstat"), re.MULTILINE)
    return int(found[1]) if found else 0, "the machine's memory"


def _memory_room(level: _Level) -> int | None:
    """Bytes until this cgroup's limit; file pages that can be dropped do not count as used."""
    limits = [level.number(name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
    known = [limit for limit in limits if limit is not None and limit < _UNLIMITED]
    if not known:
        return None
    used = level.number("memory.current")
    droppable = level.stat("inactive_file")
    if used is None:  # v1, where only the total_ figures include the children
        used, droppable = level.number("memory.usage_in_bytes") or 0, level.stat("total_inactive_file")
    return max(0, min(known) - max(0, used - droppable))


def _free_memory(root: Path) -> int | None:
    found = re.search(r"^MemAvailable:\s*(\d+) kB", text_of(root / "proc/meminfo"), re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    if sys.platform == "darwin":  # no figure for what is free; what is there is a bound still
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _tasks(root: Path, levels: list[_Level]) -> tuple[int | None, str]:
    left: int | None = None
    by = ""
    user = re.search(r"^Uid:\s*\d+\s+(\d+)", text_of(root / "proc/self/status"), re.MULTILINE)
    limit = _limit(root, "Max processes")
    if limit is not None and user and user[1] != "0":  # the kernel does not hold root to it
        used = _tasks_of(root, user[1]) if limit < _COUNT_TASKS_BELOW else 0
        left, by = max(0, limit - used), f"the limit on this user's processes (RLIMIT_NPROC, {limit})"
    for level in levels:
        most = level.number("pids.max")
        if most is not None:
            room = max(0, most - (level.number("pids.current") or 0))
            if left is None or room < left:
                left, by = room, f"pids.max of cgroup {level.name} ({most})"
    return left, by


def _tasks_of(root: Path, user: str) -> int:
    """How many threads of all processes the user has, as RLIMIT_NPROC counts them."""
    total = 0
    for status in (root / "proc").glob("[0-9]*/status"):
        text = text_of(status)  # empty when the process ended meanwhile
        owner = re.search(r"^Uid:\s*(\d+)", text, re.MULTILINE)
        threads = re.search(r"^Threads:\s*(\d+)", text, re.MULTILINE)
        if owner and owner[1] == user:
            total += int(threads[1]) if threads else 1
    return total


def _limit(root: Path, name: str) -> int | None:
    """The soft limit of this process; None when unlimited or unknown."""
    found = re.search(rf"^{name}\s+(\S+)", text_of(root / "proc/self/limits"), re.MULTILINE)
    return _number(found[1]) if found else None


def _free_bytes(folder: Path) -> int | None:
    if not hasattr(os, "statvfs"):
        return None
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def _count_list(text: str) -> int:
    """How many numbers a list such as "0-3,8" holds."""
    count = 0
    for part in text.split(","):
        first, _, last = part.partition("-")
        count += int(last or first) - int(first) + 1
    return count


def _unescape(text: str) -> str:
    r"""A path of mountinfo, where a space is written \040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _number(text: str) -> int | None:
    stripped = text.strip()
    return int(stripped) if re.fullmatch(r"-?\d+", stripped) else None


def text_of(path: Path | str) -> str:
    """The file's text, or nothing where it is absent or closed to us: then it tells of nothing we can use."""
    try:
        with open(path, "rb", buffering=0) as file:  # a launch looks for a hundred of them
            return file.readall().decode(errors="replace")
    except OSError:
        return ""
