"""A checkpoint of several ranks becomes one model's safetensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nbaccel.core.merge import merge
from nbaccel.errors import CheckpointError


def save(folder: str, num_models: int) -> dict[str, torch.Tensor]:
    """A checkpoint with tied weights; the state of the first model."""
    from torch import nn

    from nbaccel.core import Accelerator

    acc = Accelerator(cpu=True, project_dir=folder, seed=1)
    models = []
    for _ in range(num_models):
        model = nn.ModuleDict(
            {"a": nn.Linear(5, 5, bias=False), "b": nn.Linear(5, 5), "n": nn.BatchNorm1d(5)}
        )
        model["b"].weight = model["a"].weight
        models.append(model)
    acc.prepare(*models)
    acc.save_state()
    acc.save_state()
    return models[0].state_dict()


@pytest.fixture(scope="module")
def checkpoints(warm: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A project with two checkpoints of 2 ranks."""
    from nbaccel import notebook_launcher

    folder = tmp_path_factory.mktemp("project")
    options = {"num_processes": 2, "device": "cpu", "folder": False, "returns": "rank0", "output": "none"}
    return folder, notebook_launcher(save, (str(folder), 1), **options)[0]


def test_merged_model_is_the_one_saved(checkpoints, tmp_path: Path):
    project, state = checkpoints
    done = merge(project, tmp_path)
    assert (done.world_size, done.model, done.num_tensors) == (2, "model_0", len(state) - 1)
    assert done.checkpoint.name.endswith("1")  # the newest
    merged = load_file(done.files[0])
    kept = {name: merged[name] for name in merged}
    assert set(state) - set(kept) in ({"a.weight"}, {"b.weight"})  # tied: written once
    for name, tensor in kept.items():
        assert torch.equal(tensor, state[name]), name


def test_merged_model_is_cut_into_shards_when_asked(checkpoints, tmp_path: Path):
    done = merge(checkpoints[0], tmp_path, max_shard_size=120)
    assert len(done.files) > 1
    assert (tmp_path / "model.safetensors.index.json").exists()


def test_damaged_checkpoint_is_refused_by_name(checkpoints, tmp_path: Path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(merge(checkpoints[0], tmp_path / "out").checkpoint, copy)
    shard = copy / "shards-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"shards-00000\.safetensors is damaged"):
        merge(copy, tmp_path / "never")
    assert not (tmp_path / "never").exists()
    (copy / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        merge(copy, tmp_path / "never")
    with pytest.raises(CheckpointError, match="is not there"):
        merge(tmp_path / "nothing", tmp_path / "never")


def test_model_must_be_named_when_there_are_several(checkpoints, tmp_path: Path):
    from nbaccel import notebook_launcher

    options = {"num_processes": 1, "device": "cpu", "folder": False, "returns": "none"}
    notebook_launcher(save, (str(tmp_path / "two"), 2), **options)
    with pytest.raises(CheckpointError, match="model_0, model_1: name one"):
        merge(tmp_path / "two", tmp_path / "out")
    assert merge(tmp_path / "two", tmp_path / "out", model="model_1").model == "model_1"
    with pytest.raises(CheckpointError, match="has no model_7"):
        merge(tmp_path / "two", tmp_path / "out", model="model_7")
