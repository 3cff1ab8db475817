"""Methods of the loop one by one, on one rank and on two."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nbaccel.core import Accelerator, DDPOptions, ScalerOptions
from nbaccel.core.loop.wrappers import PreparedScheduler
from nbaccel.errors import ConfigError

both = pytest.mark.parametrize("num_processes", [1, 2])


def _linear(value=1.0):
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def _through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _one_by_one():
    """Schedulers before optimizers before models, each by its own method; then all again by prepare."""
    acc = Accelerator(cpu=True)
    model = _linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    prepared = acc.prepare_scheduler(scheduler), acc.prepare_optimizer(optimizer), acc.prepare_model(model)
    again = acc.prepare(scheduler, optimizer, model)
    assert all(a is b for a, b in zip(prepared, again, strict=True))
    scheduler, optimizer, model = prepared
    for _ in range(2):
        acc.step(model(torch.ones(1, 2)).sum(), optimizer, scheduler)
    return acc.unwrap_model(model).weight.tolist(), scheduler.get_last_lr()


@both
def test_preparing_when_each_has_its_own_method(num_processes):
    assert run_ranks(_one_by_one, num_processes=num_processes) == [([[-0.5, -0.5]], [0.25])] * num_processes


def _clipped():
    acc = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = acc.prepare(_linear())
    optimizer = acc.prepare(torch.optim.SGD(model.parameters(), lr=1.0))
    seen = []
    for _ in range(2):
        with acc.accumulate(model):
            acc.backward(model(torch.tensor([[6.0, 0.25]])).sum())
            acc.clip_grad_value_(model.parameters(), 0.5)
            seen.append(acc.unwrap_model(model).weight.grad.tolist()[0])
            optimizer.step()
            optimizer.zero_grad()
    return seen


@both
def test_clip_grad_value_when_a_window_ends(num_processes):
    within, at_end = run_ranks(_clipped, num_processes=num_processes)[0]
    assert within == [3.0, 0.125], "not before the window's end"
    assert at_end == [0.5, 0.25]


def _unscaled():
    acc = Accelerator(cpu=True, mixed_precision="fp16", scaler=ScalerOptions(init_scale=256.0))
    model, optimizer = acc.prepare(_linear(), torch.optim.SGD(_linear().parameters(), lr=1.0))
    optimizer.param_groups[0]["params"] = list(model.parameters())
    acc.backward(model(torch.tensor([[2.0, 4.0]])).sum())
    weight = acc.unwrap_model(model).weight
    scaled = weight.grad.clone()
    acc.unscale_gradients()
    first = weight.grad.tolist()
    acc.unscale_gradients(optimizer)  # once per window
    return (scaled > 100).all().item(), first, weight.grad.tolist()


@both
def test_unscale_gradients_when_called_twice(num_processes):
    assert run_ranks(_unscaled, num_processes=num_processes)[0] == (True, [[2.0, 4.0]], [[2.0, 4.0]])


@pytest.mark.filterwarnings("ignore:mixed_precision='bf16' is emulated")
def test_autocast_when_a_precision_is_in_force():
    acc = Accelerator(cpu=True, mixed_precision="bf16")
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    with acc.autocast():
        assert layer(x).dtype == torch.bfloat16
        with acc.autocast(enabled=False):
            assert layer(x).dtype == torch.float32
    with Accelerator(cpu=True).autocast():
        assert layer(x).dtype == torch.float32


def _scheduled(how):
    acc = Accelerator(cpu=True, scheduler_steps=how)
    model = _linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer, scheduler = acc.prepare(
        model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    )
    for _ in range(3):
        acc.step(model(torch.ones(1, 2)).sum(), optimizer, scheduler)
    return scheduler.get_last_lr()[0]


def test_scheduler_steps_when_the_peers_rule_is_asked_for():
    found = run_ranks(lambda: [_scheduled(how) for how in ("one", "per_rank")])
    assert found == [[1 / 4, 1 / 7]] * 2


def test_schedule_that_ends_when_the_peers_rule_is_asked_for_ends_in_time():
    acc = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(_linear().parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10)
    prepared = PreparedScheduler(schedule, acc._loop, follows=False, repeat=3)
    for _ in range(5):
        optimizer.step()
        prepared.step()
    assert schedule.last_epoch == 10


def _with_options(options, accumulation):
    acc = Accelerator(cpu=True, ddp=options, gradient_accumulation_steps=accumulation)
    model = nn.Sequential(_linear(), nn.Linear(1, 1, bias=False))
    model[1].weight.data.fill_(1.0)
    model = acc.prepare(model)
    optimizer = acc.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    x = torch.full((1, 2), 1.0 + acc.process_index)
    if model.static_graph:
        with pytest.raises(ConfigError, match="no_sync cannot go with static_graph=True"):
            acc.no_sync(model)
    for _ in range(2):
        acc.step(model(x).sum(), optimizer)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), model.static_graph


def test_ddp_options_when_asked_are_used_and_change_no_number():
    asked = {
        "nothing": None,
        "static_graph": DDPOptions(static_graph=True),
        "find_unused": DDPOptions(find_unused_parameters=True),
        "buckets": DDPOptions(bucket_cap_mb=0.00001, gradient_as_bucket_view=False),
    }
    found = run_ranks(lambda: {name: _with_options(options, 1) for name, options in asked.items()})
    plain, _ = found[0]["nothing"]
    for rank in found:
        for name, (weights, static) in rank.items():
            assert torch.allclose(weights, plain, atol=1e-7), name
            assert static == (name == "static_graph")


def test_static_graph_when_accumulating_is_refused():
    with pytest.raises(AssertionError, match="static_graph=True cannot go with gradient_accumulation_steps"):
        run_ranks(_with_options, DDPOptions(static_graph=True), 2)
    with pytest.raises(ConfigError, match="comm_hook is 'int8'"):
        DDPOptions(comm_hook="int8")


def _exchanges():
    acc = Accelerator(cpu=True, measure=True)
    rank = torch.tensor([float(acc.process_index)])
    layer = _linear(acc.process_index + 5.0)
    acc.broadcast_module(layer, from_process=acc.num_processes - 1)
    listed = [acc.process_index]
    return (
        acc.gather({"r": rank})["r"].tolist(),
        acc.gather_object(acc.process_index),
        acc.reduce(rank, "mean").item(),
        acc.broadcast([rank], from_process=acc.num_processes - 1)[0].item(),
        acc.broadcast_object_list(listed),
        acc.pad_across_processes(torch.ones(1 + acc.process_index), pad_index=7).tolist(),
        acc.all_to_all(torch.arange(2 * acc.num_processes) + 10 * acc.process_index).tolist(),
        acc.scatter(torch.arange(4) if acc.is_main_process else None).tolist(),
        layer.weight.flatten().tolist(),
        acc.step_times().parts["communication"] > 0,
    )


def test_collectives_when_called_on_the_accelerator():
    alone = run_ranks(_exchanges, num_processes=1)[0]
    assert alone == (
        [0.0], [0], 0.0, 0.0, [0], [1.0], [0, 1], [0, 1, 2, 3], [5.0, 5.0], True
    )  # fmt: skip
    rank0, rank1 = run_ranks(_exchanges)
    both = [0.0, 1.0], [0, 1], 0.5, 1.0, [0]
    assert rank0 == (*both, [1.0, 7.0], [0, 1, 10, 11], [0, 1], [6.0, 6.0], True)
    assert rank1 == (*both, [1.0, 1.0], [2, 3, 12, 13], [2, 3], [6.0, 6.0], True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_step_on_a_device_adds_no_synchronisation(precision):
    acc = Accelerator(mixed_precision=precision, measure=True, verify=False, gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    loader = DataLoader(TensorDataset(torch.randn(256, 64)), batch_size=8)
    model, optimizer, loader = acc.prepare(model, optimizer, loader)
    for _ in range(2):  # the first pass warms the allocators up
        for number, (x,) in enumerate(loader):
            torch.cuda.set_sync_debug_mode("error" if number > 4 else "default")
            try:
                acc.step(model(x).square().mean(), optimizer, clip=1.0)
                acc.log({"step": acc.steps})
            finally:
                torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert acc.step_times().parts["forward"] > 0


@pytest.mark.parametrize("copied", [copy.deepcopy, _through_torch_save], ids=["deepcopy", "torch.save"])
@pytest.mark.filterwarnings("ignore:mixed_precision='bf16' is emulated")
def test_prepared_model_when_copied_is_the_plain_model(copied):
    acc = Accelerator(cpu=True, mixed_precision="bf16", measure=True)
    model = acc.prepare(_linear())
    twin = copied(model)
    nn.init.constant_(twin.weight, 2.0)
    x = torch.tensor([[1.0, 2.0**-9]])  # more digits than bf16 has
    assert model(x).tolist() == [[1.0]]
    assert twin(x).tolist() == [[2.0 + 2.0**-8]]
    assert acc.step_times().parts["forward"] > 0
