from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from nbaccel import init_empty_weights, init_on_device
from nbaccel.core.model.tied import find_tied_parameters


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight


def test_parameters_have_no_memory_and_buffers_their_values() -> None:
    with init_empty_weights():
        model = Tied()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.norm.running_var.tolist() == [1.0, 1.0, 1.0]
    assert nn.Linear(1, 1).weight.device.type == "cpu", "only inside"


def test_buffers_are_empty_too_when_asked() -> None:
    with init_empty_weights(include_buffers=True):
        model = Tied()
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    assert nn.BatchNorm1d(1).running_var.device.type == "cpu"


def test_tied_parameters_stay_tied() -> None:
    with init_empty_weights():
        model = Tied()
    assert find_tied_parameters(model) == [["embed.weight", "head.weight"]]


def test_one_parameter_registered_twice_stays_one() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = nn.Parameter(torch.ones(2), requires_grad=False)
            self.first, self.second = weight, weight

    with init_empty_weights():
        model = Twice()
    assert model.first is model.second
    assert not model.first.requires_grad


def test_attributes_and_class_of_a_parameter_stay() -> None:
    class Special(nn.Parameter):
        pass

    weight = Special(torch.ones(2))
    weight.note = "kept"  # type: ignore[attr-defined]
    with init_empty_weights():
        module = nn.Module()
        module.register_parameter("weight", weight)
    assert type(module.weight) is Special
    assert module.weight.note == "kept"
    assert module.weight.device.type == "meta"


def test_lazy_parameters_are_left_alone() -> None:
    with init_empty_weights():
        module = nn.LazyLinear(3)
    assert module(torch.ones(1, 2)).shape == (1, 3)


def test_other_threads_are_not_concerned() -> None:
    made: list[nn.Linear] = []
    with init_empty_weights():
        thread = threading.Thread(target=lambda: made.append(nn.Linear(2, 2)))
        thread.start()
        thread.join(30)
    assert made[0].weight.device.type == "cpu"


def test_hooks_are_gone_when_building_fails() -> None:
    with pytest.raises(RuntimeError), init_empty_weights(include_buffers=True):
        raise RuntimeError
    assert nn.Linear(2, 2).weight.device.type == "cpu"


def test_parameters_keep_values_when_made_on_a_real_device() -> None:
    torch.manual_seed(0)
    plain = Tied()
    torch.manual_seed(0)
    with init_on_device("cpu", include_buffers=True):
        model = Tied()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_huge_model_takes_no_memory() -> None:
    with init_empty_weights(include_buffers=True):
        model = nn.Linear(10**7, 10**7)
    assert model.weight.shape == (10**7, 10**7)
