"""ShardedLoader over iterable data sets: divided streams, their own state, reading and dropping, refusals."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from nbaccel.core.data import ShardedLoader
from nbaccel.core.world import World, single
from nbaccel.errors import CheckpointError, ConfigError


class Stream(IterableDataset):
    """0 to total - 1, divided among workers; counts how many samples it gave."""

    def __init__(self, total):
        self.total = total
        self.reads = 0

    def __iter__(self):
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        for value in range(first, self.total, step):
            self.reads += 1
            yield torch.tensor(value)


class Stateful(IterableDataset):
    """The same, and says where it is."""

    def __init__(self, total):
        self.total = total
        self.at = 0
        self.reads = 0

    def __iter__(self):
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        at, self.at = self.at, 0
        for number, value in enumerate(range(first + at * step, self.total, step)):
            self.at = at + number + 1
            self.reads += 1
            yield torch.tensor(value)
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class StatefulIterator(IterableDataset):
    """Its iterator, not the data set, holds the state (torchdata's other convention)."""

    class Walk:
        def __init__(self, total):
            self.total, self.at = total, 0

        def __iter__(self):
            return self

        def __next__(self):
            if self.at == self.total:
                raise StopIteration
            self.at += 1
            return torch.tensor(self.at - 1)

        def state_dict(self):
            return {"at": self.at}

        def load_state_dict(self, state):
            self.at = state["at"]

    def __init__(self, total):
        self.total = total

    def __iter__(self):
        return self.Walk(self.total)


def world(rank, size):
    return World(
        rank=rank, local_rank=rank, size=size, local_size=size, device=torch.device("cpu"), backend=None
    )


def ranks(size, make, **options):
    return [ShardedLoader(make(), world=world(r, size), seed=3, **options) for r in range(size)]


def take(loaders, steps=None):
    """Real samples the loaders give together in `steps` steps."""
    seen = []
    passes = [iter(loader) for loader in loaders]
    for together in itertools.islice(zip(*passes, strict=True), steps):
        for loader, batch in zip(loaders, together, strict=True):
            seen += batch[: loader.batch_samples].flatten().tolist()
    return seen


@pytest.mark.parametrize(("size", "num_workers"), [(1, 0), (2, 0), (3, 0), (2, 2)])
def test_every_sample_of_a_stream_is_seen_once_in_equally_many_steps(size, num_workers):
    loaders = ranks(size, lambda: DataLoader(Stream(23), batch_size=2, num_workers=num_workers))
    steps, ends = set(), []
    seen = []
    for loader in loaders:
        ends.append([])
        for batch in loader:
            seen += batch[: loader.batch_samples].tolist()
            ends[-1].append(loader.at_end)
        steps.add(len(ends[-1]))
    assert sorted(seen) == list(range(23))
    assert len(steps) == 1
    assert all(flags == [False] * (len(flags) - 1) + [True] for flags in ends)


def test_batches_equal_torchs_when_there_is_one_rank():
    for workers in (0, 2):
        loaders = [DataLoader(Stream(17), batch_size=3, num_workers=workers) for _ in range(2)]
        ours = list(ShardedLoader(loaders[0], world=single()))
        assert all(torch.equal(a, b) for a, b in zip(ours, loaders[1], strict=True))


def test_a_stream_of_batches_gives_each_rank_whole_batches():
    loaders = ranks(2, lambda: DataLoader(Stream(5), batch_size=None))
    assert [[int(sample) for sample in loader] for loader in loaders] == [[0, 2, 4], [1, 3, 4]]


def test_drop_last_drops_the_global_tail_of_a_stream():
    loaders = ranks(2, lambda: DataLoader(Stream(11), batch_size=2, drop_last=True))
    assert sorted(take(loaders)) == list(range(8))


def test_even_batches_repeats_samples_of_a_streams_last_batch():
    loaders = ranks(2, lambda: DataLoader(Stream(5), batch_size=2), even_batches=True)
    assert [[b.tolist() for b in loader] for loader in loaders] == [[[0, 2], [4, 4]], [[1, 3], [4, 4]]]


def test_a_shard_function_sees_the_samples_of_a_stream():
    loaders = ranks(
        2,
        lambda: DataLoader(Stream(8), batch_size=2),
        shard=lambda samples, size: [int(s) // 2 % size for s in samples],
    )
    assert [b.tolist() for b in loaders[1]] == [[2, 3], [6, 7]]


@settings(max_examples=40, deadline=None)
@given(
    legs=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 8)), min_size=1, max_size=4),
    total=st.integers(1, 60),
    kind=st.sampled_from([Stateful, StatefulIterator]),
)
def test_a_stateful_stream_is_seen_once_over_interruptions_and_world_sizes(legs, total, kind):
    state, seen = None, []
    for number, (size, batch, steps) in enumerate(legs):
        made = ranks(size, lambda batch=batch: DataLoader(kind(total), batch))
        if state is not None:
            for loader in made:
                loader.load_state_dict(state)
        seen += take(made, None if number == len(legs) - 1 else steps)
        state = made[0].state_dict()
        if state["epoch"]:
            break
    assert Counter(seen) == Counter(range(total))


def test_resuming_a_stateful_stream_reads_none_of_the_skipped_samples():
    cut = ShardedLoader(DataLoader(Stateful(10**9), 4), world=single())
    head = [b.tolist() for b in itertools.islice(cut, 50)]
    dataset = Stateful(10**9)
    resumed = ShardedLoader(DataLoader(dataset, 4), world=single())
    resumed.load_state_dict(cut.state_dict())
    assert head[-1] == [196, 197, 198, 199]
    assert next(iter(resumed)).tolist() == [200, 201, 202, 203]
    assert dataset.reads <= 5  # one sample ahead, to know the last batch


def test_a_stream_without_state_is_read_and_dropped_aloud():
    cut = ranks(2, lambda: DataLoader(Stream(31), 2))
    seen = take(cut, 3)
    datasets = [Stream(31) for _ in range(3)]
    made = iter(datasets)
    resumed = ranks(3, lambda: DataLoader(next(made), 2))
    for loader in resumed:
        with pytest.warns(UserWarning, match="12 samples will be read and dropped"):
            loader.load_state_dict(cut[0].state_dict())
    seen += take(resumed)
    assert sorted(seen) == list(range(31))
    assert datasets[0].reads == 31


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
@pytest.mark.parametrize(("persistent", "cuts"), [(False, (1, 3, 5, 7)), (True, (2, 6))])
def test_a_stateful_stream_with_workers_goes_on_where_the_loop_was(persistent, cuts):
    def make():
        # 3 workers with 7, 7 and 6 samples: they end at different times.
        return ShardedLoader(
            DataLoader(Stateful(20), 2, num_workers=3, prefetch_factor=4, persistent_workers=persistent),
            world=single(),
        )

    whole = make()
    expected = [[b.tolist() for b in whole] for _ in range(2)]
    for steps in cuts:
        cut = make()
        head = [b.tolist() for b in itertools.islice(cut, steps)]
        resumed = make()
        resumed.load_state_dict(cut.state_dict())
        assert head + [b.tolist() for b in resumed] == expected[0], steps
    assert [b.tolist() for b in resumed] == expected[1]


def test_a_stream_without_state_goes_on_with_the_same_workers_and_is_refused_with_others():
    make = lambda workers: DataLoader(Stream(20), 2, num_workers=workers)  # noqa: E731
    cut = ShardedLoader(make(2), world=single())
    head = [b.tolist() for b in itertools.islice(cut, 5)]
    state = cut.state_dict()
    resumed = ShardedLoader(make(2), world=single())
    with pytest.warns(UserWarning, match="10 samples will be read and dropped"):
        resumed.load_state_dict(state)
    assert head + [b.tolist() for b in resumed] == [
        b.tolist() for b in ShardedLoader(make(2), world=single())
    ]
    with pytest.raises(ConfigError, match="Set num_workers=2"):
        ShardedLoader(make(0), world=single()).load_state_dict(state)


def test_a_stream_that_divides_itself_needs_the_same_rank_again():
    class Own(Stateful):
        def __init__(self, rank, size, total):
            super().__init__(total)
            self.rank, self.size = rank, size

        def __iter__(self):
            return (value for value in super().__iter__() if int(value) % self.size == self.rank)

    def loader(rank, size):
        return ShardedLoader(DataLoader(Own(rank, size, 20), 2), world=world(rank, size), shard="none")

    pair = [loader(rank, 2) for rank in range(2)]
    heads = [[b.tolist() for b in itertools.islice(one, 2)] for one in pair]
    assert heads == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]
    for batch in itertools.islice(pair[0], 1):
        assert (pair[0].global_batch_samples, pair[0].batch_samples, len(batch)) == (None, 2, 2)
    assert pair[0].state_scope == "rank"
    state = pair[1].state_dict()
    with pytest.raises(ConfigError, match="rank 1 of 2, but this is rank 0 of 2"):
        loader(0, 2).load_state_dict(state)
    with pytest.raises(ConfigError, match="but this is rank 1 of 4"):
        loader(1, 4).load_state_dict(state)
    again = loader(1, 2)
    again.load_state_dict(state)
    assert next(iter(again)).tolist() == [9, 11]


@pytest.mark.parametrize("workers", [0, 2])
def test_randomness_of_a_stream_resumes_bit_for_bit_when_seeded_per_sample(workers):
    class Noisy(Stateful):
        def __iter__(self):
            for value in super().__iter__():
                yield torch.tensor([float(value), float(torch.rand(())), random.random()])

    def make():
        return ShardedLoader(
            DataLoader(Noisy(30), 3, num_workers=workers), world=single(), seed=5, per_sample_seed=True
        )

    expected = torch.cat(list(make()))
    cut = make()
    before = torch.get_rng_state()
    got = list(itertools.islice(cut, 4))
    assert torch.equal(torch.get_rng_state(), before)
    resumed = make()
    resumed.load_state_dict(cut.state_dict())
    assert torch.equal(torch.cat(got + list(resumed)), expected)


class Shuffling(IterableDataset):
    """0 to 19 in an order drawn from the global generators; each worker takes its part of it."""

    def __init__(self, library):
        self.library = library

    def __iter__(self):
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        values = list(range(20))
        if self.library == "random":
            random.shuffle(values)
        elif self.library == "worker seed":
            random.Random(info.seed - info.id if info else torch.initial_seed()).shuffle(values)
        else:
            values = torch.randperm(20).tolist()
        for value in values[first::step]:
            yield torch.tensor([float(value), float(torch.rand(()))])


@pytest.mark.parametrize(
    ("library", "workers", "seeded"),
    [
        *itertools.product(["random", "torch", "worker seed"], [0], [False, True]),
        ("random", 2, False),
        ("torch", 2, True),
        ("worker seed", 2, False),
    ],
)
def test_a_stream_that_draws_its_order_gives_every_sample_once(library, workers, seeded):
    made = ranks(2, lambda: DataLoader(Shuffling(library), 3, num_workers=workers), per_sample_seed=seeded)
    orders, draws = [], []
    for _ in range(2):
        seen = []
        for number, loader in enumerate(made):
            torch.manual_seed(number)  # the training loops' own draws differ
            random.seed(number)
            before = torch.get_rng_state(), random.getstate()
            for batch in loader:
                seen += batch[: loader.batch_samples].tolist()
            assert torch.equal(torch.get_rng_state(), before[0])
            assert random.getstate() == before[1]
        orders.append([int(value) for value, _ in seen])
        draws += [draw for _, draw in seen]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(20))
    assert orders[0] != orders[1]
    assert len(set(draws)) > 36, "no sample's draws are those of another, but for the first of each worker"


class ShufflingChunks(IterableDataset):
    """0 to 199, twenty at a time in an order drawn from `random`, as files of samples are read."""

    def __iter__(self):
        for first in range(0, 200, 20):
            chunk = list(range(first, first + 20))
            random.shuffle(chunk)
            yield from chunk


def test_a_stream_that_draws_now_and_then_gives_every_sample_once():
    seen = []
    for number, loader in enumerate(ranks(2, lambda: DataLoader(ShufflingChunks(), 1))):
        random.seed(number)
        for batch in loader:
            random.random()  # the training loop draws as well
            seen += batch[: loader.batch_samples].tolist()
    assert sorted(seen) == list(range(200))


def test_a_stream_that_draws_its_order_goes_on_in_it_on_another_number_of_ranks():
    cut = ranks(2, lambda: DataLoader(Shuffling("random"), 2))
    seen = [int(value) for value in take(cut, 2)[::2]]
    resumed = ranks(3, lambda: DataLoader(Shuffling("random"), 2))
    for loader in resumed:
        with pytest.warns(UserWarning, match="8 samples will be read and dropped"):
            loader.load_state_dict(cut[0].state_dict())
    assert sorted(seen + [int(value) for value in take(resumed)[::2]]) == list(range(20))


def test_a_streams_collate_function_draws_apart_on_each_rank_when_in_workers():
    made = ranks(
        2, lambda: DataLoader(Stream(8), 2, num_workers=1, collate_fn=lambda _: float(torch.rand(())))
    )
    first, second = (list(loader) for loader in made)
    assert not set(first) & set(second)


def test_a_streams_samples_have_digests_in_its_first_batches():
    class Odd(IterableDataset):
        def __init__(self, first):
            self.first = first

        def __iter__(self):
            yield from (self.first, torch.ones(2).bfloat16(), {"name": "x", "of": object()}, None)
            yield from (b"z", (1.5, 2), torch.zeros(()), torch.ones(1, dtype=torch.cfloat).conj())

    def digests(first):
        made = ShardedLoader(DataLoader(Odd(first), 1, collate_fn=list), world=single())
        return [made.global_batch_digests for _ in made]

    one, two = digests(torch.zeros(3)), digests(torch.ones(3))
    assert one == digests(torch.zeros(3))
    assert one[0] != two[0]
    assert one[1:] == two[1:]
    assert len({*one[:4], two[0]}) == 5
    assert one[4:] == [()] * 4


class Undivided(IterableDataset):
    def __init__(self, values):
        self.values = values

    def __iter__(self):
        return iter(self.values)


@pytest.mark.parametrize("shard", ["interleaved", "none"])
def test_workers_that_read_the_same_samples_are_told_of_once(shard):
    loader = ShardedLoader(
        DataLoader(Undivided(range(9)), 2, num_workers=2), world=single(), seed=3, shard=shard
    )
    with pytest.warns(
        UserWarning, match="workers 0 and 1 of the loader over Undivided read the same"
    ) as told:
        seen = [[*itertools.chain(*map(torch.Tensor.tolist, loader))] for _ in range(2)]
    assert [Counter(one) for one in seen] == [Counter([*range(9)] * 2)] * 2
    assert [one.filename for one in told] == [__file__]
    alike = ShardedLoader(DataLoader(Undivided([1, 2, 3] * 4), 2, num_workers=2), world=single())
    assert sum(len(batch) for batch in alike) == 24  # too little to tell


def test_epochs_of_a_stream_are_told_to_it_and_counted():
    class Told(Stream):
        epoch = 0

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            yield from (value + 100 * self.epoch for value in super().__iter__())

    for workers, persistent in ((0, False), (1, False), (1, True)):
        loader = ShardedLoader(
            DataLoader(Told(4), 4, num_workers=workers, persistent_workers=persistent), world=single()
        )
        assert [b.tolist()[0] for _ in range(3) for b in loader] == [0, 100, 200]
        loader.set_epoch(7)
        assert next(iter(loader)).tolist()[0] == 700


def test_length_of_a_stream_is_known_when_it_has_one():
    class Sized(Stream):
        def __len__(self):
            return self.total

    assert len(ranks(2, lambda: DataLoader(Sized(9), 2))[1]) == 3
    with pytest.raises(TypeError, match="its stream has no __len__"):
        len(ranks(2, lambda: DataLoader(Stream(9), 2))[1])


def test_a_streams_state_is_refused_by_a_map_style_loader():
    cut = ShardedLoader(DataLoader(Stream(9), 2), world=single())
    next(iter(cut))
    for _ in itertools.islice(cut, 1):
        state = cut.state_dict()
    with pytest.raises(CheckpointError, match="kind of sampling was 'stream'"):
        ShardedLoader(DataLoader(range(9), 2), world=single()).load_state_dict(state)
