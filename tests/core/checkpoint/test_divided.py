"""A user's own object that holds DTensors, as an average of sharded weights does: every rank gets its own part back."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn

from nbaccel.core.checkpoint import Checkpoints, Contents
from nbaccel.core.world import join
from nbaccel.errors import CheckpointError


class Average:
    """Of a model's weights, by name, with something plain beside them."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        self.decay = 0.5
        self.weights = {name: value.detach() * factor for name, value in model.state_dict().items()}
        self.history = [next(iter(self.weights.values())).clone()]

    def state_dict(self) -> Any:
        return {"decay": self.decay, "weights": self.weights, "history": self.history}

    def load_state_dict(self, state: Any) -> None:
        self.decay, self.weights, self.history = state["decay"], state["weights"], state["history"]


class Opaque:
    """Holds a tensor where no one looks."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.held = {tensor}

    def state_dict(self) -> Any:
        return {"hidden": self}

    def load_state_dict(self, state: Any) -> None: ...


def model() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    if dist.is_initialized() and dist.get_world_size() > 1:
        fully_shard(made, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return made


def save(folder: str) -> str:
    world = join()
    made = model()
    checkpoints = Checkpoints(world=world)
    checkpoints.save(f"{folder}/c", Contents(shared={"average": Average(made, 2.0)}), step=1)
    opaque = Contents(shared={"opaque": Opaque(next(made.parameters()))})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoints.save(f"{folder}/d", opaque, step=1)
    except CheckpointError as error:
        return str(error)
    finally:
        checkpoints.close()
    return "was saved"


def save_and_load(folder: str) -> tuple[str, dict[str, Any]]:
    return save(folder), load(folder)


def load(folder: str) -> dict[str, Any]:
    from torch.distributed.tensor import DTensor

    world = join()
    average = Average(model(), 0.0)
    kinds = [type(value) for value in average.weights.values()]
    average.decay = 0.0
    checkpoints = Checkpoints(world=world)
    checkpoints.load(f"{folder}/c", Contents(shared={"average": average}))
    checkpoints.close()
    assert [type(value) for value in average.weights.values()] == kinds
    tensors = {**average.weights, "history": average.history[0]}
    whole = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in tensors.items()}
    return {"decay": average.decay, **whole}


@pytest.mark.timeout(120)
def test_average_of_sharded_weights_comes_back_on_each_rank_as_its_part(tmp_path: Path) -> None:
    refusals, same_ranks = zip(*run_ranks(save_and_load, str(tmp_path)), strict=True)
    for refused in refusals:
        assert "opaque" in refused
        assert "of which each rank has a part" in refused
    wanted = {name: value * 2.0 for name, value in model().state_dict().items()}
    wanted["history"] = wanted["0.weight"]
    others = [found for size in (1, 3) for found in run_ranks(load, str(tmp_path), num_processes=size)]
    for found in (*same_ranks, *others):
        assert found.pop("decay") == 0.5
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
