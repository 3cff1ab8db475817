"""Launches from a real kernel that has initialised XLA: on the CPU as ever, and on XLA devices."""

from __future__ import annotations

import time

import pytest

from tests.conftest import Kernel

pytestmark = [pytest.mark.kernel, pytest.mark.slow]


def test_ordinary_ranks_when_the_kernel_has_initialised_xla(xla_kernel: Kernel) -> None:
    cell = xla_kernel.ok(
        """
def f():
    import os, torch, torch.distributed as dist
    dist.init_process_group("gloo")
    total = torch.ones(2) * int(os.environ["RANK"])
    dist.all_reduce(total)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    model(total[None]).sum().backward()
    return total.tolist()
values = notebook_launcher(f, num_processes=2)
print("values", list(values), (torch.ones(3, device=torch_xla.device()) * 3).cpu().tolist())
""",
        timeout=180,
    )
    assert "values [[1.0, 1.0], [1.0, 1.0]] [3.0, 3.0, 3.0]" in cell.stdout


def test_package_that_opens_xla_at_its_import_is_left_out_and_named(xla_kernel: Kernel) -> None:
    cell = xla_kernel.ok(
        """
import pathlib, site, sys
home = pathlib.Path(site.getsitepackages()[0])
(home / "opens_xla_for_tests.py").write_text(
    "import torch, torch_xla\\nheld = torch.ones(2, device=torch_xla.device()).cpu()\\n")
try:
    import opens_xla_for_tests
    print("values", list(notebook_launcher(lambda: 7, num_processes=2)))
finally:
    (home / "opens_xla_for_tests.py").unlink()
""",
        timeout=180,
    )
    assert "values [7, 7]" in cell.stdout
    assert "importing opens_xla_for_tests makes a process unsafe to fork: it initialised XLA" in cell.stderr


def test_replicas_have_their_own_rank_output_and_results(xla_kernel: Kernel) -> None:
    cell = xla_kernel.ok(
        """
def g():
    acc = Accelerator()
    print(f"I am {acc.process_index}")
    mine = torch.full((2,), float(acc.process_index + 1)).to(acc.device)
    return acc.process_index, acc.num_processes, str(acc.device), mine * 2, acc.gather_object(acc.process_index)
for index, n, device, doubled, everyone in notebook_launcher(g, num_processes=2, device="tpu"):
    print("value", index, n, device, doubled.device, doubled.tolist(), everyone)
""",
        timeout=180,
    )
    assert "I am 0" in cell.stdout  # rank 0's lines bear no label beside others'
    assert "[1] I am 1" in cell.stdout
    assert "value 0 2 xla:0 cpu [2.0, 2.0] [0, 1]" in cell.stdout
    assert "value 1 2 xla:1 cpu [4.0, 4.0] [0, 1]" in cell.stdout


def test_exception_in_one_replica_is_its_own(xla_kernel: Kernel) -> None:
    cell = xla_kernel.run(
        """
def h():
    import torch_xla.runtime as xr
    return 1 / (1 - xr.global_ordinal())
notebook_launcher(h, num_processes=2, device="tpu")
""",
        timeout=180,
    )
    assert cell.error == "WorkerError"
    assert "rank 1 of 2 failed: ZeroDivisionError" in cell.traceback
    assert "return 1 / (1 - xr.global_ordinal())" in cell.traceback


def test_interrupt_reaches_every_replica(xla_kernel: Kernel) -> None:
    cell = xla_kernel.start(
        """
import time
def wait():
    print("at work", flush=True)
    while True:
        time.sleep(0.01)
notebook_launcher(wait, num_processes=2, device="tpu")
"""
    )
    xla_kernel.pump(lambda: cell.stdout.count("at work") >= 1, 120, "the ranks at work")
    xla_kernel.settle(1.0)
    began = time.monotonic()
    xla_kernel.interrupt()
    xla_kernel.finish(cell, timeout=60)
    assert cell.error == "KeyboardInterrupt"
    assert time.monotonic() - began < 60


def test_cells_run_on_replicas_and_are_interrupted(xla_kernel: Kernel) -> None:
    xla_kernel.ok("%load_ext nbaccel")
    xla_kernel.ok("%nbaccel start -n 2 --device tpu", timeout=180)
    cell = xla_kernel.ok("%%ranks\nmine = rank + 1\nprint('here is', rank)\nmine", timeout=120)
    assert "[1] here is 1" in cell.stdout
    waiting = xla_kernel.start(
        "%%ranks\nimport time\nprint('at work', flush=True)\nwhile True:\n    mine += 0; time.sleep(0.01)"
    )
    xla_kernel.pump(lambda: waiting.stdout.count("at work") >= 1, 60, "the ranks at work")
    xla_kernel.settle(1.0)
    xla_kernel.interrupt()
    xla_kernel.finish(waiting, timeout=60)
    assert waiting.error == "KeyboardInterrupt"
    cell = xla_kernel.ok("%%ranks 1\nprint('still', mine)", timeout=60)
    assert "still 2" in cell.stdout
    assert "Gloo" not in waiting.stdout + cell.stdout, "the lines of its new connections, of torch 2.9"
    assert xla_kernel.run("%%ranks\n1 / (mine - mine)", timeout=60).error == "WorkerError"
    cell = xla_kernel.ok("%nbaccel debug 0", answers=["p ('mine is', mine)", "q"], timeout=60)
    assert "('mine is', 1)" in cell.stdout
    xla_kernel.ok("%nbaccel stop", timeout=60)
