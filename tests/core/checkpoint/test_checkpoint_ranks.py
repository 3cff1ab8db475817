"""Several real ranks: one checkpoint of all, loaded on more and on fewer; what fails on one is told to all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from training import Counter, Training, same

from nbaccel.core.checkpoint import Checkpoints, Contents, ModelState, OptimizerState
from nbaccel.core.checkpoint.faults import FaultyFileSystem
from nbaccel.core.world import join, single
from nbaccel.errors import CheckpointError

WAYS = {"at once": False, "in the background": True}
"""How a checkpoint is saved: by name, whether `asynchronous`."""


def save_data_parallel(folder: str, asynchronous: bool) -> Any:
    training = Training()
    training.steps(3)
    rank = training.world.rank
    with torch.no_grad():  # as ranks drift apart within a step: rank 0's buffers are the ones that count
        training.bare[1].running_mean.add_(rank)
    checkpoints = Checkpoints(world=training.world)
    contents = training.contents
    contents = Contents(
        sharded=contents.sharded, shared=contents.shared, per_rank={"rng": Counter(rank * 10)}
    )
    for number in range(2):
        checkpoints.save(f"{folder}/c_{number}", contents, step=3, asynchronous=asynchronous)
    checkpoints.close()
    return training.numbers(), checkpoints.last.num_bytes


def load_data_parallel(folder: str) -> Any:
    training = Training(seed=4)
    training.steps(1)
    checkpoints = Checkpoints(world=training.world)
    contents, rng = training.contents, Counter(-1)
    contents = Contents(sharded=contents.sharded, shared=contents.shared, per_rank={"rng": rng})
    found = checkpoints.newest_complete(folder)
    loaded = checkpoints.load(found.path, contents, verify=False)
    checkpoints.close()
    return training.numbers(), rng.value, loaded


def test_two_replicas_are_loaded_on_one_two_and_three_ranks(tmp_path: Path) -> None:
    def save() -> Any:
        return {way: save_data_parallel(f"{tmp_path}/{way}", how) for way, how in WAYS.items()}

    def load() -> Any:
        return {way: load_data_parallel(f"{tmp_path}/{way}") for way in WAYS}

    saved, other = run_ranks(save)
    loads = {size: run_ranks(load, num_processes=size) for size in (1, 2, 3)}
    for way in WAYS:
        wanted, num_bytes = saved[way]
        assert 0.25 < num_bytes / (num_bytes + other[way][1]) < 0.75, "each replica writes a part"
        for size, ranks in loads.items():
            for rank, (numbers, rng, loaded) in enumerate(found[way] for found in ranks):
                assert loaded.path == tmp_path / way / "c_1"
                assert same(numbers, wanted), (way, size, rank)
                if size == 2:
                    assert (rng, loaded.untouched) == (rank * 10, ())
                else:
                    assert rng == -1
                    assert loaded.untouched == (
                        ("rng", f"it was saved by 2 ranks, each with its own, and {size} load it"),
                    )


def sharded_training(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def sharded_numbers(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    def full(value: Any) -> torch.Tensor:
        return value.full_tensor().clone() if hasattr(value, "full_tensor") else value.clone()

    numbers = {name: full(value) for name, value in model.state_dict().items()}
    for i, values in optimizer.state_dict()["state"].items():
        numbers.update((f"{i}.{key}", full(value)) for key, value in values.items())
    return {name: value.detach() for name, value in numbers.items()}


def train_sharded(folder: str, save: bool, asynchronous: bool = False) -> dict[str, torch.Tensor]:
    world = join()
    model, optimizer = sharded_training(0 if save else 1)
    checkpoints = Checkpoints(world=world)
    contents = Contents(sharded={"model": ModelState(model), "optimizer": OptimizerState(optimizer, [model])})
    if save:
        for _ in range(2):
            model(torch.ones(2, 5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        checkpoints.save(f"{folder}/c", contents, step=2, asynchronous=asynchronous)
    else:
        checkpoints.load(f"{folder}/c", contents)
    checkpoints.close()
    return sharded_numbers(model, optimizer)


def test_fully_sharded_state_is_loaded_on_more_and_fewer_ranks(tmp_path: Path) -> None:
    def save_and_load() -> Any:
        saved = {way: train_sharded(f"{tmp_path}/{way}", True, how) for way, how in WAYS.items()}
        return saved, load()

    def load() -> Any:
        return {way: train_sharded(f"{tmp_path}/{way}", False) for way in WAYS}

    (wanted, zero), (_, one) = run_ranks(save_and_load)
    for found in (zero, one, *run_ranks(load, num_processes=3)):
        for way in WAYS:
            assert same(found[way], wanted[way])
    # without ranks, into the bare model
    for way in WAYS:
        model, optimizer = sharded_training(2)
        sharded = {"model": ModelState(model), "optimizer": OptimizerState(optimizer, [model])}
        Checkpoints(world=single()).load(tmp_path / way / "c", Contents(sharded=sharded))
        assert same(sharded_numbers(model, optimizer), wanted[way])


def fail_on_rank_one(folder: str, asynchronous: bool) -> str:
    training = Training()
    disk = FaultyFileSystem(capacity=100 if training.world.rank == 1 else None, hides_full=True)
    good = Checkpoints(world=training.world)
    good.save(f"{folder}/c_0", training.contents, step=1)
    bad = Checkpoints(world=training.world, filesystem=disk)
    try:
        bad.save(f"{folder}/c_1", training.contents, step=2, asynchronous=asynchronous)
        bad.wait()
    except CheckpointError as error:
        good.load(f"{folder}/c_0", training.contents)
        with pytest.raises(CheckpointError, match="failed on all 2 ranks: checkpoint") as caught:
            good.load(f"{folder}/c_0", Contents())
        assert str(caught.value).count("holds more than was prepared") == 1
        good.close()
        bad.close()
        return str(error)
    return "nothing was raised"


def test_failure_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    def fail() -> Any:
        texts = [fail_on_rank_one(f"{tmp_path}/{way}", how) for way, how in WAYS.items()]
        return [*texts, hook_fails_on_rank_one(f"{tmp_path}/hook")]

    for *texts, hook in run_ranks(fail):
        for text in texts:
            assert "failed on rank 1: OSError: [Errno 28]" in text
        assert "rank 1: ValueError: only here" in hook
    for way in WAYS:
        assert [path.name for path in (tmp_path / way).iterdir()] == ["c_0"]
    assert [*tmp_path.glob("hook/*")] == []


def hook_fails_on_rank_one(folder: str) -> str:
    training = Training()

    def hook(path: Path) -> None:
        if training.world.rank == 1:
            raise ValueError("only here")

    checkpoints = Checkpoints(world=training.world)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.save(f"{folder}/c", Contents(before=(hook,)), step=0)
    checkpoints.close()
    return str(caught.value)


def train_beside_a_background_save(folder: str) -> bool:
    """Saves in the background while the training goes on with its own collectives."""
    training = Training(width=20_000)
    checkpoints = Checkpoints(world=training.world)
    training.steps(1)
    at_save = training.numbers()
    checkpoints.save(f"{folder}/c", training.contents, step=1, asynchronous=True)
    more = torch.ones(())
    while more.item():
        training.steps(1)
        more = torch.tensor(float(checkpoints.pending))  # the same decision on every rank
        dist.all_reduce(more, op=dist.ReduceOp.MAX)
    checkpoints.wait()
    training.steps(1)
    checkpoints.load(f"{folder}/c", training.contents)
    checkpoints.close()
    return same(training.numbers(), at_save)


def test_training_goes_on_while_a_save_is_written(tmp_path: Path) -> None:
    assert run_ranks(train_beside_a_background_save, str(tmp_path)) == [True, True]
