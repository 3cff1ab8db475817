"""`acc.load_model` of Hugging Face checkpoints by other names than the model's, beside `from_pretrained`."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from nbaccel import DeepSpeed

pytest.importorskip("transformers")
pytestmark = pytest.mark.timeout(180)
STRATEGIES: dict[str, Any] = {"fsdp": "fsdp"}
if importlib.util.find_spec("deepspeed"):
    STRATEGIES["zero-3"] = DeepSpeed(stage=3)


def configurations() -> dict[str, Any]:
    from transformers import BertConfig, MixtralConfig

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return {
        "BertModel": BertConfig(**small, vocab_size=20),
        "MixtralForCausalLM": MixtralConfig(
            **small, vocab_size=20, num_key_value_heads=2, num_local_experts=11
        ),
    }


def loaded(
    folder: str, strategies: dict[str, Any]
) -> tuple[dict[tuple[str, str], dict[str, torch.Tensor]], str]:
    """The weights, and what the rank has said meanwhile."""
    import transformers

    from nbaccel.core import Accelerator

    found, said = {}, io.StringIO()
    for (name, strategy), config in [((n, s), c) for n, c in configurations().items() for s in strategies]:
        acc = Accelerator(cpu=True, strategy=strategies[strategy])
        model = getattr(transformers, name)(config)
        model, _ = acc.prepare(model, torch.optim.AdamW(model.parameters()))
        with contextlib.redirect_stdout(said):
            acc.load_model(model, f"{folder}/{name}")
        found[name, strategy] = acc.get_state_dict(model)
        acc.free_memory()
    return found, said.getvalue()


def test_weights_by_other_names_are_those_of_from_pretrained(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import transformers

    from nbaccel.core import Accelerator

    wanted = {}
    for name, config in configurations().items():
        cls = getattr(transformers, name)
        torch.manual_seed(0)
        cls(config).save_pretrained(tmp_path / name)
        wanted[name] = cls.from_pretrained(tmp_path / name).state_dict()
    file = tmp_path / "BertModel/model.safetensors"
    old = {f"bert.{n.replace('LayerNorm.weight', 'LayerNorm.gamma')}": t for n, t in load_file(file).items()}
    save_file(old, file, metadata={"format": "pt"})
    compiled = torch.compile(transformers.BertModel(configurations()["BertModel"]), backend="eager")
    acc = Accelerator(cpu=True)
    acc.load_model(acc.prepare(compiled), tmp_path / "BertModel")
    assert all(torch.equal(v, wanted["BertModel"][n]) for n, v in compiled._orig_mod.state_dict().items())
    assert capfd.readouterr().out.count("gamma renamed weight") == 1
    (states, said), (_, other) = run_ranks(loaded, str(tmp_path), STRATEGIES)
    for (name, _), state in states.items():
        assert state.keys() == wanted[name].keys()
        assert all(torch.equal(state[key], value) for key, value in wanted[name].items())
    assert said.count("is read as transformers reads it: ") == 2 * len(STRATEGIES)
    assert "is read as" not in other
    assert "gamma renamed weight" in said
    assert "made into .experts.gate_up_proj" in said
