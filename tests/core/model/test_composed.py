"""Quantised weights, which are tensors made of others: the same on every rank, saved, loaded, left alone by DDP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

from nbaccel import Pipeline
from nbaccel.core.save_model import save_model
from nbaccel.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")


class Adapted(nn.Module):
    """A quantised layer and an adapter beside it."""

    def __init__(self, seed: int) -> None:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        super().__init__()
        torch.manual_seed(seed)
        self.base = nn.Linear(16, 16)
        self.adapter = nn.Linear(16, 16, bias=False)
        self.base.requires_grad_(False)
        quantize_(self.base, Int8WeightOnlyConfig())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.adapter(x)


PROBE = torch.ones(1, 16)
WITH_LOSS = {"pipeline": Pipeline(loss=nn.functional.mse_loss)}


def train_and_load(folder: str) -> dict[str, Any]:
    from nbaccel import Accelerator

    acc = Accelerator(cpu=True, verify=True)
    wrong = Adapted(0)
    wrong.base.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match="freeze quantised weights"):
        acc.prepare(wrong)
    for strategy in ("fsdp", "tensor_parallel", "pipeline"):
        with pytest.raises(ConfigError, match=r"base\.weight is a Int8Tensor.*'ddp'"):
            Accelerator(cpu=True, strategy=WITH_LOSS.get(strategy, strategy)).prepare(Adapted(0))
    automatic = Accelerator(cpu=True, strategy="auto")
    automatic.prepare(Adapted(0))
    divided = {one.why_not for one in automatic.plan.candidates if one.spread.family == "fsdp"}
    assert divided == {"quantised weights cannot be divided"}
    model: Any = Adapted(acc.process_index)  # rank 0's values count
    optimizer: Any = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = acc.prepare(model, optimizer)
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(acc.process_index))
    for _ in range(3):
        acc.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    acc.save_state(folder)
    state = acc.get_state_dict(model)
    if acc.is_main_process:
        with pytest.raises(ConfigError, match=r"base\.weight is a Int8Tensor.*save_pretrained"):
            save_model(state, folder, world=acc.world)
    fresh = Accelerator(cpu=True)
    other: Any = fresh.prepare(Adapted(7))
    fresh.prepare(torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.1))
    fresh.load_state(folder)
    base = acc.unwrap_model(model).base
    by_hand = base.weight.qdata.float() * base.weight.scale.reshape(-1, 1)
    return {
        "trained": model(PROBE).tolist(),
        "loaded": other(PROBE).tolist(),
        "base": base(PROBE).flatten().tolist(),
        "by hand": (PROBE @ by_hand.T + base.bias).flatten().tolist(),
    }


def test_quantised_weights_when_on_two_ranks_are_shared_saved_and_loaded(tmp_path: Any) -> None:
    first, second = run_ranks(train_and_load, str(tmp_path / "saved"))
    assert first["trained"] == second["trained"] == first["loaded"] == second["loaded"]
    with torch.no_grad():
        assert first["base"] == pytest.approx(Adapted(0).base(PROBE).flatten().tolist(), abs=1e-6)
    assert first["base"] == pytest.approx(first["by hand"], abs=1e-4)
