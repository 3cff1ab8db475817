"""The rest of the loop's methods on real ranks: syncing by hand, uneven inputs, saving, compiling."""

from __future__ import annotations

import copy
import functools
import os
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nbaccel.core import Accelerator
from nbaccel.errors import CheckpointError, ConfigError


def _linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(2, 1, bias=False)


def _syncing():
    acc = Accelerator(cpu=True)
    model = acc.prepare(_linear())
    weight = acc.unwrap_model(model).weight
    x = torch.full((1, 2), 1.0 + acc.process_index)
    with acc.no_sync(model):
        acc.backward(model(x).sum())
    local = weight.grad[0, 0].item()
    weight.grad = None
    with acc.no_sync(model):
        loss = model(x).sum()
    with acc.trigger_sync_in_backward(model):
        acc.backward(loss)
    return local, weight.grad[0, 0].item()


def test_gradients_when_synchronised_by_hand():
    assert run_ranks(_syncing) == [(1.0, 1.5), (2.0, 1.5)]


def _uneven():
    acc = Accelerator(cpu=True)
    model = acc.prepare(_linear())
    optimizer = acc.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    with acc.join_uneven_inputs([model]):
        for _ in range(3 + 2 * acc.process_index):
            acc.backward(model(torch.ones(1, 2)).sum())
            optimizer.step()
            optimizer.zero_grad()
        with pytest.raises(
            ConfigError, match=rf"on rank {acc.process_index} adds up the weights .* no batches left"
        ):
            acc.backward(torch.ones((), requires_grad=True), weight=1)  # a forward would count in the join
    return acc.unwrap_model(model).weight.tolist()


def test_join_uneven_inputs_when_one_rank_has_more():
    rank0, rank1 = run_ranks(_uneven)
    assert rank0 == rank1


def _save(folder):
    acc = Accelerator(cpu=True, project_dir=folder, gradient_accumulation_steps=2, keep=2)
    model = _linear()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model, optimizer = acc.prepare(model, optimizer)
    box = Counter()
    acc.register_for_checkpointing(box)
    seen = []
    handle = acc.register_save_state_pre_hook(
        lambda models, weights, path: seen.append((len(models), len(weights), Path(path).exists()))
    )
    refusals = 0
    for _ in range(6):
        with acc.accumulate(model):
            acc.backward(model(torch.ones(1, 2)).sum())
            optimizer.step()
            optimizer.zero_grad()
        box.value += 1
        if acc.sync_gradients:
            acc.save_state()
        else:
            with pytest.raises(ConfigError, match="middle of an accumulation window"):
                acc.save_state()
            refusals += 1
    handle.remove()
    acc.end_training()
    return acc.steps, box.value, refusals, seen, acc.unwrap_model(model).weight.detach()


class Counter:
    value = 0

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def _load(folder, size):
    acc = Accelerator(cpu=True, project_dir=folder)
    torch.manual_seed(9)
    model = nn.Linear(size, 1, bias=False)
    model, optimizer = acc.prepare(model, torch.optim.Adam(model.parameters(), lr=0.5))
    box = Counter()
    acc.register_for_checkpointing(box)
    try:
        loaded = acc.load_state()
    except CheckpointError as error:
        return str(error)
    weight = acc.unwrap_model(model).weight.detach()
    return acc.steps, box.value, loaded.world_size, optimizer.param_groups[0]["lr"], weight


def test_state_when_saved_on_two_and_loaded_on_others(tmp_path):
    (steps, value, refusals, seen, weight), _ = run_ranks(_save, str(tmp_path))
    assert (steps, value, refusals) == (3, 6, 3)
    assert seen == [(1, 1, True)] * 3
    assert len([p for p in tmp_path.iterdir() if p.is_dir() and not p.name.startswith(".")]) == 2, "keep=2"
    for num_processes in (1, 3):
        for loaded in run_ranks(_load, str(tmp_path), 2, num_processes=num_processes):
            assert loaded[:4] == (3, 6, 2, 0.1)
            assert torch.equal(loaded[4], weight)


def test_load_when_it_is_another_models(tmp_path):
    run_ranks(_save, str(tmp_path))
    for text in run_ranks(_load, str(tmp_path), 5):
        assert "weight is (1, 2) in the checkpoint and (1, 5) in the model" in text


def test_load_when_there_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        Accelerator(cpu=True, project_dir=tmp_path).load_state()
    with pytest.raises(ConfigError, match="project_dir"):
        Accelerator(cpu=True).save_state()


def _own_way(folder, fails=None):
    """As diffusers does it: hooks save and load the adapter themselves."""
    acc = Accelerator(cpu=True, project_dir=folder)
    base, adapter = _linear(1), _linear(2)
    base, adapter = acc.prepare(base, adapter)

    def save(models, weights, path):
        if fails == acc.process_index:
            raise OSError("no")
        if acc.is_main_process:
            torch.save(weights.pop(), f"{path}/adapter.pt")

    def load(models, path):
        acc.unwrap_model(models.pop()).weight.data = torch.load(f"{path}/adapter.pt").popitem()[1] + 1

    acc.register_save_state_pre_hook(save)
    acc.register_load_state_pre_hook(load)
    try:
        path = acc.save_state()
    except (CheckpointError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    before = acc.unwrap_model(adapter).weight.tolist()[0]
    acc.unwrap_model(base).weight.data.zero_()
    acc.load_state()
    names = {n for f in sorted(Path(path).glob("*.safetensors")) for n in safetensors_names(f)}
    after = acc.unwrap_model(adapter).weight.tolist()[0]
    return (
        names,
        [a - b for a, b in zip(after, before, strict=True)],
        acc.unwrap_model(base).weight.any().item(),
    )


def safetensors_names(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return list(file.keys())


def test_hooks_when_they_save_and_load_a_model_themselves(tmp_path):
    for names, difference, base in run_ranks(_own_way, str(tmp_path)):
        assert names
        assert not any("model_1" in name for name in names)
        assert difference == pytest.approx([1, 1])
        assert base, "the other model came back by itself"


def test_hooks_when_one_fails_on_one_rank_fail_the_save_on_all(tmp_path):
    rank0, rank1 = run_ranks(_own_way, str(tmp_path), 1)
    assert "rank 1: OSError: no" in rank0
    assert "rank 1: OSError: no" in rank1
    assert list(tmp_path.iterdir()) == []


def test_registering_when_it_has_no_state():
    with pytest.raises(ConfigError, match="a int cannot be registered"):
        Accelerator(cpu=True).register_for_checkpointing(3)


def test_free_memory_when_done():
    acc = Accelerator(cpu=True, measure=True)
    model = acc.prepare(_linear())
    assert "forward" in model.__dict__
    assert acc.free_memory(model, 1) == [None, None]
    assert "forward" not in model.__dict__
    assert acc.prepare(model) is model


def _evaluate_inside():
    """An evaluation in the middle of training gets all its batches and disturbs nothing."""
    acc = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model = _linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = TensorDataset(torch.arange(44.0).reshape(22, 2) / 44)
    model, optimizer, loader, inner = acc.prepare(
        model, optimizer, DataLoader(data, batch_size=2), DataLoader(data, batch_size=4)
    )
    seen = []
    for number, (x,) in enumerate(loader):
        with acc.accumulate(model):
            acc.backward(model(x).mean())
            optimizer.step()
            optimizer.zero_grad()
        if number == 1:
            for (y,) in inner:
                seen += acc.gather_for_metrics(y[:, 0]).tolist()
    return acc.steps, sorted(seen), acc.unwrap_model(model).weight.tolist()


def test_evaluation_when_in_the_middle_of_a_window():
    rank0, rank1 = run_ranks(_evaluate_inside)
    assert rank0 == rank1
    assert rank0[0] == 2  # 6 batches a rank, in windows of 3
    assert rank0[1] == pytest.approx([i * 2 / 44 for i in range(22)])


def _compiled(backend):
    """One graph, with the gradients that are those of the plain model; what was compiled or taken from the cache."""
    from torch._dynamo.utils import counters

    torch.compile = functools.partial(torch.compile, backend=backend)
    torch.manual_seed(0)
    acc = Accelerator(cpu=True, compile=True, measure=True)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    plain = copy.deepcopy(model)
    model = acc.prepare(model)
    from torch._inductor import config as inductor

    # All three are for larger models: headers compiled once for all kernels, trials of a compiler with wide
    # registers, a pool of processes.
    inductor.cpp_cache_precompile_headers = False
    inductor.cpp.vec_isa_ok = False
    inductor.compile_threads = 1
    x = torch.ones(3, 4) * (1 + acc.process_index)
    out, expected = model(x), plain(x)
    acc.backward(out.sum())
    expected.sum().backward()
    assert torch.allclose(out, expected, atol=1e-6)
    grad = acc.unwrap_model(model)[0].weight.grad
    assert torch.allclose(grad, acc.reduce(plain[0].weight.grad, reduction="mean"), atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1
    assert acc.step_times().parts["forward"] > 0
    found = {**counters["aot_autograd"], **counters["inductor"]}
    names = ("autograd_cache_miss", "autograd_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_hit")
    return [found.get(name, 0) for name in names], os.environ["TORCHINDUCTOR_CACHE_DIR"]


@pytest.mark.slow
def test_compile_when_asked_on_two_ranks():
    run_ranks(_compiled, "aot_eager")  # without the C++, which one rank shows below


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_compile_when_launched_again_takes_what_the_first_launch_compiled(tmp_path, clean, monkeypatch):
    from nbaccel import notebook_launcher

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    launches = [
        notebook_launcher(_compiled, ("inductor",), num_processes=1, device="cpu")[0] for _ in range(2)
    ]
    assert {folder for _, folder in launches} == {str(tmp_path / "nbaccel" / "inductor")}
    (missed, hit, graphs_missed, graphs_hit), (missed_later, hit_later, graphs_missed_later, _) = (
        counts for counts, _ in launches
    )
    assert (missed, hit) == (1, 0)
    assert graphs_missed > 0
    assert graphs_hit == 0
    assert (missed_later, hit_later, graphs_missed_later) == (0, 1, 0)


class _Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x):
        return self.norm(x)


@pytest.mark.parametrize("drop_last", [False, True])
def test_batch_norm_when_the_last_batch_has_one_sample(drop_last):
    acc = Accelerator(cpu=True, verify=False, measure=False)
    data = DataLoader(TensorDataset(torch.ones(9, 2)), batch_size=4, drop_last=drop_last)
    model, loader = acc.prepare(_Normed(), data)

    def train():
        for (x,) in loader:
            copy.deepcopy(model)
            acc.backward(model(x).sum())

    if drop_last:
        train()
    else:
        with pytest.raises(ValueError, match="more than 1 value per channel") as caught:
            train()
        assert str(caught.value).count("drop_last=True") == 1
    assert not model._forward_hooks
