"""Whatever happens to a rank in a cell: an error that names it in bounded time, and the next cell works."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from tests.conftest import Kernel

RANKS = 3
FAULTS = {
    "exception": "raise ValueError('a fault')",
    "SIGKILL": "os.kill(os.getpid(), signal.SIGKILL)",
    "SIGSTOP": "os.kill(os.getpid(), signal.SIGSTOP)",
    "os._exit": "os._exit(7)",
    "segfault": "ctypes.string_at(0)",
    "loop": "re.match(r'(a+)+$', 'a' * 60 + 'b')",  # C code with the interpreter's lock held
    "absent": "time.sleep(600)",
    "mismatch": "dist.all_reduce(torch.ones(5000))",
    "memory": "resource.setrlimit(resource.RLIMIT_AS, (1 << 33, 1 << 33)); bytearray(1 << 40)",
}
# NBACCEL_TEST_FAULTS=100 takes some minutes on two cores; the suite takes each kind once.
MANY = int(os.environ.get("NBACCEL_TEST_FAULTS", len(FAULTS)))


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, state_home: None) -> Iterator[Kernel]:
    kernel = Kernel(tmp_path_factory.mktemp("live"))
    kernel.ok(f"%load_ext nbaccel\n%nbaccel start -n {RANKS} --device cpu --grace 0.5", timeout=120)
    yield kernel
    kernel.close()


def suffer(kernel: Kernel, kind: str, bad: int, delay: float) -> str:
    """Have a rank fail in a cell; what the person is told. Where the cell hangs the person presses ■."""
    cell = kernel.start(
        "%%ranks\nimport ctypes, os, re, resource, signal, time, torch\n"
        f"if rank == {bad}:\n    time.sleep({delay})\n    {FAULTS[kind]}\n"
        "for _ in range(3): dist.all_reduce(torch.ones(100))"
    )
    try:
        kernel.finish(cell, timeout=3)
    except AssertionError:
        kernel.interrupt()
        kernel.finish(cell, timeout=20)
    return cell.output


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_next_cell_works_after_each_of_many_random_faults(live: Kernel) -> None:
    chance = random.Random(int(os.environ.get("NBACCEL_TEST_SEED", "5")))
    kinds = [kind for _ in range(0, MANY, len(FAULTS)) for kind in chance.sample(list(FAULTS), len(FAULTS))]
    for kind in kinds[:MANY]:
        bad, delay = chance.randrange(RANKS), chance.random() * 0.1
        told = suffer(live, kind, bad, delay)
        assert f"rank {bad}" in told or f"ranks 0-{RANKS - 1}" in told, f"{kind} on rank {bad}: {told}"
        cell = live.ok("%%ranks\nimport torch\nt = torch.ones(1); dist.all_reduce(t); int(t), 1 + 1")
        shown = [data.get("text/plain") for data in cell.displays]
        assert shown == [f"[0-{RANKS - 1}] ({RANKS}, 2)"], f"after {kind} on rank {bad}: {cell.output}"
