"""Sequences cut over ranks. torch's ring attention runs on CUDA devices only; what is around it runs everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import VOCABULARY, WIDTH, TinyLM, difference
from torch import nn

from nbaccel import FSDP, ContextParallel
from nbaccel.errors import ConfigError

pytestmark = pytest.mark.timeout(300)


class Attention(nn.Module):
    """One layer of causal attention between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4 * WIDTH)
        self.mixed = nn.Linear(4 * WIDTH, 12 * WIDTH)
        self.head = nn.Linear(4 * WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        parts = self.mixed(x).unflatten(-1, (3, 4, WIDTH)).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(*parts.unbind(0), is_causal=True)
        return self.head(x + seen.transpose(1, 2).flatten(2))


def train(strategy: Any, attention: bool, cpu: bool = True, precision: str = "no") -> dict[str, Any]:
    from nbaccel import Accelerator

    acc = Accelerator(cpu=cpu, strategy=strategy, mixed_precision=precision, verify=True)
    torch.manual_seed(3)
    model: Any = Attention() if attention else TinyLM(2)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    tokens = torch.randint(VOCABULARY, (48, 17), generator=torch.Generator().manual_seed(1))
    axis = acc.strategy.data_axis.size
    data = torch.utils.data.TensorDataset(tokens)
    loader: Any = torch.utils.data.DataLoader(data, batch_size=8 // axis)
    model, optimizer, loader = acc.prepare(model, optimizer, loader)
    found: dict[str, Any] = {"losses": [], "lengths": set(), "axis": axis}
    for (batch,) in loader:
        inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        with acc.maybe_context_parallel([inputs, targets], [1, 1], {inputs}):
            found["lengths"].add(inputs.shape[1])
            logits = model(inputs)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            acc.backward(loss)
        assert targets.shape[1] == 16  # put together again
        found["norm"] = float(acc.clip_grad_norm_(model.parameters(), 0.5))
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(acc.reduce(loss.detach(), "mean").item())
    found["state"] = {name: v.float().flatten().tolist() for name, v in acc.get_state_dict(model).items()}
    return found


def agrees(one: dict[str, Any], alone: dict[str, Any], tolerance: float) -> None:
    assert difference(one["losses"], alone["losses"]) <= tolerance
    assert abs(one["norm"] - alone["norm"]) <= 10 * tolerance
    assert (
        max(difference(one["state"][name], alone["state"][name]) for name in alone["state"]) <= 50 * tolerance
    )


def on_two_ranks() -> list[Any]:
    return [
        train(ContextParallel(size=2), False),
        train(FSDP(context_parallel=ContextParallel()), False),
        train("ddp", False),
        refusals(),
    ]


def refusals() -> list[str]:
    from nbaccel import Accelerator

    acc = Accelerator(cpu=True, strategy="context_parallel")
    said = []
    for do in (
        lambda: Accelerator(cpu=True, strategy=ContextParallel(size=3)),
        lambda: acc.maybe_context_parallel([torch.zeros(2, 6)], [1]),
        lambda: acc.maybe_context_parallel([torch.zeros(2, 8)], []),
    ):
        with pytest.raises(ConfigError) as caught:
            do()
        said.append(str(caught.value))
    return said


def test_training_when_sequences_are_cut_is_that_of_one_process() -> None:
    alone = train("single", False)
    assert alone["lengths"] == {16}
    for cut, sharded, whole, said in run_ranks(on_two_ranks):
        for one in (cut, sharded):
            agrees(one, alone, 1e-5)
            assert (one["lengths"], one["axis"]) == ({8}, 1)
        agrees(whole, alone, 1e-5)
        assert (whole["lengths"], whole["axis"]) == ({16}, 2)
        assert "a divisor" in said[0]
        assert "multiple of 4" in said[1]
        assert "one for each" in said[2]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices: ring attention is theirs")
@pytest.mark.parametrize("strategy", [ContextParallel(), FSDP(context_parallel=ContextParallel())])
def test_attention_when_sequences_are_cut_is_that_of_one_device(strategy: Any) -> None:
    alone = run_ranks(train, "single", True, False, "bf16", num_processes=1)[0]
    for one in run_ranks(train, strategy, True, False, "bf16"):
        assert one["lengths"] == {8}
        agrees(one, alone, 2e-3)
