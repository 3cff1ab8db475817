"""Trust checks find what is wrong, name it, and are silent otherwise."""

from __future__ import annotations

import copy
import pickle
import random
import warnings

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset, WeightedRandomSampler

from nbaccel.core import Accelerator, DDPOptions
from nbaccel.core.loop.findings import fingerprint
from nbaccel.errors import NbaccelError, TrustError


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)  # running statistics rightly differ between the ranks
        self.drop = nn.Dropout(0.1)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x):
        return (self.drop(self.norm(self.body(x))) * self.scale).sum(1)


class Unsynchronised(Sampler):
    """Draws from the generator of its own process."""

    def __init__(self, total, seed):
        self.total, self.seed = total, seed

    def __len__(self):
        return self.total

    def __iter__(self):
        return iter(random.Random(self.seed).sample(range(self.total), self.total))


class Uneven(IterableDataset):
    """Divides itself, and one rank gets more."""

    def __init__(self, total):
        self.total = total

    def __iter__(self):
        return iter(torch.rand(self.total, 2, 3).unbind())


DATA = TensorDataset(torch.arange(72.0).reshape(24, 3) / 72)


class Named(dict):
    """A data set whose indices are words."""

    def __init__(self):
        super().__init__({f"sample {i}": DATA[i] for i in range(24)})


def _loader(case, rank):
    if case == "named":
        return DataLoader(Named(), batch_size=2, sampler=[f"sample {i}" for i in range(24)])
    if case == "sampler":
        return DataLoader(DATA, batch_size=2, sampler=Unsynchronised(24, seed=rank))
    if case == "replacement":
        return DataLoader(DATA, batch_size=2, sampler=WeightedRandomSampler([1.0] * 24, 24))
    if case.startswith("uneven"):
        return DataLoader(Uneven((2 if case == "uneven early" else 9) + rank), batch_size=None)
    return DataLoader(DATA, batch_size=2, shuffle=True)


def _options(case, rank):
    if case == "shard":
        return {"shard": lambda units, size: [rank] * len(units)}
    return {"shard": "none"} if case.startswith("uneven") else {}


def _train(case):
    warnings.simplefilter("error")
    acc = Accelerator(cpu=True, verify=True, ddp=DDPOptions(broadcast_buffers=case != "buffer"))
    rank = acc.process_index
    torch.manual_seed(rank)  # DDP makes parameters equal at prepare: no finding
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * (1 + rank) if case == "rate" else 0.1)
    try:
        model, optimizer = acc.prepare(model, optimizer)
        loader = acc.prepare_data_loader(_loader(case, rank), **_options(case, rank))
        _spoil(case, rank, acc.unwrap_model(model), loader)
        if case == "good":  # a teacher's weights, made while the inputs are watched
            for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert copied(DATA.tensors[0]).shape == (24,)
        for _ in range(3):
            for number, batch in enumerate(loader):
                x = batch if isinstance(batch, torch.Tensor) else batch[0]
                acc.step(model(x).mean(), optimizer)
                if case == "buffer" and rank == 1:
                    acc.unwrap_model(model).scale.add_(1)
                if case == "break" and rank == 1 and number == 1:
                    break
    except (TrustError, UserWarning) as error:
        return str(error)
    return acc.steps


def _spoil(case, rank, model, loader):
    if case == "late layer":
        model.body.bias.data = torch.randn(3)
    elif case == "mode" and rank == 1:
        model.drop.eval()
    elif case == "epoch" and rank == 1:
        loader.set_epoch(1)
    elif case == "skip" and rank == 1:
        loader.skip_batches(1)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("rate", ["after optimizer step 1", "'body.weight'", "rank 0 differs from rank 1", "optimizer with"]),
        ("late layer", ["'body.bias'", "without the same seed", "rank 0 differs from rank 1"]),
        ("buffer", ["buffer 'scale'", "rank 0 differs from rank 1", "written under a branch on the rank"]),
        ("mode", ["drop is in train mode on rank(s) 0 only", "model.eval()"]),
        (
            "sampler",
            ["samplers of 'train' draw differently", "rank 0 differs from rank 1", "seeded differently"],
        ),
        ("shard", ["ranks 0 and 1 both read sample", "of 'train'", "looks at the rank"]),
        ("epoch", ["rank 0 is at sample 4 of epoch 0; rank 1 is at sample 4 of epoch 1", "set_epoch"]),
        ("skip", ["rank 0 is at sample 4 of epoch 0; rank 1 is at sample 8 of epoch 0", "skip_batches"]),
        ("uneven early", ["rank 0 is at the end after 2 batches; rank 1 goes on after 2", "divides itself"]),
        (
            "break",
            ["rank 0 goes on after 2 batches; rank 1 has left the loop after 2", "break under a branch"],
        ),
    ],
)
def test_ranks_when_they_differ_are_named(case, words):
    told = run_ranks(_train, case)
    assert len(set(map(str, told))) == 1
    for word in words:
        assert word in told[0]


def test_batches_when_unequal_at_the_end_of_a_long_pass_are_named():
    """By then nobody waits for the others any more: the ranks read each other's words when they have come. Who reads
    first raises, and the other one may meet a rank that is gone before it has looked."""

    def train():
        acc = Accelerator(cpu=True, verify=True)
        model = acc.prepare(Model())
        optimizer = acc.prepare(torch.optim.SGD(model.parameters(), lr=0.0))
        loader = acc.prepare_data_loader(DataLoader(Uneven(9 + acc.process_index), None), shard="none")
        try:
            for _ in range(200):
                for x in loader:
                    with acc.no_sync(model):  # so that nobody hangs in a gradient's reduction
                        acc.backward(model(x).mean())
                    optimizer.step()
                acc.wait_for_everyone()
        except (NbaccelError, RuntimeError) as error:
            return type(error), str(error)
        return None

    told = run_ranks(train)
    assert None not in told
    (text, *_) = {text for kind, text in told if kind is TrustError}
    assert "rank 0 is at the end after 9 batches; rank 1 is at the end after 10 batches" in text


@pytest.mark.parametrize("case", ["good", "replacement", "named"])
def test_ranks_when_all_is_well_nothing_is_said(case):
    assert run_ranks(_train, case) == [18, 18]
    assert _train(case) == 36


def _stream(case):
    class Stream(IterableDataset):
        def __init__(self):
            own = random.Random(acc.process_index)
            self.order = own.sample(range(24), 24) if case == "own" else None

        def __iter__(self):
            yield from (DATA[i] for i in self.order or random.sample(range(24), 24))

    acc = Accelerator(cpu=True, verify=True)
    model, optimizer = acc.prepare(Model(), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    optimizer.param_groups[0]["params"] = list(model.parameters())
    loader = acc.prepare(DataLoader(Stream(), batch_size=2))
    seen = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for (x,) in loader:
            acc.step(model(x).mean(), optimizer)
            seen += acc.gather_for_metrics(x)[:, 0].tolist()
    return len(set(seen)), [str(one.message) for one in said]


def test_streams_when_the_ranks_read_different_ones_are_named():
    assert [seen for seen, _ in run_ranks(_stream, "global")] == [24, 24]
    (seen, said), other = run_ranks(_stream, "own")
    assert seen < 24
    assert len(said) == 1
    assert "different samples from the iterable data set of 'train': rank 0 differs from rank 1" in said[0]
    assert "in batch 1" in said[0]
    assert other[1] == []


def _unprepared(case):
    acc = Accelerator(cpu=True, verify=True)
    model, optimizer = acc.prepare(Model(), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    optimizer.param_groups[0]["params"] = list(model.parameters())
    torch.manual_seed(acc.process_index)
    loader = DataLoader(DATA, batch_size=2, shuffle=case == "shuffled")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for (x,) in loader if case != "constant" else [(torch.ones(2, 3),)] * 4:
            acc.step(model(x).mean(), optimizer)
    return [str(one.message) for one in said]


def test_samples_when_the_loader_was_not_prepared_are_the_same_on_all_ranks():
    rank0, rank1 = run_ranks(_unprepared, "plain")
    assert len(rank0) == 1
    assert "all 2 ranks computed on the same batches" in rank0[0]
    assert "a loader that was not prepared" in rank0[0]
    assert rank1 == []  # it is said once
    assert run_ranks(_unprepared, "constant") == [[], []]
    assert run_ranks(_unprepared, "shuffled") == [[], []]


def _teacher():
    acc = Accelerator(cpu=True, verify=True)
    torch.manual_seed(acc.process_index)
    student, teacher = Model(), Model()
    student = acc.prepare(student)
    teacher = acc.prepare_model(teacher, evaluation_mode=True)
    optimizer = acc.prepare(torch.optim.SGD(student.parameters(), lr=0.1))
    with torch.no_grad():
        target = teacher(torch.ones(2, 3))
    try:
        acc.step((student(torch.ones(2, 3)) - target).square().mean(), optimizer)
    except TrustError as error:
        return str(error)
    return None


def test_model_when_made_before_seeding_and_not_spread_is_named():
    for text in run_ranks(_teacher):
        assert "after optimizer step 1 parameter 'body.weight'" in text
        assert "of model 1: rank 0 differs from rank 1" in text
        assert "without the same seed" in text


def test_parameters_when_never_used_are_named():
    acc = Accelerator(cpu=True, verify=True)
    model = Model()
    model.spare = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = acc.prepare(model, optimizer)
    x = torch.rand(2, 3)
    for _ in range(2):
        acc.step(model(x).mean(), optimizer)
    loss = model(x).mean()
    with pytest.warns(UserWarning, match=r"2 parameters got no gradient.*spare\.weight, spare\.bias"):
        acc.step(loss, optimizer)
    acc.step(model(x).mean(), optimizer)  # said once: another warning would fail the test


def test_optimizers_when_they_take_turns_are_not_named():
    acc = Accelerator(cpu=True, verify=True)
    one, two = nn.Linear(3, 1), nn.Linear(3, 1)
    one, two, first, second = acc.prepare(
        one, two, torch.optim.SGD(one.parameters(), lr=0.1), torch.optim.SGD(two.parameters(), lr=0.1)
    )
    for number in range(70):
        acc.step(one(torch.ones(1, 3)).mean(), first)
        if number % 5 == 4:
            acc.step(two(torch.ones(1, 3)).mean(), second)
    assert acc.steps == 70


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("missing", "SGD: prepared, and not stepped once in 64 optimizer steps"),
        ("direct", "no step of SGD, SGD.*is stepped itself; step what prepare returned"),
        ("none", "no step of SGD, SGD.*is not reached"),
    ],
)
def test_optimizer_when_it_never_steps_is_named(case, words):
    acc = Accelerator(cpu=True, verify=True)
    inner = nn.Linear(3, 1)
    raw = torch.optim.SGD(inner.parameters(), lr=0.1)
    model, first, _ = acc.prepare(inner, raw, torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    step = {"missing": first.step, "direct": raw.step, "none": int}[case]

    def train():
        for _ in range(80):
            acc.backward(model(torch.ones(1, 3)).mean())
            step()

    with pytest.warns(UserWarning, match=words) as caught:
        train()
    assert len(caught) == 1


def test_fingerprint_when_bits_change():
    t = torch.randn(100)
    same, swapped, changed = t.clone(), t.clone(), t.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    changed[7] = torch.nextafter(changed[7], torch.tensor(9.0))
    assert fingerprint(same) == fingerprint(t)
    assert fingerprint(swapped) != fingerprint(t)
    assert fingerprint(changed) != fingerprint(t)
    assert fingerprint(t.bfloat16()) != fingerprint(t)
    assert fingerprint(torch.empty(0)) == 0
    large = torch.randint(0, 99, ((1 << 19) + 5,))
    moved = large.clone()
    moved[-1] += 1
    assert fingerprint(moved) != fingerprint(large)
    moved = large.roll(1 << 17)  # by whole blocks of it
    assert fingerprint(moved) != fingerprint(large)
