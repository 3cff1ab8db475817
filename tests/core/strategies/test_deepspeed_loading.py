"""Stage 3 of ZeRO with models that were never whole: from nothing, from files, from DeepSpeed's own zero.Init."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_fsdp_loading import MIB, Peak, build
from tiny import VOCABULARY, TinyLM

from nbaccel import DeepSpeed
from nbaccel.core.save_model import save_model
from nbaccel.core.world import single
from nbaccel.errors import CheckpointError, ConfigError
from tests.conftest import needs

pytestmark = [pytest.mark.timeout(300), needs("deepspeed")]
WIDTH, BLOCKS = 512, 12
OWN = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
TOKENS = torch.arange(24).reshape(4, 6) % VOCABULARY


def steps(model: Any, optimizer: Any, acc: Any) -> list[float]:
    """The losses of three steps on the same tokens."""
    losses = []
    for _ in range(3):
        with acc.accumulate(model):
            logits = model(TOKENS)[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())
            acc.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def prepared(model: torch.nn.Module) -> tuple[Any, Any, Any]:
    from nbaccel.core import Accelerator

    options = DeepSpeed(stage=3, leaf_modules=["Block"], prefetch_bucket_size=0, reduce_bucket_size=10**6)
    acc = Accelerator(cpu=True, strategy=options)
    return (*acc.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3)), acc)


def fill(folder: str) -> dict[str, Any]:
    """A model that starts empty, is given values, and is then loaded from files; one built under zero.Init."""
    import deepspeed

    from nbaccel.core import Accelerator

    found: dict[str, Any] = {}
    model, optimizer, acc = prepared(build(empty=True, width=WIDTH, blocks=BLOCKS))
    found["tied"] = acc.unwrap_model(model).head.weight is acc.unwrap_model(model).embedding.weight
    found["learns from nothing"] = steps(model, optimizer, acc)
    with Peak() as peak:
        acc.load_model(model, folder)
    found["above"] = peak.above
    found["loaded"] = {name: value.double().sum().item() for name, value in acc.get_state_dict(model).items()}
    try:
        acc.load_model(model, Path(folder).parent)
    except CheckpointError as error:
        found["nothing there"] = str(error)
    torch.manual_seed(acc.process_index)  # rank 0's values are everybody's
    with deepspeed.zero.Init(config_dict_or_path=OWN):
        partitioned = TinyLM(3, 16)
    again, optimizer, acc = prepared(partitioned)
    found["zero.Init"] = steps(again, optimizer, acc)
    with deepspeed.zero.Init(config_dict_or_path=OWN):
        partitioned = TinyLM(1, 16)
    acc = Accelerator(cpu=True, strategy=DeepSpeed(stage=2))
    try:
        acc.prepare(partitioned, torch.optim.AdamW(partitioned.parameters()))
    except ConfigError as error:
        found["stage 2"] = str(error)
    return found


def alone() -> list[float]:
    """The same steps in this process."""
    torch.manual_seed(0)
    model, losses = TinyLM(3, 16), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        logits = model(TOKENS)[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_model_when_never_whole_is_filled_and_trained(tmp_path: Path) -> None:
    torch.manual_seed(5)
    whole = TinyLM(BLOCKS, WIDTH)
    folder = tmp_path / "weights"
    save_model(whole.state_dict(), folder, world=single())
    largest = max(p.nbytes for p in whole.parameters())
    assert sum(p.nbytes for p in whole.parameters()) > 48 * MIB
    expected = alone()
    for one in run_ranks(fill, str(folder), num_processes=2):
        assert one["tied"]
        assert one["learns from nothing"][-1] < one["learns from nothing"][0]
        assert one["above"] < 3 * largest + 8 * MIB, f"{one['above'] / MIB:.1f} MiB"
        for name, value in whole.state_dict().items():
            assert one["loaded"][name] == pytest.approx(value.double().sum().item(), rel=1e-6)
        assert "cannot be read" in one["nothing there"]
        assert one["zero.Init"] == pytest.approx(expected, abs=1e-5)
        assert "built under zero.Init" in one["stage 2"]
        assert "DeepSpeed(stage=3)" in one["stage 2"]
