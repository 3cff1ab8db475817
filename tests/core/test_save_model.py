from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nbaccel.core.checkpoint.faults import FaultyFileSystem
from nbaccel.core.save_model import byte_count, save_model, split
from nbaccel.core.world import World, single
from nbaccel.errors import CheckpointError, ConfigError

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def test_state_is_written_as_one_file_and_read_back(tmp_path: Path) -> None:
    state = {"a.weight": torch.randn(3, 4), "a.bias": torch.zeros(3, dtype=torch.bfloat16)}
    files = save_model(state, tmp_path, world=single())
    assert files == [tmp_path / "model.safetensors"]
    found = load_file(files[0])
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_large_state_is_split_with_an_index(tmp_path: Path) -> None:
    state = {f"{i}": torch.full((100,), float(i)) for i in range(5)}
    files = save_model(state, tmp_path, world=single(), max_shard_size=900)
    assert [file.name for file in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000
    for name, tensor in state.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)
    save_model(state, tmp_path, world=single())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    (file,) = save_model({"a": weight, "b": weight}, tmp_path, world=single())
    assert list(load_file(file)) == ["a"]


@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
def test_transformers_loads_what_was_saved(tmp_path: Path, max_shard_size: str) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    config.save_pretrained(tmp_path)
    files = save_model(model.state_dict(), tmp_path, world=single(), max_shard_size=max_shard_size)
    assert (len(files) > 1) == (max_shard_size == "20KB")
    loaded, info = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = torch.arange(8)[None]
    assert torch.equal(loaded.eval()(tokens).logits, model(tokens).logits)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    world = World(rank=1, local_rank=1, size=2, local_size=2, device=torch.device("cpu"), backend="gloo")
    assert save_model({"a": torch.ones(1)}, tmp_path, world=world) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("hides_full", [False, True])
def test_full_disk_leaves_the_model_that_was_there(tmp_path: Path, hides_full: bool) -> None:
    save_model({"a": torch.ones(3)}, tmp_path, world=single())
    full = FaultyFileSystem(capacity=3000, hides_full=hides_full)
    state = {str(i): torch.zeros(500) for i in range(4)}
    with pytest.raises(CheckpointError, match="could not save the model"):
        save_model(state, tmp_path, world=single(), max_shard_size=2500, filesystem=full)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert load_file(tmp_path / "model.safetensors")["a"].tolist() == [1, 1, 1]


def test_larger_tensor_than_a_file_may_be_gets_its_own() -> None:
    tensors = {"a": torch.zeros(1), "b": torch.zeros(100), "c": torch.zeros(1)}
    assert [list(shard) for shard in split(tensors, 16)] == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize(
    ("text", "count"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), (10, 10), ("7kb", 7000)]
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert byte_count(text) == count


@pytest.mark.parametrize("text", ["five", "", "-1", "5XB", "0", "3iB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="max_shard_size"):
        byte_count(text)
