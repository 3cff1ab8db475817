"""FSDP2's paths on a CUDA device: shards there, shards in main memory, half precision, checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import VOCABULARY, TinyLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]


def on_device(folder: str) -> dict[str, Any]:
    from nbaccel import FSDP, TensorParallel
    from nbaccel.core import precision, world
    from nbaccel.core.load_model import load_model
    from nbaccel.core.offload import init_empty_weights
    from nbaccel.core.save_model import save_model
    from nbaccel.core.strategies.fsdp import FullyShardedDataParallel
    from nbaccel.core.strategies.tensor_parallel import TensorParallelism

    here = world.join()
    half = precision.choose_precision("bf16", precision.probe_hardware(here.device)).dtype
    ways: dict[str, Any] = {
        "plain": FullyShardedDataParallel(here, options=FSDP(), dtype=None),
        "offload": FullyShardedDataParallel(
            here, options=FSDP(cpu_offload=True, activation_checkpointing=True), dtype=None
        ),
        "bf16": FullyShardedDataParallel(here, options=FSDP(forward_prefetch=1), dtype=half),
        "divided": TensorParallelism(
            here, options=TensorParallel(plan={"blocks.*.up": "column", "blocks.*.down": "row"})
        ),
    }
    found: dict[str, Any] = {"device": here.device.type}
    tokens = torch.randint(VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(1)).to(here.device)
    for way, strategy in ways.items():
        torch.manual_seed(3)
        reference = TinyLM(2)
        save_model(reference.state_dict(), folder, world=here)
        with init_empty_weights():
            model = TinyLM(2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        model, (optimizer,) = strategy.wrap(model, [optimizer], place=True)
        load_model(model.state_dict(), {"head.weight": "embedding.weight"}, folder)
        losses = []
        for _ in range(5):
            logits = model(tokens)[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            strategy.backward(loss, [model], {})
            norm = strategy.clip_grad_norm(model.parameters(), 0.5, 2.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found[way] = losses
        found[f"{way} norm"] = float(norm)
        found[f"{way} places"] = {
            p.to_local().device.type for p in model.parameters() if hasattr(p, "to_local")
        }
        state = strategy.full_state_dict(model, rank_zero_only=False)
        found[f"{way} tied"] = state["head.weight"] is state["embedding.weight"]
    return found


def test_training_when_sharded_on_a_device_agrees_with_every_way(tmp_path: Any) -> None:
    for found in run_ranks(on_device, str(tmp_path), num_processes=torch.cuda.device_count()):
        assert found["device"] == "cuda"
        assert found["offload"] == pytest.approx(found["plain"], abs=1e-4)
        assert found["divided"] == pytest.approx(found["plain"], abs=1e-4)
        assert found["bf16"] == pytest.approx(found["plain"], abs=2e-2)
        assert found["bf16"] != found["plain"]
        assert (found["plain places"], found["offload places"]) == ({"cuda"}, {"cpu"})
        assert found["plain"][-1] < found["plain"][0]
        assert all(found[f"{way} tied"] for way in ("plain", "offload", "bf16", "divided"))
