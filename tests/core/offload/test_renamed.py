"""Checkpoints by other names than the model's, beside transformers' own way of loading them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nbaccel import init_empty_weights, load_checkpoint_and_dispatch
from nbaccel.errors import CheckpointError

transformers: Any = pytest.importorskip("transformers")

_SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
_BERT = transformers.BertConfig(**_SMALL, vocab_size=20)
_GPT2 = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, bos_token_id=0, eos_token_id=0)
_MIXTRAL = transformers.MixtralConfig(**_SMALL, vocab_size=20, num_key_value_heads=2, num_local_experts=11)


def _saved(cls: Any, config: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    cls(config).save_pretrained(folder)
    return folder


def _rename(folder: Path, change: Callable[[str], str]) -> None:
    path = folder / "model.safetensors"
    save_file({change(name): t for name, t in load_file(path).items()}, path, metadata={"format": "pt"})


def _old(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def _same(name: str) -> str:
    return name


def _check(cls: Any, config: Any, folder: Path, place: str) -> None:
    """The answers are those of the model that `from_pretrained` makes."""
    wanted = cls.from_pretrained(folder).eval()
    with init_empty_weights():
        empty = cls(config).eval()
    loaded = load_checkpoint_and_dispatch(empty, folder, {"": place})
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad():
        assert torch.equal(loaded(ids)[0], wanted(ids)[0])


@pytest.mark.filterwarnings("ignore:.*has tensors the model does not have. (classifier|lm_head)")
@pytest.mark.parametrize(
    ("saved", "loaded", "config", "change", "said"),
    [
        ("BertForSequenceClassification", "BertModel", _BERT, _old, "bert. taken off"),
        ("BertForMaskedLM", "BertForMaskedLM", _BERT, _old, "gamma renamed weight"),
        ("GPT2Model", "GPT2LMHeadModel", _GPT2, _same, "transformer. put before"),
        ("MixtralForCausalLM", "MixtralForCausalLM", _MIXTRAL, _same, "made into .experts.gate_up_proj"),
        ("MixtralForCausalLM", "MixtralModel", _MIXTRAL, _same, "block_sparse_moe renamed mlp"),
    ],
)
def test_checkpoint_by_other_names_is_what_from_pretrained_loads(
    saved: str,
    loaded: str,
    config: Any,
    change: Callable[[str], str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _rename(_saved(getattr(transformers, saved), config, tmp_path), change)
    for place in ("cpu", "disk"):
        _check(getattr(transformers, loaded), config, tmp_path, place)
    assert said in capsys.readouterr().out


def test_checkpoint_by_the_models_own_names_says_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _check(transformers.BertModel, _BERT, _saved(transformers.BertModel, _BERT, tmp_path), "disk")
    assert "is read as" not in capsys.readouterr().out


def test_names_that_transformers_4_renames_are_those_of_its_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _rename(_saved(transformers.BertModel, _BERT, tmp_path), lambda name: f"old.{_old(name)}")
    with init_empty_weights():
        empty = transformers.BertModel(_BERT)
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    monkeypatch.setattr(type(empty), "_checkpoint_conversion_mapping", {r"^old\.": ""}, raising=False)
    loaded = load_checkpoint_and_dispatch(empty, tmp_path, {"": "cpu"})
    assert all(not parameter.is_meta for parameter in loaded.parameters())


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    _saved(transformers.BertModel, _BERT, tmp_path)
    path, key = tmp_path / "model.safetensors", "embeddings.LayerNorm.weight"
    tensors = load_file(path)
    save_file({**tensors, f"bert.{key}": torch.ones(16)}, path)
    with init_empty_weights():
        empty = transformers.BertModel(_BERT)
    with pytest.raises(CheckpointError, match=rf"bert\.{key} and {key} are both {key} in this BertModel"):
        load_checkpoint_and_dispatch(empty, tmp_path, {"": "cpu"})


def test_experts_of_which_one_is_missing_are_refused(tmp_path: Path) -> None:
    _saved(transformers.MixtralForCausalLM, _MIXTRAL, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    gone = "model.layers.0.block_sparse_moe.experts.7.w3.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, path)
    with init_empty_weights():
        empty = transformers.MixtralForCausalLM(_MIXTRAL)
    with pytest.raises(CheckpointError, match=r"gate_up_proj (cannot be made of|is )"):
        load_checkpoint_and_dispatch(empty, tmp_path, {"": "cpu"})
