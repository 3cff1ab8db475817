"""Writers killed with SIGKILL at random moments: what is loaded afterwards is complete, and of one moment."""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import CONTEXT
from torch import nn
from torch.distributed.fsdp import fully_shard
from training import Counter

from nbaccel.core.checkpoint import Checkpoints, Contents, ModelState, OptimizerState, next_folder
from nbaccel.core.checkpoint.filesystem import LocalFileSystem
from nbaccel.core.world import join, single


def state(shards: bool = False) -> tuple[nn.Module, torch.optim.Optimizer, Counter, Contents]:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    if shards:
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    counter = Counter()
    sharded = {"model": ModelState(model), "optimizer": OptimizerState(optimizer, [model])}
    return model, optimizer, counter, Contents(sharded=sharded, shared={"counter": counter})


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [values["momentum_buffer"] for values in optimizer.state.values()]
    return [*model.parameters(), *moments]


def write_for_ever(
    folder: str, rank: int, size: int, port: int, start: int, way: str, path: list[str]
) -> None:
    """Saves again and again; every number of the state saved at step s is s."""
    sys.path[:] = path
    torch.set_num_threads(1)
    if size > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size)
        )
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
        os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    world = join()
    model, optimizer, counter, contents = state(way == "shards")
    checkpoints = Checkpoints(world=world)
    for step in range(start, start + 10_000):
        for tensor in tensors(model, optimizer):
            with torch.no_grad():
                tensor.fill_(step)
        counter.value = step
        target = Path(folder, "c")
        if way != "same folder":
            box = [next_folder(Path(folder), LocalFileSystem(), "c_")]
            if size > 1:
                dist.broadcast_object_list(box)
            target = box[0]
        checkpoints.save(target, contents, step=step, keep=2, asynchronous=way == "background")


def kill_after(folder: Path, size: int, start: int, way: str, delay: float, whole: bool) -> None:
    """Starts the writers, waits until one begins a checkpoint, or with `whole` has completed one, and a while
    longer, and kills them."""

    def listing() -> set[tuple[str, int]]:
        # A checkpoint in the same folder takes the place of the one before: another inode of that name.
        with os.scandir(folder) as entries:
            return {(one.name, one.inode()) for one in entries if not (whole and one.name.startswith("."))}

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    writers = [
        CONTEXT.Process(
            target=write_for_ever, args=(str(folder), rank, size, store.port, start, way, list(sys.path))
        )
        for rank in range(size)
    ]
    before = listing()
    for writer in writers:
        writer.start()
    try:
        deadline = time.monotonic() + 30
        while not listing() - before and time.monotonic() < deadline:
            assert all(writer.is_alive() for writer in writers)
            time.sleep(0.001)
        time.sleep(delay)
    finally:
        for writer in random.sample(writers, len(writers)):
            writer.kill()
        for writer in writers:
            writer.join()
            writer.close()


def load_newest(folder: Path, way: str) -> int:
    model, optimizer, counter, contents = state()
    checkpoints = Checkpoints(world=single())
    if way == "same folder":
        loaded = checkpoints.load(folder / "c", contents)
    else:
        found = checkpoints.newest_complete(folder)
        assert found.path is not None, found.skipped
        loaded = checkpoints.load(found.path, contents, verify=False)
    values = {value for tensor in tensors(model, optimizer) for value in tensor.unique().tolist()}
    assert values == {float(loaded.step)}
    assert counter.value == loaded.step
    return loaded.step


long = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("rounds", "size", "way"),
    [
        (8, 1, "numbered"),
        (8, 1, "same folder"),
        (8, 1, "background"),
        (3, 2, "numbered"),
        (3, 2, "background"),
        (2, 2, "shards"),
        pytest.param(25, 1, "numbered", marks=long),
        pytest.param(25, 1, "same folder", marks=long),
        pytest.param(25, 1, "background", marks=long),
        pytest.param(10, 2, "numbered", marks=long),
        pytest.param(10, 2, "background", marks=long),
        pytest.param(10, 2, "shards", marks=long),
    ],
)
def test_newest_checkpoint_is_complete_after_sigkill(
    tmp_path: Path, rounds: int, size: int, way: str
) -> None:
    chance = random.Random(len(way) + size)
    latest = 0
    model, optimizer, _, contents = state()
    for tensor in tensors(model, optimizer):
        tensor.detach().fill_(latest)
    first = tmp_path / ("c" if way == "same folder" else "c_1")
    Checkpoints(world=single()).save(first, contents, step=latest)
    remains: list[Any] = []
    for number in range(rounds):
        kill_after(tmp_path, size, latest + 1, way, chance.random() * 0.3, whole=number % 2 == 1)
        step = load_newest(tmp_path, way)
        assert step >= latest, "an older state than before the writers started"
        remains.append(sum(name.startswith(".") for name in os.listdir(tmp_path)))
        latest = step
    assert latest >= rounds // 2, "hardly anything was ever saved between two kills"
    if rounds >= 20:  # with fewer rounds luck may spare every save, on a quick disk
        assert max(remains) > 0, "no kill hit a save"
    assert max(remains) <= 3, "remains of dead writers pile up"
