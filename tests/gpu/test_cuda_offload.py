"""Placing models over a CUDA device, the CPU and the disk: `make test-gpu`."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nbaccel import cpu_offload, disk_offload, dispatch_model, load_checkpoint_and_dispatch, remove_hooks
from nbaccel.errors import ConfigError
from tests.core.offload.models import KINDS, Inputs, made
from tests.core.offload.test_dispatch import answer, empty, saved

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
MEGABYTE = 1 << 20


def on_device(kind: str) -> tuple[nn.Module, Inputs, torch.Tensor]:
    """A model in main memory, and its answer computed on the device."""
    model, inputs, _ = made(kind)
    there = {name: value.cuda() for name, value in inputs.items()}
    wanted = answer(model.cuda(), there).cpu()
    return model.cpu(), inputs, wanted


MAPS: dict[str, dict[str, Any]] = {
    "device": {"device_map": {"": 0}},
    "from the host": {"device_map": "auto", "max_memory": {0: 14_000, "cpu": 10**9}},
    "from all": {"device_map": "auto", "max_memory": {0: 14_000, "cpu": 2_000}},
    "sequential": {"device_map": "sequential", "max_memory": {0: 16_000, "cpu": 2_000}},
}


@pytest.mark.parametrize("mapping", MAPS)
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_device(kind: str, mapping: str, tmp_path: Path) -> None:
    model, inputs, wanted = on_device(kind)
    path = saved(model, tmp_path / "model.safetensors")
    loaded = load_checkpoint_and_dispatch(empty(kind), path, **MAPS[mapping])
    for _ in range(3):
        found = answer(loaded, inputs)
        assert found.device.type == "cpu", "where the input came from"
        torch.testing.assert_close(found, wanted)
    there = {name: value.cuda() for name, value in inputs.items()}
    assert answer(loaded, there).device.type == "cuda"


def test_all_from_the_host_and_all_from_the_disk(tmp_path: Path) -> None:
    for kind in KINDS:
        model, inputs, wanted = on_device(kind)
        torch.testing.assert_close(answer(cpu_offload(model), inputs), wanted)
        model, inputs, wanted = on_device(kind)
        torch.testing.assert_close(answer(disk_offload(model, tmp_path / kind), inputs), wanted)
        assert {p.device.type for p in remove_hooks(model).parameters()} == {"cpu"}


def test_device_memory_stays_within_its_limit(tmp_path: Path) -> None:
    def stack() -> nn.Module:
        return nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(32)))

    model, x = stack(), torch.randn(4, 1024)
    path = saved(model, tmp_path / "model.safetensors")
    wanted = answer(model.cuda(), {"input": x.cuda()}).cpu()
    del model
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    limit = 20 * MEGABYTE
    with torch.device("meta"):
        hollow = stack()
    loaded = load_checkpoint_and_dispatch(hollow, path, max_memory={0: limit, "cpu": 50 * MEGABYTE})
    for _ in range(20):
        torch.testing.assert_close(answer(loaded, {"input": x}), wanted)
    activations = 12 * MEGABYTE  # and cuBLAS's workspace
    assert torch.cuda.max_memory_allocated() - before <= limit + activations
    assert {"cuda:0", "cpu", "disk"} <= set(loaded.device_map_table().split())


def test_threads_at_once(tmp_path: Path) -> None:
    model, inputs, wanted = on_device("tied")
    disk_offload(model, tmp_path)
    wrong: list[BaseException] = []

    def run() -> None:
        try:
            for _ in range(20):
                torch.testing.assert_close(answer(model, inputs), wanted)
        except BaseException as error:
            wrong.append(error)
            raise

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong


def test_layer_larger_than_the_device_may_hold_is_named() -> None:
    model, _, _ = made("tied")
    with pytest.raises(ConfigError, match=r"has to be on cuda:0 while it runs.* short"):
        dispatch_model(model, max_memory={0: 1000, "cpu": "1GB"})
