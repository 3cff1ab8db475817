"""Clipping where every rank holds all gradients: the numbers of torch."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader

from nbaccel.core import Accelerator
from nbaccel.core.strategies.base import clip_local_norm


def model(*types: torch.dtype) -> nn.Module:
    """Layers of these types with gradients, and one without."""
    torch.manual_seed(0)
    made = nn.ModuleList(nn.Linear(7, 5).to(kind) for kind in types)
    for parameter in made.parameters():
        parameter.grad = torch.randn_like(parameter)
    made.append(nn.Linear(2, 2))
    return made


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("max_norm", [0.5, 1e9])
@pytest.mark.parametrize(
    "types", [(torch.float32, torch.float32), (torch.bfloat16,), (torch.float32, torch.float64), ()]
)
def test_gradients_when_clipped_are_those_of_torch_to_the_bit(
    types: tuple[torch.dtype, ...], max_norm: float, norm_type: float
) -> None:
    ours, theirs = model(*types), model(*types)
    found = clip_local_norm(ours.parameters(), max_norm, norm_type)
    wanted = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm, norm_type)
    assert torch.equal(found, wanted)
    assert found.dtype == wanted.dtype
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)


def test_gradients_when_one_is_not_a_number_are_those_of_torch() -> None:
    ours, theirs = model(torch.float32), model(torch.float32)
    for one in (ours, theirs):
        next(one.parameters()).grad[0] = float("nan")  # type: ignore[index]
    assert clip_local_norm(ours.parameters(), 1.0, 2.0).isnan()
    nn.utils.clip_grad_norm_(theirs.parameters(), 1.0, 2.0)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_sparse_gradients_when_clipped_are_the_dense_ones(norm_type: float) -> None:
    grads, norms = [], []
    for sparse in (True, False):
        table = nn.Embedding(6, 3, sparse=sparse)
        nn.init.ones_(table.weight)
        layer = nn.Linear(3, 1, dtype=torch.float64)
        nn.init.ones_(layer.weight)
        layer(table(torch.tensor([1, 4, 1])).double()).sum().backward()
        norms.append(clip_local_norm([*table.parameters(), *layer.parameters()], 0.5, norm_type))
        assert table.weight.grad is not None
        assert table.weight.grad.is_sparse == sparse
        grads.append((table.weight.grad.to_dense(), layer.weight.grad))
    torch.testing.assert_close(norms[0].double(), norms[1].double())
    torch.testing.assert_close(*grads)


def trained(sparse: bool) -> tuple[list[float], torch.Tensor]:
    """Norms before clipping, and the table, after windows of 2 over 11 samples, the last one shorter."""
    torch.manual_seed(0)
    acc = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Embedding(10, 4, sparse=sparse), nn.Linear(4, 1))
    data = DataLoader(torch.tensor([1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1]), 2)  # type: ignore[arg-type]
    model, optimizer, loader = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), data)
    norms = []
    for x in loader:
        with acc.accumulate(model):
            acc.backward(model(x).square().mean())
            norm = acc.clip_grad_norm_(model.parameters(), 0.5)
            acc.clip_grad_value_(model.parameters(), 0.2)
            optimizer.step()
            optimizer.zero_grad()
        if norm is not None:
            norms.append(norm.item())
    return norms, acc.unwrap_model(model)[0].weight.detach()


def both() -> tuple[tuple[list[float], torch.Tensor], ...]:
    return trained(True), trained(False)


def test_sparse_embeddings_when_trained_on_ranks_become_what_dense_ones_do() -> None:
    for sparse, dense in run_ranks(both):
        assert sparse[0] == pytest.approx(dense[0], rel=1e-6)
        assert min(sparse[0]) > 0.5
        torch.testing.assert_close(sparse[1], dense[1])
