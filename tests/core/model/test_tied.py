from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nbaccel.core.model.tied import find_tied_parameters, num_parameters, retie_parameters, same_memory


def tied_model() -> nn.Module:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=False))
    model[2].weight = model[0].weight
    return model


def test_tied_names_are_found() -> None:
    assert find_tied_parameters(tied_model()) == [["0.weight", "2.weight"]]
    assert find_tied_parameters(nn.Linear(2, 2)) == []


def test_equal_but_separate_parameters_are_not_tied() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].load_state_dict(model[0].state_dict())
    assert find_tied_parameters(model) == []


def test_shared_module_counts_as_tied() -> None:
    layer = nn.Linear(2, 2)
    assert find_tied_parameters(nn.Sequential(layer, layer)) == [
        ["0.weight", "1.weight"],
        ["0.bias", "1.bias"],
    ]


def test_broken_tie_is_mended_and_learns_as_one() -> None:
    model = tied_model()
    tied = find_tied_parameters(model)
    model[2].weight = nn.Parameter(model[0].weight.detach().clone())
    assert find_tied_parameters(model) == []
    retie_parameters(model, tied)
    assert model[2].weight is model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3
    once = copy.deepcopy(model)
    for each in (model, once):
        each(torch.tensor([1])).sum().backward()
    gradient = once[0].weight.grad.clone()
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[2].weight, before - gradient)


def test_real_memory_wins_over_meta() -> None:
    model = tied_model()
    tied = find_tied_parameters(model)
    model[0].weight = nn.Parameter(torch.empty(5, 3, device="meta"))
    model[2].weight = nn.Parameter(torch.ones(5, 3))
    retie_parameters(model, tied)
    assert model[0].weight is model[2].weight
    assert model[0].weight.sum() == 15


def test_what_cannot_be_one_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"\(3, 2\) and 1.weight \(2, 2\)"):
        retie_parameters(model, [["0.weight", "1.weight"]])
    with pytest.raises(KeyError, match=r"nowhere\.weight"):
        retie_parameters(model, [["0.weight", "nowhere.weight"]])


def test_tied_parameters_are_counted_once() -> None:
    model = tied_model()
    assert num_parameters(model) == 15 + 12
    model[1].requires_grad_(False)
    assert num_parameters(model, trainable=True) == 15


def test_views_of_different_shape_are_not_the_same() -> None:
    base = torch.arange(6.0)
    tensors = {
        "a": base,
        "b": base.view(2, 3),
        "c": base[:3],
        "d": base,
        "e": torch.empty(0),
        "f": torch.empty(0),
    }
    assert same_memory(tensors) == {"d": "a"}
