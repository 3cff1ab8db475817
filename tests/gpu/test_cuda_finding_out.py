"""Who initialised CUDA, what a parked rank holds, and an NCCL hang named: `make test-gpu`."""

from __future__ import annotations

import os
import time

import pytest
import torch

from nbaccel import launch
from tests.conftest import Kernel, wait_until

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def test_the_line_that_initialised_cuda_is_named(kernel: Kernel) -> None:
    kernel.ok("import nbaccel, torch")
    kernel.ok("x = 1\ny = torch.ones(1, device='cuda')")
    shown = kernel.ok("print(nbaccel.doctor())").stdout
    assert "an accelerator was opened here, by Cell In[" in shown
    assert "line 2" in shown


def test_a_cell_that_opened_the_device_without_torch_is_named(kernel: Kernel) -> None:
    kernel.ok("import nbaccel, ctypes")
    kernel.ok("cuda = ctypes.CDLL('libcudart.so')\ncuda.cudaFree(0)")
    assert "an accelerator was opened here, by Cell In[" in kernel.ok("print(nbaccel.doctor())").stdout


def miss_a_collective() -> None:
    import torch.distributed as dist

    dist.init_process_group("nccl")
    x = torch.ones(4, device="cuda")
    dist.all_reduce(x)
    if os.environ["RANK"] == "1":
        time.sleep(60)
    dist.all_reduce(x)
    x.sum().item()  # the host waits here


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a device for each of two ranks")
def test_the_rank_that_missed_an_nccl_collective_is_named() -> None:
    run = launch(miss_a_collective, num_processes=2, device="cuda", stall_after=0, folder=False)
    try:
        wait_until(
            lambda: "rank 1 has not called all_reduce #2" in "\n".join(run.stacks().headlines()),
            60,
            "rank 1 to be named",
        )
    finally:
        run.kill()
        with pytest.raises(KeyboardInterrupt):
            run.result(timeout=30)
