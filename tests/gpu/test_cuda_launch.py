"""The launch on a CUDA device: `make test-gpu`."""

from __future__ import annotations

import os
import subprocess
import time
from typing import Any

import pytest
import torch

import nbaccel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def device_of_rank() -> tuple[int, str]:
    tensor = torch.ones(4, device="cuda")  # no set_device: the rank's own device is current already
    return torch.cuda.current_device(), f"{tensor.device} {tensor.sum().item()}"


def test_ranks_use_cuda_when_kernel_has_initialised_it() -> None:
    torch.ones(1, device="cuda")
    assert torch.cuda.is_initialized()
    values = nbaccel.notebook_launcher(device_of_rank, num_processes=1, device="cuda")
    assert values[0] == (0, "cuda:0 4.0")


def double(tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    return str(tensor.device), tensor * 2


def test_cuda_tensor_arrives_on_the_ranks_device_and_comes_back_on_the_cpu() -> None:
    place, doubled = nbaccel.notebook_launcher(
        double, (torch.arange(5.0, device="cuda"),), num_processes=1, device="cuda"
    )[0]
    assert place == "cuda:0"
    assert doubled.device.type == "cpu"
    assert doubled.tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]


def hold_memory() -> None:
    _kept = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    print("holding", flush=True)
    time.sleep(600)


def used_bytes() -> int:
    """Memory in use on device 0 by everybody, as NVML's tool tells it."""
    text: Any = subprocess.run(
        ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return int(text.split()[0]) << 20


def test_gpu_memory_is_free_after_a_kill() -> None:
    before = used_bytes()
    run = nbaccel.launch(hold_memory, num_processes=1, device="cuda")
    deadline = time.monotonic() + 120
    while used_bytes() < before + (1 << 30):
        assert time.monotonic() < deadline, run.logs(0)
        time.sleep(0.1)
    run.kill()
    with pytest.raises(KeyboardInterrupt):
        run.result(timeout=30)
    deadline = time.monotonic() + 2
    while used_bytes() > before + (64 << 20):
        assert time.monotonic() < deadline, (
            f"{used_bytes() - before} bytes still used by {os.getpid()}'s ranks"
        )
        time.sleep(0.05)
