"""Ranks that are threads of one process, to code that asks torch and the environment for them."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nbaccel import Accelerator, launch

pytestmark = pytest.mark.slow


def own_groups() -> dict[str, Any]:
    dist.init_process_group("gloo")
    total = torch.full((1,), float(dist.get_rank()))
    dist.all_reduce(total)
    found = {"rank": dist.get_rank(), "total": total.item()}
    acc = Accelerator()
    dist.destroy_process_group()
    refused = ""
    if acc.process_index:
        try:
            dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=2)
        except RuntimeError as error:
            refused = str(error)
    return {**found, "accelerator": (acc.process_index, acc.local_process_index), "refused": refused}


def test_process_groups_of_their_own_know_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_USE_SPMD", "1")  # as `torch_xla.runtime.use_spmd` leaves it in a kernel
    found = list(launch(own_groups, num_processes=2, device="tpu", stall_after=0).result(timeout=240))
    for rank, one in enumerate(found):
        assert (one["rank"], one["total"], one["accelerator"]) == (rank, 1.0, (rank, rank))
    assert found[0]["refused"] == ""
    assert "on rank 1 was given rank 0" in found[1]["refused"]
