"""Windows of several micro-steps: closures, changing their length, saving where one is not finished."""

from __future__ import annotations

import itertools

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader

from nbaccel.core import Accelerator
from nbaccel.errors import CollectiveMismatch, ConfigError


def _model():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model


def test_closure_when_windows_have_several_micro_steps_is_refused():
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [6.0]])
    for length in (1, 2):
        acc = Accelerator(cpu=True, gradient_accumulation_steps=length)
        model = _model()
        model, optimizer = acc.prepare(model, torch.optim.LBFGS(model.parameters()))

        def closure(acc=acc, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            acc.backward(loss)
            return loss

        with acc.accumulate(model):
            if length == 1:
                optimizer.step(closure)
                assert model.weight.item() == pytest.approx(3.0, abs=1e-4)
            else:
                with pytest.raises(
                    ConfigError, match=r"on rank 0 .* gradient_accumulation_steps=2: a closure"
                ):
                    optimizer.step(closure)


LENGTHS = (2, 1, 1, 3, 3, 2)


def _lengthened(how):
    """The weight after windows of `LENGTHS`, whose gradients are 1, 2, … and on rank 1 ten times that."""
    acc = Accelerator(cpu=True, gradient_accumulation_steps=LENGTHS[0])
    model = _model()
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    number = 0
    for steps, length in enumerate(LENGTHS):
        if length != acc.gradient_accumulation_steps:
            acc.gradient_accumulation_steps = length
        for micro in range(length):
            number += 1
            x = torch.tensor([[number * 10.0**acc.process_index]])
            if how == "step":
                acc.step(model(x).sum(), optimizer)
            else:
                with acc.accumulate(model):
                    acc.backward(model(x).sum())
                    optimizer.step()
                    optimizer.zero_grad()
            assert acc.sync_gradients == (micro + 1 == length)
            if not acc.sync_gradients:
                with pytest.raises(ConfigError, match="cannot be changed on rank"):
                    acc.gradient_accumulation_steps = 7
        assert acc.steps == steps + 1
    if acc.num_processes > 1:
        with pytest.raises(
            CollectiveMismatch, match=r"(?s)rank 0: .* of 4 micro-steps.*rank 1: .* of 5 micro"
        ):
            acc.gradient_accumulation_steps = 4 + acc.process_index
    return acc.unwrap_model(model).weight.item()


def _both_ways():
    return _lengthened("step"), _lengthened("accumulate")


def test_gradients_when_the_length_of_windows_is_changed():
    weight, number = 0.0, 0
    for length in LENGTHS:
        weight -= sum(range(number + 1, number + length + 1)) / length
        number += length
    assert _both_ways() == pytest.approx((weight, weight))
    ranks = run_ranks(_both_ways)
    assert ranks[0] == ranks[1] == pytest.approx((weight * 5.5, weight * 5.5))


def _in_turn():
    """Gradients of bare backwards after a loop of micro-steps, whose last batch was rank 0's alone."""
    acc = Accelerator(cpu=True)
    model, other = _model(), _model()
    model, other, optimizer, loader = acc.prepare(
        model, other, torch.optim.SGD(model.parameters(), lr=0.0), DataLoader(torch.ones(5, 1), batch_size=2)
    )
    found = []
    for how in ("accumulate", "step"):
        for batch in loader:
            if how == "step":
                acc.step(other(batch).mean(), optimizer)
            else:
                with acc.accumulate(other):
                    acc.backward(other(batch).mean())
        x = torch.tensor([[1.0 + acc.process_index]])
        for options in ({}, {"weight": 2}):
            model.zero_grad()
            acc.backward(model(x).sum(), **options)
            found.append(acc.unwrap_model(model).weight.grad.item())
    return found


def test_backward_when_it_follows_micro_steps_is_not_weighed_as_the_last():
    assert run_ranks(_in_turn) == [[1.5, 0.75] * 2] * 2


def test_backward_when_outside_the_micro_steps_of_longer_windows_is_refused():
    acc = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = acc.prepare(_model())
    with acc.accumulate(model):
        acc.backward(model(torch.ones(1, 1)).sum())
    with pytest.raises(ConfigError, match=r"backward on rank 0 stands outside .* accelerator\.accumulate"):
        acc.backward(model(torch.ones(1, 1)).sum())


SIZES = (7, 1, 3, 5, 2, 6, 4)


def _bucketed():
    """The weight after windows of four of a batch sampler's batches."""
    ends = list(itertools.accumulate(SIZES))
    buckets = [list(range(end - size, end)) for end, size in zip(ends, SIZES, strict=True)]
    acc = Accelerator(cpu=True)
    acc.gradient_accumulation_steps = 4 // acc.num_processes
    model = _model()
    model, optimizer, loader = acc.prepare(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        DataLoader(torch.arange(float(sum(SIZES)))[:, None], batch_sampler=buckets),
    )
    for x in loader:
        acc.step(model(x).mean(), optimizer)
    return acc.unwrap_model(model).weight.item()


def test_gradients_when_a_batch_sampler_gives_unequal_batches_are_means_over_samples():
    first, everyone = sum(SIZES[:4]), sum(SIZES)
    expected = -(sum(range(first)) / first + sum(range(first, everyone)) / (everyone - first))
    assert _bucketed() == pytest.approx(expected)
    assert run_ranks(_bucketed) == pytest.approx([expected] * 2)


def test_saving_when_any_window_is_not_finished_is_refused(tmp_path):
    acc = Accelerator(cpu=True, gradient_accumulation_steps=2)
    one, other = acc.prepare(_model(), _model())
    for model in (one, other, other):
        with acc.accumulate(model):
            acc.backward(model(torch.ones(1, 1)).sum())
    assert acc.sync_gradients
    with pytest.raises(ConfigError, match="middle of an accumulation window"):
        acc.save_state(tmp_path / "c")
    with acc.accumulate(one):
        acc.backward(one(torch.ones(1, 1)).sum())
    acc.save_state(tmp_path / "c")


def test_saving_when_a_loop_was_left_in_mid_window_and_gone_on_with(tmp_path):
    acc = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model = _model()
    model, optimizer, loader = acc.prepare(
        model, torch.optim.SGD(model.parameters(), lr=1.0), DataLoader(torch.ones(12, 1), batch_size=2)
    )
    for x in loader:
        acc.step(model(x).mean(), optimizer)
        break
    with pytest.raises(ConfigError, match=r"micro-step 2 of 3.* leave it \(break\) where"):
        acc.save_state(tmp_path / "c")
    for x in loader:
        acc.step(model(x).mean(), optimizer)
        if acc.sync_gradients:
            break
    assert model.weight.item() == -1.0
    acc.save_state(tmp_path / "c")


def test_scheduler_when_a_loop_was_left_in_mid_window_steps_between_passes():
    acc = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    model, optimizer, scheduler, loader = acc.prepare(
        model, optimizer, scheduler, DataLoader(torch.ones(12, 1), batch_size=2)
    )
    for epoch in range(2):
        for number, x in enumerate(loader):
            acc.step(model(x).mean(), optimizer)
            if number == 4 - epoch:
                break
        assert not acc.sync_gradients
        scheduler.step()
        assert scheduler.get_last_lr() == [0.5 ** (epoch + 1)]
    for _ in range(2):
        acc.step(model(torch.ones(1, 1)).mean(), optimizer)
        scheduler.step()
    assert scheduler.get_last_lr() == [0.25], "of batches that no prepared loader gave, still by the window"


def test_settings_when_set_later_are_used_or_refused():
    acc = Accelerator(cpu=True)
    assert not acc.even_batches
    acc.even_batches = True
    assert acc.prepare(DataLoader(torch.ones(4, 1))).even_batches
    for name, value in (("even_batches", "yes"), ("gradient_accumulation_steps", 0)):
        with pytest.raises(ConfigError, match=rf"{name} \(from accelerator\.{name} = \.\.\.\)"):
            setattr(acc, name, value)
    with pytest.raises(ConfigError, match="the window says when a step is due"):
        acc.sync_gradients = True


def test_settings_when_set_on_the_peers_accelerator_are_ours():
    from nbaccel.compat.accelerate import Accelerator as Peers

    acc = Peers(cpu=True)
    acc.gradient_accumulation_steps = 4
    assert acc.gradient_accumulation_steps == 4
    with pytest.raises(ConfigError, match="cannot be set"):
        acc.sync_gradients = True


def _weighed_apart():
    """Gradients of weighted backwards by two models, whose units are 4 on rank 0 and 2 on rank 1."""
    acc = Accelerator(cpu=True)
    model, other = acc.prepare(_model(), _model())
    x = torch.full((4 - 2 * acc.process_index, 1), 3.0)
    acc.backward(model(x).sum(), weight=len(x))
    acc.backward(model(x).sum(), weight=len(x))  # another loss: torch adds its gradients up
    acc.backward(other(x).sum(), weight=torch.tensor(2.0 * len(x)))
    return [acc.unwrap_model(one).weight.grad.item() for one in (model, other)]


def test_weights_when_given_without_accumulation_leave_what_the_gradients_held():
    assert _weighed_apart() == [6.0, 1.5]
    assert run_ranks(_weighed_apart) == [[6.0, 1.5]] * 2


@pytest.mark.parametrize("weight", ["4", torch.ones(2), 0, float("nan")])
def test_weight_when_it_is_no_number_above_0_is_refused(weight):
    acc = Accelerator(cpu=True)
    model = acc.prepare(_model())
    with pytest.raises(ConfigError, match=r"on rank 0.* (takes one number, of the units|must be above 0)"):
        acc.backward(model(torch.ones(4, 1)).sum(), weight=weight)
    assert model.weight.grad is None


def _refused_weights():
    acc = Accelerator(cpu=True)
    model, loader = acc.prepare(_model(), DataLoader([torch.ones(1)] * 3, batch_size=1))
    refused = 0
    for x in loader:
        with pytest.raises(ConfigError, match=f"on rank {acc.process_index} takes one number"):
            acc.backward(model(x).sum(), weight=str(len(x)))
        refused += 1
    return refused


def test_weight_when_it_is_text_is_refused_for_a_repeated_batch_too():
    assert run_ranks(_refused_weights) == [2, 2]  # three samples: the last one of rank 1 is a repetition


def test_weights_when_given_twice_in_a_micro_step_are_refused():
    acc = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, x = acc.prepare(_model()), torch.ones(4, 1)
    for micro in (1, 2):
        with acc.accumulate(model):
            acc.backward(model(x).sum(), weight=4)
            with pytest.raises(
                ConfigError, match=rf"twice on rank 0 in micro-step {micro} of 2: .* add two losses"
            ):
                acc.backward(model(x).sum(), weight=4)
            with pytest.raises(ConfigError, match="on rank 0 must be given for every loss of a window"):
                acc.backward(model(x).sum())
    assert model.weight.grad.item() == 1.0


def test_weights_when_their_window_would_divide_another_models_unfinished_one_are_refused():
    acc = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, other = acc.prepare(_model(), _model())
    x = torch.ones(4, 1)
    with acc.accumulate(other):
        acc.backward(other(x).mean())
    with (
        acc.accumulate(),
        pytest.raises(ConfigError, match=r"over 2 model\(s\) .* not finished\. Name the models"),
    ):
        acc.backward(model(x).sum(), weight=4)
    assert other.weight.grad.item() == 0.5
