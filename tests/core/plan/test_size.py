"""A model's size is the same however it is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nbaccel.core.plan import size as sizes
from nbaccel.errors import ConfigError


def test_model_is_measured_the_same_from_header_config_and_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import transformers

    small = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 100, "n_positions": 16}
    config = transformers.GPT2Config(**small)
    config.architectures = ["GPT2LMHeadModel"]
    model = transformers.GPT2LMHeadModel(config)
    expected = sum(p.numel() for p in model.parameters())  # the embedding is tied to the head
    (tmp_path / "config").mkdir()
    config.save_pretrained(tmp_path / "config")
    state = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "ours.py").write_text(
        "import transformers\nfrom torch import nn\nlinear = nn.Linear(3, 4)\nnumber = 3\n"
        f"def gpt(): return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{small}))\n"
    )
    monkeypatch.chdir(tmp_path)
    for text, source in (("config", "config"), (".", "safetensors"), ("ours:gpt", "python")):
        size = sizes.measure(text)
        assert (size.parameters, size.source) == (expected, source), text
        assert size.largest_block == sum(p.numel() for p in model.transformer.h[0].parameters())
    assert sizes.measure("ours:linear").parameters == 16
    assert sizes.measure("ours:gpt").num_blocks == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nothing", "no file or folder here"),
        ("bad.safetensors", "not a safetensors file"),
        ("config.json", "no Hugging Face configuration"),
        ("empty", "neither"),
        ("nomodule:thing", "cannot be made: ModuleNotFoundError"),
        ("json:loads", "cannot be made: TypeError"),
        ("time:time", "not a torch.nn.Module"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str):
    monkeypatch.chdir(tmp_path)
    Path("bad.safetensors").write_bytes(b"x" * 100)
    Path("config.json").write_text("{}")
    Path("empty").mkdir()
    with pytest.raises(ConfigError, match=words):
        sizes.measure(text)


def test_serving_takes_the_bytes_of_its_type():
    model = nn.Linear(100, 10, bias=False)
    model.register_buffer("scale", torch.zeros(2))
    size = sizes.size_of(model)
    assert sizes.serving_bytes(size) == {"float32": 4008, "bfloat16": 2008, "int8": 1008, "int4": 508}
