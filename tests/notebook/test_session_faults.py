"""Whatever happens to a rank in a cell: an error that names it in bounded time, and the next cell works."""

from __future__ import annotations

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
HANG = ("SIGSTOP", "loop", "absent", "mismatch")


@pytest.fixture(scope="module")
def live(kernel: Kernel) -> Iterator[Kernel]:
    """The kernel with a session of ranks."""
    kernel.ok(f"%load_ext nbaccel\n%nbaccel start -n {RANKS} --device cpu --grace 0.5", timeout=120)
    yield kernel
    kernel.run("%nbaccel stop")


def suffer(kernel: Kernel, kind: str, bad: int, delay: float) -> str:
    """Have a rank fail in a cell; what the person is told. Where the cell hangs the person presses ■."""
    cell = kernel.start(
        "%%ranks\nimport ctypes, os, re, resource, signal, time, torch\n"
        f"if rank == {bad}:\n    time.sleep({delay})\n    {FAULTS[kind]}\n"
        "for _ in range(3): dist.all_reduce(torch.ones(100))"
    )
    try:
        kernel.finish(cell, timeout=3 if kind in HANG else 40)
    except AssertionError:
        kernel.interrupt()
        kernel.finish(cell, timeout=20)
    return cell.output


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("times", [1, pytest.param(11, marks=pytest.mark.long)])
def test_next_cell_works_after_each_of_many_random_faults(live: Kernel, times: int) -> None:
    """Each kind of fault so many times."""
    chance = random.Random(5)
    for kind in [kind for _ in range(times) for kind in chance.sample(list(FAULTS), len(FAULTS))]:
        bad, delay = chance.randrange(RANKS), chance.random() * 0.1
        told = suffer(live, kind, bad, delay)
        assert f"rank {bad}" in told or f"ranks 0-{RANKS - 1}" in told, f"{kind} on rank {bad}: {told}"
        cell = live.ok("%%ranks\nimport torch\nt = torch.ones(1); dist.all_reduce(t); int(t), 1 + 1")
        shown = [data.get("text/plain") for data in cell.displays]
        assert shown == [f"[0-{RANKS - 1}] ({RANKS}, 2)"], f"after {kind} on rank {bad}: {cell.output}"
