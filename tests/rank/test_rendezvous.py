"""Process groups meet whatever the code says about addresses, and nothing listens off loopback."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nbaccel import notebook_launcher

pytestmark = pytest.mark.usefixtures("clean")


def rank() -> int:
    return int(os.environ["RANK"])


def total() -> float:
    tensor = torch.tensor([rank() + 1.0])
    dist.all_reduce(tensor)
    return tensor.item()


def regroup(times: int) -> list[float]:
    found = []
    for number in range(times):
        if rank() == number % 2:
            time.sleep(0.2)  # one rank is late, each in turn
        dist.init_process_group("gloo")
        found.append(total())
        dist.destroy_process_group()
    return found


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_group_is_made_again_when_one_rank_is_late(method: str) -> None:
    values = notebook_launcher(regroup, (4,), num_processes=2, start_method=method)
    assert values == [[3.0] * 4] * 2


def tutorial() -> float:
    os.environ["MASTER_ADDR"] = "localhost"
    os.environ["MASTER_PORT"] = "29500"
    dist.init_process_group("gloo", rank=rank(), world_size=int(os.environ["WORLD_SIZE"]))
    return total()


def by_address() -> float:
    size = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:12355", rank=rank(), world_size=size)
    return total()


@pytest.mark.parametrize("function", [tutorial, by_address])
def test_tutorials_own_address_works(function: object) -> None:
    assert notebook_launcher(function, num_processes=2) == [3.0, 3.0]  # type: ignore[arg-type]


def alone_first() -> float:
    dist.init_process_group("gloo", rank=0, world_size=1)
    dist.destroy_process_group()
    dist.init_process_group("gloo")
    half = dist.new_group([0])
    assert half is not None
    return total()


def test_group_of_one_does_not_disturb_the_others() -> None:
    assert notebook_launcher(alone_first, num_processes=2) == [3.0, 3.0]


def first_leaves() -> float:
    dist.init_process_group("gloo")
    value = total()
    if rank() == 0:
        return value
    time.sleep(0.3)
    store = dist.distributed_c10d._get_default_store()
    store.set(f"still there {rank()}", "yes")
    assert store.get(f"still there {rank()}") == b"yes"
    return value


def test_store_outlives_rank_0() -> None:
    assert notebook_launcher(first_leaves, num_processes=3) == [6.0] * 3


def listeners() -> list[str]:
    """Addresses, in hexadecimal, that this network namespace's processes listen on, with their inodes."""
    found = []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                found.append(f"{fields[1]} {fields[9]}")
    return found


def sockets_of(pid: str) -> set[str]:
    inodes = set()
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    except OSError:
        pass  # it ended, or is not ours
    return inodes


def who_listens(odd: bool) -> list[str]:
    if odd and ctypes.CDLL(None).unshare(0x04000000) == 0:  # CLONE_NEWUTS: a hostname of this rank's own
        name = b"no-such-host-anywhere"
        assert ctypes.CDLL(None).sethostname(name, len(name)) == 0
    dist.init_process_group("gloo")
    total()
    names = ("nb-run", "nb-store", "nb-rank", "nb-template", "nb-server", "nb-guardian", "nb-waiting")
    ours: set[str] = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            comm = Path(f"/proc/{pid}/comm").read_text().strip()
        except OSError:
            continue
        if comm.startswith(names):
            ours |= sockets_of(pid)
    found = [entry.split()[0] for entry in listeners() if entry.split()[1] in ours]
    dist.barrier()
    return found


@pytest.mark.parametrize(
    "odd",
    [
        False,
        pytest.param(
            True, marks=pytest.mark.skipif(os.geteuid() != 0, reason="needs root to change a hostname")
        ),
    ],
)
def test_nothing_listens_off_loopback(odd: bool) -> None:
    found = notebook_launcher(who_listens, (odd,), num_processes=2)[0]
    assert found, "the store listens, so something must be seen"
    loopback = ("0100007F:", "00000000000000000000000001000000:", "0000000000000000FFFF00000100007F:")
    assert all(address.startswith(loopback) for address in found), found
