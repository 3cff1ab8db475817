"""Clipping where every rank holds all gradients: the numbers of torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

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
