"""Layers frozen and unfrozen between passes train as in one process, or the strategy says that it cannot follow."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import VOCABULARY, TinyLM
from torch.utils.data import DataLoader, TensorDataset

from nbaccel import FSDP, DDPOptions, DeepSpeed, TensorParallel
from nbaccel.core import Accelerator
from nbaccel.errors import ConfigError

TOKENS = torch.randint(VOCABULARY, (16, 6), generator=torch.Generator().manual_seed(3))
LEARNING = (("embedding",), ("embedding", "blocks.2"), ("blocks.2", "blocks.1"), ("",))
"""What learns in each pass: the output first, then more from the end, once without what learned before."""
FOLLOWING: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "ddp without buffers": {"strategy": "ddp", "ddp": DDPOptions(broadcast_buffers=False)},
    "ddp, a static graph": {"strategy": "ddp", "ddp": DDPOptions(static_graph=True)},
    "full shard": {"strategy": FSDP(wrap="Block")},
    "grad op": {"strategy": FSDP(sharding="shard_grad_op", wrap="Block")},
    "divided": {"strategy": TensorParallel(plan={"blocks.*.up": "column", "blocks.*.down": "row"})},
}


def train(options: dict[str, Any]) -> dict[str, torch.Tensor]:
    acc = Accelerator(cpu=True, **options)
    torch.manual_seed(7)
    model: Any = TinyLM()
    learn(model, LEARNING[0])
    data = DataLoader(TensorDataset(TOKENS), batch_size=4 // acc.strategy.data_axis.size)
    model, optimizer, loader = acc.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01), data)
    for learning in LEARNING:
        learn(acc.unwrap_model(model), learning)
        for (tokens,) in loader:
            logits = model(tokens)[:, :-1]
            acc.backward(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
            optimizer.step()
            optimizer.zero_grad()
    return {name: tensor.float() for name, tensor in acc.get_state_dict(model).items()}


def learn(model: torch.nn.Module, beginnings: tuple[str, ...]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(beginnings))


def on_two(ways: dict[str, dict[str, Any]]) -> dict[str, dict[str, torch.Tensor]]:
    return {way: train(options) for way, options in ways.items()}


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    return run_ranks(train, {"strategy": "single"}, num_processes=1)[0]


@pytest.fixture(scope="module")
def two() -> list[dict[str, dict[str, torch.Tensor]]]:
    return run_ranks(on_two, FOLLOWING)


@pytest.mark.parametrize("way", FOLLOWING)
def test_layers_when_unfrozen_between_passes_train_on_all_ranks(way: str, alone: Any, two: Any) -> None:
    for told in two:
        for name, weight in alone.items():
            assert (told[way][name] - weight).abs().max() <= 2e-5, name


def test_adapter_when_put_in_between_passes_is_averaged() -> None:
    def adapted() -> list[bool]:
        acc = Accelerator(cpu=True, strategy="ddp")
        model, loader = acc.prepare(torch.nn.Sequential(torch.nn.Linear(3, 1)), DataLoader(torch.ones(8, 3)))
        acc.unwrap_model(model).append(torch.nn.Linear(1, 1))
        for batch in loader:
            acc.backward(model(batch * acc.process_index).sum())
        grads = acc.gather(torch.cat([p.grad.flatten() for p in model.parameters()])[None])
        return [bool(row.equal(grads[0])) for row in grads]

    assert run_ranks(adapted) == [[True, True]] * 2


@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed")
def test_layers_when_unfrozen_under_zero_are_refused() -> None:
    def refused() -> list[str]:
        said = []
        for stage in (1, 3):
            with pytest.raises(ConfigError) as caught:
                train({"strategy": DeepSpeed(stage=stage)})
            said.append(str(caught.value))
        return said

    for said in run_ranks(refused):
        for told in said:
            assert told.startswith("'blocks.2.norm.weight' and 5 more learned when the model was prepared")


def test_model_when_nothing_of_it_learned_is_to_be_prepared_again() -> None:
    def awakened() -> tuple[str, bool]:
        acc = Accelerator(cpu=True)
        model, loader = acc.prepare(torch.nn.Linear(3, 1).requires_grad_(False), DataLoader(torch.ones(8, 3)))
        model.requires_grad_(True)
        with pytest.raises(ConfigError) as caught:
            next(iter(loader))
        acc.free_memory()
        again, loader = acc.prepare(model, DataLoader(torch.ones(8, 3)))
        for batch in loader:
            acc.backward(again(batch * acc.process_index).sum())
        return str(caught.value), bool(again.module.weight.grad.eq(4 * 0.5).all())

    for message, averaged in run_ranks(awakened):
        assert "nothing of this model did" in message
        assert "free_memory" in message
        assert averaged
