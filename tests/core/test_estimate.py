"""The memory that is estimated is the memory that training holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import nn

from nbaccel.core import estimate
from nbaccel.errors import ConfigError


def held(num_processes: int, kind: str) -> tuple[int, int]:
    """Bytes of parameters, gradients and optimizer state in a rank after a step; the model's parameters."""
    import torch
    from torch import nn

    from nbaccel.core import Accelerator

    acc = Accelerator(cpu=True)
    model = nn.Sequential(nn.Linear(200, 300), nn.BatchNorm1d(300), nn.Linear(300, 10))
    optimizers = {
        "adamw": lambda p: torch.optim.AdamW(p),
        "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    }
    optimizer = optimizers[kind](model.parameters())
    prepared, wrapped = acc.prepare(model, optimizer)
    acc.backward(prepared(torch.randn(4, 200)).sum())
    wrapped.step()
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    tensors += [v for state in optimizer.state.values() for v in state.values() if v.numel() > 1]
    return sum(t.nbytes for t in tensors), sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "momentum", "sgd"])
def test_estimate_is_what_two_ranks_hold(clean, optimizer: str):
    from nbaccel import notebook_launcher

    values = notebook_launcher(held, (2, optimizer), num_processes=2, device="cpu", folder=False)
    model = nn.Sequential(nn.Linear(200, 300), nn.BatchNorm1d(300), nn.Linear(300, 10))
    size = estimate._from_module("m", "python", model)
    (ddp, *_) = estimate.training_memory(size, num_processes=2, optimizer=optimizer)
    assert (ddp.strategy, ddp.built) == ("ddp", True)
    for total, parameters in values:
        assert parameters == size.parameters
        assert ddp.total == pytest.approx(total, rel=0.01)


def test_shares_of_sharded_strategies_are_those_of_the_paper():
    size = estimate.Size(
        name="m", source="python", parameters=1000, trainable=1000, buffer_bytes=0, largest_layer=100
    )
    rows = {row.strategy: row for row in estimate.training_memory(size, num_processes=4)}
    assert rows["ddp"].total == 16_000
    assert rows["zero-1"].total == 4000 + 4000 + 8000 // 4
    assert rows["zero-2"].total == 4000 + 4000 // 4 + 8000 // 4
    assert rows["fsdp, zero-3"].total == 16_000 // 4 + 4 * 100
    assert not any(row.built for name, row in rows.items() if name != "ddp")
    (alone,) = estimate.training_memory(size, num_processes=1, mixed_precision="bf16")
    assert alone.weights == 4000 + 2000


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
        size = estimate.measure(text)
        assert (size.parameters, size.source) == (expected, source), text
        assert size.largest_layer == sum(p.numel() for p in model.transformer.h[0].parameters())
    assert estimate.measure("ours:linear").parameters == 16


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
        estimate.measure(text)


def test_serving_takes_the_bytes_of_its_type():
    size = estimate.Size(
        name="m", source="python", parameters=1000, trainable=0, buffer_bytes=8, largest_layer=1
    )
    assert estimate.serving_bytes(size) == {"float32": 4008, "bfloat16": 2008, "int8": 1008, "int4": 508}
