"""Activations that are computed again in backward: less is kept, and the numbers stay."""

from __future__ import annotations

import copy

import torch
from torch import nn

from nbaccel.core.model.recompute import recompute_in_backward


def stepped(block: nn.Module, x: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """Gradients, and how many numbers were kept for backward."""
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = block(x).square().mean()
    block.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in block.parameters()], sum(kept)


def test_block_when_recomputed_keeps_less_and_has_the_same_gradients() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, 8))
    plain, x, calls = copy.deepcopy(block), torch.randn(4, 8), []
    block[1].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    recompute_in_backward(block)
    recompute_in_backward(block)  # once, however often it is asked
    torch.manual_seed(1)
    expected, all_kept = stepped(plain, x)
    torch.manual_seed(1)
    gradients, kept = stepped(block, x)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))  # what was dropped, too
    assert len(calls) == 2
    assert kept < all_kept / 4
    with torch.no_grad():
        block(x)
    assert len(calls) == 3
    assert copy.deepcopy(block).forward.__func__ is nn.Sequential.forward
