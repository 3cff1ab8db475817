"""ShardedLoader on real ranks: agreement, exactly once over world sizes, dispatch from rank 0."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from ranks import run_ranks
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset

from nbaccel.core.data import ShardedLoader
from nbaccel.core.world import join
from nbaccel.errors import ConfigError, TrustError, WorkerError

Pair = namedtuple("Pair", "x name")


@dataclass
class Holder:
    x: torch.Tensor
    note: str


class Numbers(Dataset):
    def __init__(self, total):
        self.total = total

    def __len__(self):
        return self.total

    def __getitem__(self, index):
        return torch.tensor(index)


class Stream(IterableDataset):
    def __init__(self, total):
        self.total, self.at, self.reads = total, 0, 0

    def __iter__(self):
        first, self.at = self.at, 0
        for value in range(first, self.total):
            self.at = value + 1
            self.reads += 1
            yield torch.tensor(value)

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def consume(make, state, steps, options):
    """Real samples of up to `steps` batches on this rank, what the batches were, and the state after."""
    world = join()
    torch.manual_seed(world.rank)  # the ranks' own generators differ, as they do in fresh processes
    loader = ShardedLoader(make(), world=world, **options)
    if state is not None:
        loader.load_state_dict(state)
    seen, counts = [], []
    for batch in itertools.islice(loader, steps):
        seen += batch[: loader.batch_samples].flatten().tolist()
        counts.append(
            (loader.batch_samples, loader.batch_repeated, loader.global_batch_samples, loader.at_end)
        )
    return seen, counts, loader.state_dict()


def users_sampler():
    # Each rank and each launch gets a generator in another state: rank 0's first one decides.
    generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "big"))
    return DataLoader(Numbers(61), 3, sampler=SubsetRandomSampler(range(61), generator=generator))


KINDS = {
    "shuffled": (lambda: DataLoader(Numbers(61), 3, shuffle=True), {}),
    "shuffled, workers": (lambda: DataLoader(Numbers(61), 3, shuffle=True, num_workers=2), {}),
    "shuffled, dispatched": (lambda: DataLoader(Numbers(61), 3, shuffle=True), {"dispatch": True}),
    "sampler": (users_sampler, {}),
    "sampler, dispatched": (users_sampler, {"dispatch": True}),
    "stream, dispatched": (lambda: DataLoader(Stream(61), 3), {"dispatch": True}),
}
LEGS = [(4, 3), (2, 2), (3, None)]


def consume_each(states, steps):
    return {name: consume(make, states.get(name), steps, options) for name, (make, options) in KINDS.items()}


@pytest.fixture(scope="module")
def legs():
    """What the ranks gave of each kind over `LEGS` of (ranks, steps), each going on from the state of the one
    before."""
    given, states = [], {}
    for size, steps in LEGS:
        given.append(run_ranks(consume_each, states, steps, num_processes=size))
        states = {name: state for name, (_, _, state) in given[-1][0].items()}
    return given


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_is_seen_once_when_four_ranks_go_on_as_two_and_three(legs, kind):
    seen = []
    for answers in ([answer[kind] for answer in ranks] for ranks in legs):
        for mine, _, _ in answers:
            seen += mine
        assert len({len(counts) for _, counts, _ in answers}) == 1
        assert len({(s["samples"], s["cursor"], s["epoch"]) for _, _, s in answers}) == 1
    assert sorted(seen) == list(range(61))
    state = legs[-1][0][kind][2]
    assert (state["epoch"], state["samples"]) == (1, 0)


CELLS = [(total, workers) for total in (1, 2, 13) for workers in (0, 2)]


def consume_both_ways():
    found = []
    for total, workers in CELLS:
        make = functools.partial(DataLoader, Numbers(total), 3, shuffle=True, num_workers=workers)
        found.append([consume(make, None, None, {"seed": 5, "dispatch": sent}) for sent in (False, True)])
    return found


def test_dispatch_gives_what_each_rank_would_have_read():
    ranks = run_ranks(consume_both_ways)
    for (total, workers), zero, one in zip(CELLS, *ranks, strict=True):
        for own, sent in (zero, one):
            assert sent[:2] == own[:2], (total, workers)
        assert sorted(zero[0][0] + one[0][0]) == list(range(total)), (total, workers)


class Mixed(Dataset):
    """Samples whose batches change in shape, structure and size from one to the next."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return index


def mixed(indices):
    n = 1 + indices[0] * 37
    batch = {
        "f": torch.arange(n, dtype=torch.float64),
        "h": torch.full((len(indices), n), indices[0], dtype=torch.bfloat16),
        "b": torch.tensor([i % 2 == 0 for i in indices]),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(indices[0]),
        "strided": torch.arange(12).reshape(3, 4).t(),
        "names": [f"sample {i}" for i in indices],
        "pair": Pair(torch.tensor(indices), "é"),
        "held": Holder(torch.tensor(indices[0]), "n"),
        "c": torch.tensor([1 + 2j]),
        "packed": pack_sequence([torch.full((1 + i, 2), i) for i in indices], enforce_sorted=False),
    }
    if indices[0] >= 6:
        batch["more"] = (torch.ones(2, dtype=torch.uint8), None, 3.5)
    return batch


def dispatched_mixed(far):
    world = join()
    if far:  # as if each rank were on a machine of its own
        world = dataclasses.replace(world, local_size=1, local_rank=0)
    loader = ShardedLoader(DataLoader(Mixed(), 2, collate_fn=mixed), world=world, dispatch=True)
    plain = ShardedLoader(DataLoader(Mixed(), 2, collate_fn=mixed), world=world)
    kept = [list(loader) for _ in range(2)]
    expected = list(plain)
    return kept[0], kept[1], expected


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, Holder):
        return type(b) is Holder and same([a.x, a.note], [b.x, b.note])
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_dispatch_carries_batches_of_changing_structure_and_the_loop_may_keep_them():
    answers = run_ranks(lambda: [dispatched_mixed(far) for far in (False, True)])
    for first, second, expected in itertools.chain(*answers):
        assert len(expected) == 3
        assert same(first, expected)
        assert same(second, expected)


def leave_early():
    world = join()
    loader = ShardedLoader(DataLoader(Numbers(40), 2), world=world, dispatch=True)
    return [[batch.tolist() for batch in itertools.islice(loader, steps)] for steps in (3, 1, None)]


def test_dispatch_goes_on_with_the_next_pass_when_all_ranks_leave_a_loop_early():
    zero, one = run_ranks(leave_early)
    assert zero[:2] == [[[0, 2], [4, 6], [8, 10]], [[0, 2]]]
    assert one[:2] == [[[1, 3], [5, 7], [9, 11]], [[1, 3]]]
    assert len(zero[2]) == len(one[2]) == 10


def leave_unequally():
    world = join()
    loader = ShardedLoader(DataLoader(Numbers(40), 2), world=world, dispatch=True)
    list(itertools.islice(loader, 2 + world.rank * 0))
    it = iter(loader)
    next(it)
    if world.rank == 0:
        it.close()
        it = iter(loader)
    try:
        next(it)
    except TrustError as error:
        return str(error)
    return None


def test_dispatch_names_the_batches_when_a_rank_left_the_loop_alone():
    zero, one = run_ranks(leave_unequally)
    assert zero is None
    assert "rank 1 asks for batch 1 of pass 2, but rank 0 sends batch 0 of pass 3" in one


class Broken(Numbers):
    def __getitem__(self, index):
        if index == 9:
            raise ValueError("sample 9 is broken")
        return super().__getitem__(index)


def read_broken(workers):
    world = join()
    loader = ShardedLoader(DataLoader(Broken(40), 2, num_workers=workers), world=world, dispatch=True)
    try:
        list(loader)
    except (ValueError, WorkerError) as error:
        return type(error).__name__, str(error)
    return None


def test_dispatch_tells_the_other_ranks_when_reading_fails_on_rank_0():
    for zero, one in zip(*run_ranks(lambda: [read_broken(workers) for workers in (0, 1)]), strict=True):
        assert zero[0] == "ValueError"
        assert one[0] == "WorkerError"
        assert "rank 0 failed while reading the data for all ranks: ValueError" in one[1]
        assert "sample 9 is broken" in one[1]


def large_batches():
    """Larger than a socket holds: the sender waits for the reader."""
    loader = ShardedLoader(DataLoader(Large(), 2), world=join(), dispatch=True)
    return [(batch.shape[1], batch[0, 0].item(), batch[-1, -1].item()) for batch in loader]


class Large(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((3_000_000,), float(index))


def test_dispatch_carries_batches_larger_than_a_socket_holds():
    zero, one = run_ranks(large_batches)
    assert zero == [(3_000_000, 0.0, 2.0), (3_000_000, 4.0, 6.0)]
    assert one == [(3_000_000, 1.0, 3.0), (3_000_000, 5.0, 7.0)]


def read_while_one_leaves(who):
    world = join()
    loader = ShardedLoader(DataLoader(Large(), 1), world=world, dispatch=True)
    try:
        for _ in loader:
            if world.rank == who:
                return "left"  # its process ends
    except WorkerError as error:
        return str(error), error.ranks
    return "read all"


@pytest.mark.parametrize("who", [0, 1])
def test_dispatch_names_the_rank_that_has_ended(who):
    answers = run_ranks(read_while_one_leaves, who)
    assert answers[who] == "left"
    text, ranks = answers[1 - who]
    assert f"rank {who} has ended" in text
    assert ranks == (who,)


def sparse_batches():
    world = join()
    collate = lambda indices: torch.eye(2).to_sparse()  # noqa: E731
    loader = ShardedLoader(DataLoader(Numbers(4), 2, collate_fn=collate), world=world, dispatch=True)
    try:
        list(loader)
    except (ConfigError, WorkerError) as error:
        return str(error)
    return None


def test_dispatch_refuses_tensors_it_cannot_send():
    for text in run_ranks(sparse_batches):
        assert "dispatch sends dense tensors only" in text


def prepare_different(what):
    world = join()
    total, batch, seed = 20, 2, None
    if world.rank == 1:
        total, batch, seed = {"length": (19, 2, None), "batch_size": (20, 3, None), "seed": (20, 2, 4)}[what]
    try:
        ShardedLoader(DataLoader(Numbers(total), batch, shuffle=True), world=world, seed=seed)
    except TrustError as error:
        return str(error)
    return None


def test_ranks_with_different_loaders_are_told_which_and_how():
    expected = {"length": "20 on rank 0 and 19 on rank 1", "batch_size": "3", "seed": "4"}
    for told in run_ranks(lambda: {what: prepare_different(what) for what in expected}):
        for what, values in expected.items():
            assert f"different loaders: {what} is" in told[what]
            assert values in told[what]


def own_seeds():
    world = join()
    torch.manual_seed(100 + world.rank)
    loader = ShardedLoader(DataLoader(TensorDataset(torch.arange(30)), 5, shuffle=True), world=world)
    return loader.seed, torch.cat([batch[0] for batch in loader]).tolist()


def test_rank_0s_seed_orders_the_epoch_for_all_when_none_is_given():
    (first, zero), (second, one) = run_ranks(own_seeds)
    assert first == second == 100
    assert sorted(zero + one) == list(range(30))
