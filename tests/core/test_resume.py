"""A resumed run is the uninterrupted one, bit for bit."""

from __future__ import annotations

import itertools
import os
import random

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, Dataset

from nbaccel.core import Accelerator
from nbaccel.errors import CheckpointError, ConfigError

WORKERS = (0, 2)
TOTAL, BATCH, EPOCHS = 23, 3, 2  # on two ranks: 4 batches an epoch, the last one shorter


class Augmented(Dataset):
    """Samples with noise from every generator a data set may draw from."""

    def __len__(self):
        return TOTAL

    def __getitem__(self, index):
        noise = torch.rand(()).item() + random.random() + float(np.random.rand())
        return torch.full((4,), float(index)) / TOTAL + noise


def _run(folder, seed, workers, stop_at):
    """Trains, with a break after `stop_at` steps; the weights' bits and what each generator gives next."""
    rank = int(os.environ["RANK"])
    for seeded in (torch.manual_seed, random.seed, np.random.seed):
        seeded(100 * seed + rank)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 1))
    acc = Accelerator(
        cpu=True, seed=None, project_dir=folder, resume="auto", per_sample_seed=bool(workers) or None
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(Augmented(), BATCH, shuffle=True, num_workers=workers, generator=generator)
    model, optimizer, loader, scheduler = acc.prepare(model, optimizer, loader, scheduler)
    for _ in range(EPOCHS):
        for x in loader:
            loss = (model(x) ** 2).mean() + torch.rand(())
            acc.step(loss, optimizer, scheduler, clip=1.0)
            if acc.steps == stop_at:
                acc.save_state()
                return None
    state = acc.get_state_dict(model)
    drawn = torch.rand(3).tolist(), random.random(), np.random.rand()
    return {name: value.clone() for name, value in state.items()}, drawn, acc.steps, scheduler.get_last_lr()


def _uninterrupted_and_broken(folder):
    for workers in WORKERS:
        # In the second epoch.
        assert _run(folder / f"broken {workers}", 1, workers, stop_at=6) is None
    return [_run(folder / f"whole {workers}", 1, workers, stop_at=None) for workers in WORKERS]


def _resumed(folder):
    return [_run(folder / f"broken {workers}", 2, workers, stop_at=None) for workers in WORKERS]


def test_run_when_resumed_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    whole = run_ranks(_uninterrupted_and_broken, tmp_path)
    resumed = run_ranks(_resumed, tmp_path)
    for rank in range(2):
        for expected, found in zip(whole[rank], resumed[rank], strict=True):
            assert found[1:] == expected[1:]
            assert found[2] == EPOCHS * 4
            assert all(torch.equal(found[0][name], value) for name, value in expected[0].items())
    assert whole[0][0][1] != whole[1][0][1], "each rank has a state of its own"


def _stepped(folder, **options):
    acc = Accelerator(cpu=True, project_dir=folder, **options)
    model = nn.Linear(2, 1)
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        acc.step(model(torch.ones(1, 2)).sum(), optimizer)
    return acc


def test_resume_when_nothing_acts_on_it_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"resume='/nowhere' was asked on rank 0, .* is not there"):
        Accelerator(cpu=True, resume="/nowhere")
    with pytest.raises(ConfigError, match=r"resume='auto' was asked on rank 0, and there is no project_dir"):
        Accelerator(cpu=True, resume="auto")
    saved = _stepped(tmp_path, resume="auto").save_state()
    for where in ("auto", saved):
        with pytest.warns(UserWarning, match=f"resume='{where}' was asked, .* Prepare the loader") as told:
            _stepped(tmp_path, resume=where)
        assert len(told) == 1


def test_load_when_less_was_prepared_than_saved(tmp_path):
    saved = _stepped(tmp_path).save_state()
    acc = Accelerator(cpu=True)
    model = acc.prepare(nn.Linear(2, 1))
    with pytest.raises(
        CheckpointError, match=r"holds more than was prepared: .*: optimizer_0\. .*strict=False"
    ):
        acc.load_state(saved)
    acc.load_state(saved, strict=False)
    assert model.weight.tolist() != nn.Linear(2, 1).weight.tolist()
    for other, words in ((nn.Linear(3, 1), r"weight is \(1, 2\) in"), (nn.Linear(2, 1, bias=False), "bias")):
        acc = Accelerator(cpu=True)
        acc.prepare(other)
        for strict in (True, False):
            with pytest.raises(
                CheckpointError, match=f"model_0: this is another model's checkpoint: .*{words}"
            ):
                acc.load_state(saved, strict=strict)


def _by_epoch(folder, stop):
    """Trains with a scheduler and an evaluation per epoch, up to `stop` (an optimizer step, and where in its epoch);
    the rates of the epochs trained, the weight, and what the evaluations saw."""
    acc = Accelerator(cpu=True, seed=1, project_dir=folder, resume="auto")
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train, held_out = (DataLoader(torch.arange(1.0, 9.0).reshape(8, 1), 2) for _ in range(2))
    prepared = acc.prepare(model, optimizer, train, held_out, scheduler)
    model, optimizer, train, held_out, scheduler = prepared
    rates, seen = {}, {}

    def ends(where):
        if stop == (acc.steps, where):
            acc.save_state()
        return stop == (acc.steps, where)

    for epoch in range(5):
        for x in train:
            rates[epoch] = optimizer.param_groups[0]["lr"]
            acc.step((model(x) * x).mean() * 0.01, optimizer)
            if ends("inside"):
                return None
        if ends("before the scheduler"):
            return None
        scheduler.step()
        if ends("before the evaluation"):
            return None
        if acc.fast_forwarding:
            continue
        seen[epoch] = sum(len(x) for x in held_out)
        if ends("after all"):
            return None
    return rates, acc.unwrap_model(model).weight.item(), seen, scheduler.get_last_lr()


STOPS = [
    (5, "inside"),
    (6, "before the scheduler"),
    (6, "before the evaluation"),
    (6, "after all"),
    (4, "inside"),
]


def _stopped_and_resumed(folder):
    found = [_by_epoch(folder / "whole", None)]
    for number, stop in enumerate(STOPS):
        assert _by_epoch(folder / str(number), stop) is None
        found.append(_by_epoch(folder / str(number), None))
    _, weight = _by_curriculum(folder / "whole curriculum", None)
    assert _by_curriculum(folder / "curriculum", 4) is None
    assert _by_curriculum(folder / "curriculum", None)[1] == weight
    return found


def test_run_that_schedules_and_evaluates_once_per_epoch_when_resumed(tmp_path):
    for whole, *resumed in run_ranks(_stopped_and_resumed, tmp_path, deadline=240):
        assert whole[0] == {epoch: 0.5**epoch / 2 for epoch in range(5)}
        for stop, (rates, weight, seen, last) in zip(STOPS, resumed, strict=True):
            assert rates.items() <= whole[0].items(), stop
            assert (weight, last) == (whole[1], whole[3]), stop
            assert seen.keys() >= {epoch for epoch in range(5) if epoch > stop[0] // 2}, stop
            assert set(seen.values()) <= {4}, stop


DATA = torch.linspace(-1.0, 1.0, 20).reshape(20, 1)


def _batches_by_next(loader):
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            batches = iter(loader)
            batch = next(batches)
        yield batch


def _by_next(folder, stop, how):
    """Trains on 4 batches a pass, which are asked for with `next`; the weight after 14 steps."""
    acc = Accelerator(cpu=True, seed=1, project_dir=folder, resume="auto" if how == "resume" else None)
    model = nn.Linear(1, 1)
    model, optimizer, loader = acc.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.5), DataLoader(DATA, 5, shuffle=True)
    )
    if how == "load":
        acc.load_state()
    for x in _batches_by_next(loader):
        acc.step((model(x) - x).square().mean(), optimizer)
        if acc.steps == stop:
            acc.save_state()
        if acc.steps in (stop, 14):
            return model.weight.item()
    return None


def test_loop_that_reads_by_next_when_resumed_is_told_why_and_goes_on_by_load_state(tmp_path):
    whole = _by_next(tmp_path / "whole", 14, "fresh")
    _by_next(tmp_path / "cut", 10, "fresh")
    with pytest.raises(RuntimeError) as caught:  # what python makes of it in a generator
        _by_next(tmp_path / "cut", None, "resume")
    last = caught.value.__cause__
    assert isinstance(last, StopIteration)
    assert isinstance(last.__context__, StopIteration)
    assert "over 'train' gives no batch: resume= has put it behind the run, and 1 more" in str(
        last.__context__
    )
    assert "behind the run. " in str(last)
    assert "accelerator.load_state() after prepare" in str(last)
    assert _by_next(tmp_path / "cut", None, "load") == whole


@pytest.mark.parametrize("how", ["resume", "load_state"])
def test_place_when_a_batch_is_looked_at_before_the_resumed_loop_is_kept(tmp_path, how, capsys):
    def prepared(**options):
        acc = Accelerator(cpu=True, project_dir=tmp_path, **options)
        model = nn.Linear(1, 1)
        loader = DataLoader(torch.arange(20.0).reshape(-1, 1), batch_size=2, shuffle=True)
        return acc, *acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)

    acc, model, optimizer, loader = prepared()
    seen = []
    for batch in loader:
        seen += batch.flatten().tolist()
        acc.step(model(batch).mean(), optimizer)
        if acc.steps == 4:
            acc.save_state()
            break
    acc, model, optimizer, loader = prepared(resume="auto" if how == "resume" else None)
    if how == "load_state":
        acc.load_state()
    looked_at = [next(iter(loader)).flatten().tolist() for _ in range(2)]
    assert "the 2 sample(s) taken from it" in capsys.readouterr().out
    batches = [(acc.step(model(batch).mean(), optimizer), batch.flatten().tolist())[1] for batch in loader]
    assert looked_at == [batches[0]] * 2
    assert sorted([*seen, *itertools.chain(*batches)]) == list(range(20))
    next(iter(loader))  # of the next epoch, as in a run that was not resumed
    assert [len(batch) for batch in loader] == [2] * 10
    assert loader.next_epoch == 3


def _with_looks(folder, stop, how):
    """Trains on 4 batches a pass, with looks at batches before the loop and in every epoch; the looks, the weight."""
    acc = Accelerator(cpu=True, seed=1, project_dir=folder, resume="auto")
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model, optimizer, loader, held_out = acc.prepare(
        model, optimizer, DataLoader(DATA, 3, shuffle=True), DataLoader(DATA[:6], 2, shuffle=True)
    )
    looks = [next(iter(loader)).flatten().tolist() for _ in range({"twice": 2, "once": 1, "never": 0}[how])]
    for epoch in range(4):
        if how == "once":
            loader.set_epoch(epoch)
        for x in loader:
            acc.step((model(x) - x).square().mean(), optimizer)
            if acc.steps == stop:
                acc.save_state()
                return None
        looks.append(next(iter(held_out)).flatten().tolist())
        looks.append(sum(len(x) for x in held_out))
    return looks, acc.unwrap_model(model).weight.item(), acc.steps


def _looks_when_resumed(folder):
    found = []
    for how in ("twice", "once"):
        found.append([_with_looks(folder / f"whole {how}", None, how)])
        for stop in (1, 6):
            assert _with_looks(folder / f"{how} {stop}", stop, how) is None
            if stop == 6:  # and once more
                assert _with_looks(folder / f"{how} {stop}", 10, how) is None
            found[-1].append(_with_looks(folder / f"{how} {stop}", None, how))
    _with_looks(folder / "less", 6, "twice")
    with pytest.raises(
        CheckpointError, match=r"made an optimizer step in a pass over 'train' of which .* looked"
    ):
        _with_looks(folder / "less", None, "never")
    return found


def test_looks_at_batches_when_resumed_are_given_again(tmp_path):
    for found in run_ranks(_looks_when_resumed, tmp_path):
        for (looks, weight, steps), *resumed in found:
            for number, (again, same_weight, same_steps) in enumerate(resumed):
                assert (same_weight, same_steps) == (weight, steps)
                # of evaluations that are left out there is nothing but the look
                start = len(looks) - 8
                if start == 2:  # else the epoch looked at is the one that goes on, and so is the batch
                    assert again[:2] == looks[:2]
                assert again[start + 4 * number :] == looks[start + 4 * number :]


@pytest.mark.parametrize("stop", [10, 14])  # 10: in the last batch of the first epoch
@pytest.mark.parametrize("how", ["resume", "load"])
def test_evaluations_of_some_batches_when_resumed_are_those_of_the_uninterrupted_run(tmp_path, how, stop):
    def train(folder, stop, how="resume"):
        acc = Accelerator(cpu=True, seed=1, project_dir=folder, resume="auto" if how == "resume" else None)
        model = nn.Linear(1, 1)
        model, optimizer, loader, held_out = acc.prepare(
            model,
            torch.optim.SGD(model.parameters(), lr=0.05),
            DataLoader(DATA, 2, shuffle=True),
            DataLoader(DATA[:10], 2, shuffle=True),
        )
        if how == "load":
            acc.load_state()
        seen = {}
        for _ in range(2):
            for x in loader:
                acc.step((model(x) - x).square().mean(), optimizer)
                if acc.steps % 3 == 0:
                    seen[acc.steps] = [x.tolist() for x, _ in zip(held_out, range(2), strict=False)]
                if acc.steps == stop:
                    acc.save_state()
                    return None
            seen[acc.steps + 0.5] = [x.tolist() for x in held_out]
        return seen

    whole = train(tmp_path / "whole", None)
    assert train(tmp_path / "cut", stop) is None
    again = train(tmp_path / "cut", None, how)
    for steps, seen in whole.items():
        if steps > stop:
            assert again[steps] == seen, steps


def _by_curriculum(folder, stop, *, skips=False, again=False):
    """Trains with a loader, and one for its evaluation, prepared per epoch; what each pass gave, and the weight."""
    acc = Accelerator(cpu=True, seed=1, project_dir=folder, resume="auto")
    model = nn.Linear(1, 1)
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    seen = []
    for epoch in range(3):
        loader = acc.prepare(DataLoader(DATA[: 8 + 4 * epoch], 4, shuffle=True))
        for x in loader:
            acc.step((model(x) - x).square().mean(), optimizer)
            seen.append((epoch, x.flatten().tolist()))
            if acc.steps == stop:
                acc.save_state()
                return None
        if skips and acc.fast_forwarding:
            continue
        held_out = acc.prepare(DataLoader(DATA[:6], 4))
        seen.append((epoch, sum(len(x) for x in held_out)))
        if again and epoch == 0:
            acc.save_state()
            return None
    return seen, acc.unwrap_model(model).weight.item()


@pytest.mark.parametrize("stop", [2, 4, 7, 9])
def test_loaders_prepared_per_epoch_when_resumed_go_on_as_they_are_prepared(tmp_path, stop, capsys):
    seen, weight = _by_curriculum(tmp_path / "whole", None)
    assert _by_curriculum(tmp_path / "cut", stop) is None
    if stop == 7:  # saved once more, before the loader that goes on is there again
        assert _by_curriculum(tmp_path / "cut", None, again=True) is None
    capsys.readouterr()
    rest, found = _by_curriculum(tmp_path / "cut", None)
    assert found == weight
    trained = [one for one in rest if one[1]]  # evaluations left out see nothing
    assert trained == seen[-len(trained) :]
    awaited = {2: 0, 4: 2, 7: 4, 9: 4}[stop]
    told = f"; {awaited} more loader(s) go on from their places when they are prepared"
    assert (told in capsys.readouterr().out) == bool(awaited)


def test_loaders_prepared_in_another_order_when_resumed_are_refused(tmp_path):
    assert _by_curriculum(tmp_path, 7) is None
    with pytest.raises(
        CheckpointError, match=r"number 2 of those prepared, .* its total is 12 and was 6.*fast_forw"
    ):
        _by_curriculum(tmp_path, None, skips=True)


@pytest.mark.parametrize("prepared", ["before", "inside"])
def test_evaluations_within_the_first_epoch_when_resumed_see_their_data(tmp_path, prepared):
    def train(folder, stop):
        acc = Accelerator(cpu=True, seed=1, project_dir=folder, resume="auto")
        model = nn.Linear(1, 1)
        model, optimizer, loader = acc.prepare(
            model, torch.optim.SGD(model.parameters(), lr=0.5), DataLoader(DATA, 2)
        )
        held_out = acc.prepare(DataLoader(DATA[:6], 4)) if prepared == "before" else None
        seen = {}
        for x in loader:
            acc.step(model(x).sum(), optimizer)
            if acc.steps % 3 == 0:
                held_out = held_out or acc.prepare(DataLoader(DATA[:6], 4))
                seen[acc.steps] = sum(len(x) for x in held_out), held_out.epoch
            if acc.steps == stop:
                acc.save_state()
                return None
        seen["after"] = sum(len(x) for x in held_out), held_out.epoch
        return seen

    for stop, expected in ((7, {9: (6, 3), "after": (6, 4)}), (9, {"after": (6, 4)})):
        if (stop, prepared) != (9, "inside"):
            assert train(tmp_path / str(stop), stop) is None
            assert train(tmp_path / str(stop), None) == expected
