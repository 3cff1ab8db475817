"""ShardedLoader over map-style data. Ranks without a process group stand beside each other in one process."""

from __future__ import annotations

import itertools
import random
import warnings
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from nbaccel.core.data import ShardedLoader
from nbaccel.core.world import World, single
from nbaccel.errors import CheckpointError, ConfigError
from nbaccel.wire import events


class Numbers(Dataset):
    """Sample i is i; counts how many were read in this process."""

    def __init__(self, total):
        self.total = total
        self.reads = 0

    def __len__(self):
        return self.total

    def __getitem__(self, index):
        self.reads += 1
        return torch.tensor(index)


class Noisy(Numbers):
    """Random augmentation from all three generators."""

    def __getitem__(self, index):
        import numpy

        return torch.tensor([index, float(torch.rand(())), random.random(), numpy.random.rand()]).double()


def world(rank, size, local_size=None):
    local = local_size or size
    return World(
        rank=rank,
        local_rank=rank % local,
        size=size,
        local_size=local,
        device=torch.device("cpu"),
        backend=None,
    )


def ranks(size, make, **options):
    """A loader for every rank of a world, each over a DataLoader of its own."""
    return [ShardedLoader(make(), world=world(r, size), **{"seed": 3, **options}) for r in range(size)]


def take(loaders, steps=None):
    """Real samples by global batch that the loaders give together, `steps` of them."""
    batches = []
    passes = [iter(loader) for loader in loaders]
    for together in itertools.islice(zip(*passes, strict=True), steps):
        real = [
            value
            for loader, batch in zip(loaders, together, strict=True)
            for value in batch[: loader.batch_samples].flatten().tolist()
        ]
        assert {loader.global_batch_samples for loader in loaders} == {len(real)}
        batches.append(real)
    return batches


def flat(batches):
    return [value for batch in batches for value in batch]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_equal_torchs_when_there_is_one_rank(num_workers):
    def make():
        return DataLoader(Numbers(23), batch_size=4, num_workers=num_workers)

    ours = list(ShardedLoader(make(), world=single()))
    assert all(torch.equal(a, b) for a, b in zip(ours, make(), strict=True))


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(torch.randn(11, 3), torch.arange(11)),
        Subset(TensorDataset(torch.randn(30, 2), torch.arange(30)), list(range(5, 25, 2))),
        Subset(Subset(TensorDataset(torch.arange(40)), list(range(10, 30))), [3, 1, 4, 15, 9]),
    ],
)
def test_tensor_datasets_give_what_torchs_loader_gives_by_the_fast_path(dataset):
    make = lambda: DataLoader(dataset, batch_size=4)  # noqa: E731
    for ours, theirs in zip(ShardedLoader(make(), world=single()), make(), strict=True):
        assert type(ours) is type(theirs)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True))
        assert all(a.data_ptr() != t.data_ptr() for a in ours for t in getattr(dataset, "tensors", ()))


def test_getitems_is_called_once_per_batch_when_the_dataset_has_it():
    class Batched(Numbers):
        def __getitems__(self, indices):
            self.reads += 1
            return [torch.tensor(i) for i in indices]

    dataset = Batched(10)
    loaders = ranks(2, lambda: DataLoader(dataset, batch_size=3))
    assert sorted(flat(take(loaders))) == list(range(10))
    assert dataset.reads == 4


@pytest.mark.parametrize("options", [{}, {"shard": "contiguous"}, {"split_batches": True}])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_sample_is_seen_once_and_all_ranks_take_equally_many_steps(size, options):
    batch = 8 if "split_batches" in options else 2
    loaders = ranks(size, lambda: DataLoader(Numbers(37), batch_size=batch, shuffle=True), **options)
    batches = take(loaders)
    assert sorted(flat(batches)) == list(range(37))
    assert {len(loader) for loader in loaders} == {len(batches)}


def test_the_order_is_the_same_for_every_world_size_and_differs_by_epoch():
    def epochs(size):
        loaders = ranks(size, lambda: DataLoader(Numbers(50), batch_size=12 // size, shuffle=True))
        return [[sorted(batch) for batch in take(loaders)] for _ in range(3)]

    assert epochs(1) == epochs(2) == epochs(4) == epochs(12)
    assert epochs(1)[0] != epochs(1)[1] != epochs(1)[2]


def test_a_rank_without_a_sample_gets_one_that_counts_for_nothing():
    loaders = ranks(4, lambda: DataLoader(Numbers(9), batch_size=2))
    *_, last = zip(*loaders, strict=True)
    assert [batch.tolist() for batch in last] == [[8], [8], [8], [8]]
    seen = []
    for loader in loaders:
        for _ in loader:
            seen.append((loader.batch_samples, loader.batch_repeated, loader.at_end))
    assert seen == [(2, 0, False), (1, 0, True)] + 3 * [(2, 0, False), (0, 1, True)]


def test_even_batches_fills_batches_aloud_and_does_not_count_the_repeated():
    with pytest.warns(UserWarning, match="adds 3 repeats to its 1 sample,"):
        loaders = ranks(2, lambda: DataLoader(Numbers(9), batch_size=2), even_batches=True)
    lengths = [[len(batch) for batch in loader] for loader in loaders]
    assert lengths == [[2, 2, 2], [2, 2, 2]]
    assert sorted(flat(take(loaders))) == list(range(9))


def test_drop_last_leaves_out_the_tail_and_says_when_nothing_is_left():
    loaders = ranks(2, lambda: DataLoader(Numbers(11), batch_size=2, drop_last=True))
    assert sorted(flat(take(loaders))) == list(range(8))
    assert loaders[0].total_samples == 8
    with pytest.warns(UserWarning, match="no batch at all"):
        assert len(ranks(2, lambda: DataLoader(Numbers(3), batch_size=2, drop_last=True))[0]) == 0


def test_unbatched_loading_gives_each_rank_single_samples():
    loaders = ranks(2, lambda: DataLoader(Numbers(5), batch_size=None))
    assert [[int(sample) for sample in loader] for loader in loaders] == [[0, 2, 4], [1, 3, 4]]
    (values,) = {
        tuple(int(s) for s in ranks(1, lambda: DataLoader(Numbers(3), batch_size=None, num_workers=1))[0])
    }
    assert values == (0, 1, 2)


def test_a_collate_fn_of_the_user_makes_the_batches():
    loaders = ranks(
        2, lambda: DataLoader(Numbers(6), batch_size=2, collate_fn=lambda s: {"x": torch.stack(s)})
    )
    assert [batch["x"].tolist() for batch in loaders[1]] == [[1, 3], [5]]


# Resuming ------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    legs=st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 12)), min_size=1, max_size=5
    ),
    total=st.integers(1, 90),
    kind=st.sampled_from(["plain", "shuffle", "sampler", "generator", "batches"]),
)
def test_each_sample_is_seen_once_when_stopped_and_resumed_on_other_worlds(legs, total, kind):
    def make(batch):
        dataset = Numbers(total)
        if kind == "sampler":
            return DataLoader(dataset, batch_size=batch, sampler=SubsetRandomSampler(range(total)))
        if kind == "generator":
            generator = torch.Generator().manual_seed(random.randrange(1000) if state is not None else 5)
            return DataLoader(dataset, batch, sampler=SubsetRandomSampler(range(total), generator=generator))
        if kind == "batches":
            chunks = [list(range(i, min(i + 3, total))) for i in range(0, total, 3)]
            return DataLoader(dataset, batch_sampler=chunks)
        return DataLoader(dataset, batch_size=batch, shuffle=kind == "shuffle")

    state, seen = None, []
    for number, (size, batch, steps) in enumerate(legs):
        made = ranks(size, lambda batch=batch: make(batch), seed=9 + number)
        if state is not None:
            for loader in made:
                loader.load_state_dict(state)
        seen += flat(take(made, None if number == len(legs) - 1 else steps))
        state = made[0].state_dict()
        assert all(loader.state_dict()["samples"] == state["samples"] for loader in made)
        if state["epoch"]:  # the leg came to the end of the epoch
            break
    assert Counter(seen) == Counter(range(total))


def test_resuming_gives_the_batches_an_uninterrupted_run_gives_and_goes_on_with_the_next_epoch():
    def make():
        return DataLoader(Numbers(40), batch_size=3, shuffle=True)

    whole = ShardedLoader(make(), world=single(), seed=1)
    expected = [batch.tolist() for _ in range(3) for batch in whole]
    broken = ShardedLoader(make(), world=single(), seed=1)
    got = [batch.tolist() for batch in broken] + [b.tolist() for b in itertools.islice(broken, 5)]
    resumed = ShardedLoader(make(), world=single(), seed=99)
    resumed.load_state_dict(broken.state_dict())
    assert (resumed.epoch, resumed.position) == (1, 15)
    got += [batch.tolist() for _ in range(2) for batch in resumed]
    assert got == expected


def test_resuming_far_into_an_epoch_reads_one_batch_only():
    dataset = Numbers(10**9)
    loader = ShardedLoader(DataLoader(dataset, batch_size=1, sampler=None), world=single(), seed=1)
    state = loader.state_dict() | {"samples": 10**6, "cursor": 10**6}
    loader.load_state_dict(state)
    assert next(iter(loader)).tolist() == [10**6]
    assert dataset.reads == 1


def test_resuming_a_users_sampler_draws_its_indices_without_reading_samples():
    dataset = Numbers(1000)
    weights = torch.arange(1.0, 1001.0)

    def make():
        return DataLoader(dataset, batch_size=4, sampler=WeightedRandomSampler(weights, 600))

    first = ShardedLoader(make(), world=single(), seed=2)
    expected = [batch.tolist() for batch in first]
    cut = ShardedLoader(make(), world=single(), seed=2)
    head = [batch.tolist() for batch in itertools.islice(cut, 100)]
    again = ShardedLoader(make(), world=single(), seed=0)
    again.load_state_dict(cut.state_dict())
    dataset.reads = 0
    tail = [batch.tolist() for batch in itertools.islice(again, 1)]
    assert dataset.reads == 4
    assert head + tail == expected[:101]
    assert first.with_replacement


def test_a_samplers_generator_is_taken_up_where_the_epoch_began():
    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(
            Numbers(30), 4, sampler=RandomSampler(range(30), num_samples=20, generator=generator)
        )

    whole = ShardedLoader(make(1), world=single(), seed=0)
    expected = [[b.tolist() for b in whole] for _ in range(3)]
    cut = ShardedLoader(make(1), world=single(), seed=0)
    got = [[b.tolist() for b in cut], [b.tolist() for b in itertools.islice(cut, 2)]]
    resumed = ShardedLoader(make(777), world=single(), seed=0)
    resumed.load_state_dict(cut.state_dict())
    got[1] += [b.tolist() for b in resumed]
    got.append([b.tolist() for b in resumed])
    assert got == expected


def test_a_stateful_sampler_and_an_endless_one_are_followed():
    class Endless:
        """Counts on over epochs; its state is where it stands."""

        def __init__(self):
            self.at = 0

        def __iter__(self):
            while True:
                self.at += 1
                yield self.at - 1

        def state_dict(self):
            return {"at": self.at}

        def load_state_dict(self, state):
            self.at = state["at"]

    loader = ShardedLoader(DataLoader(Numbers(10**6), 3, sampler=Endless()), world=single())
    assert [b.tolist() for b in itertools.islice(loader, 2)] == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(TypeError, match="length of this loader is unknown"):
        len(loader)
    other = ShardedLoader(DataLoader(Numbers(10**6), 3, sampler=Endless()), world=single())
    other.load_state_dict(loader.state_dict())
    assert next(iter(other)).tolist() == [6, 7, 8]


@pytest.mark.parametrize(("kind", "persistent"), [("shuffle", True), ("sampler", False)])
def test_position_counts_what_the_loop_consumed_with_workers(kind, persistent):
    def make():
        sampler = SubsetRandomSampler(range(41)) if kind == "sampler" else None
        return DataLoader(
            Numbers(41),
            batch_size=2,
            shuffle=sampler is None,
            sampler=sampler,
            num_workers=2,
            prefetch_factor=3,
            persistent_workers=persistent,
        )

    here = ShardedLoader(DataLoader(Numbers(41), 2, shuffle=kind == "shuffle", sampler=make().sampler
                                    if kind == "sampler" else None), world=single(), seed=4)  # fmt: skip
    expected = [[b.tolist() for b in here] for _ in range(3)]
    loader = ShardedLoader(make(), world=single(), seed=4)
    assert [b.tolist() for b in loader] == expected[0]
    head = [b.tolist() for b in itertools.islice(loader, 6)]
    assert loader.position == 12
    resumed = ShardedLoader(make(), world=single(), seed=0)
    resumed.load_state_dict(loader.state_dict())
    assert head + [b.tolist() for b in resumed] == expected[1]
    assert [b.tolist() for b in resumed] == expected[2]
    # The loader that was left in the middle goes on to its next epoch as well.
    assert [b.tolist() for b in loader] == expected[2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_random_augmentation_resumes_bit_for_bit_when_seeded_per_sample(num_workers):
    def make(workers=num_workers):
        return DataLoader(Noisy(26), batch_size=3, shuffle=True, num_workers=workers)

    def seeded(loader):
        return ShardedLoader(loader, world=single(), seed=6, per_sample_seed=True)

    whole = seeded(make(0))
    expected = torch.cat([batch for _ in range(2) for batch in whole])
    cut = seeded(make())
    got = list(cut) + list(itertools.islice(cut, 4))
    resumed = seeded(make())
    resumed.load_state_dict(cut.state_dict())
    torch.rand(17)
    assert torch.equal(torch.cat(got + list(resumed)), expected)
    # Another epoch, and another index, is other noise.
    assert len(set(expected[:, 1].tolist())) == 52


def test_per_sample_seeding_gives_the_same_samples_on_any_world_size():
    def noise(size):
        loaders = ranks(size, lambda: DataLoader(Noisy(20), 2, shuffle=True), per_sample_seed=True)
        rows = [
            row for loader in loaders for batch in loader for row in batch[: loader.batch_samples].tolist()
        ]
        return sorted(rows)

    assert noise(1) == noise(2) == noise(3)


@pytest.mark.parametrize("options", [{}, {"per_sample_seed": True}, {"num_workers": 1}, {"sampler": True}])
def test_loading_leaves_the_training_loops_generators_alone(options):
    sampler = SubsetRandomSampler(range(8)) if options.pop("sampler", False) else None
    loader = ShardedLoader(
        DataLoader(
            Numbers(8), 2, shuffle=sampler is None, sampler=sampler, num_workers=options.pop("num_workers", 0)
        ),
        world=single(),
        **options,
    )
    before = torch.get_rng_state(), random.getstate()
    list(loader)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_a_new_pass_after_a_break_is_the_next_epoch():
    loader = ShardedLoader(DataLoader(Numbers(30), 3, shuffle=True), world=single(), seed=1)
    first = [b.tolist() for b in itertools.islice(loader, 2)]
    assert (loader.epoch, loader.position) == (0, 6)
    second = [b.tolist() for b in itertools.islice(loader, 2)]
    assert loader.epoch == 1
    assert first != second


def test_set_epoch_keeps_the_place_of_the_epoch_resumed_and_leaves_any_other():
    make = lambda: DataLoader(Numbers(30), 3, shuffle=True)  # noqa: E731
    cut = ShardedLoader(make(), world=single(), seed=1)
    cut.set_epoch(4)
    head = [b.tolist() for b in itertools.islice(cut, 2)]
    again = ShardedLoader(make(), world=single(), seed=1)
    again.load_state_dict(cut.state_dict())
    again.set_epoch(4)
    whole = ShardedLoader(make(), world=single(), seed=1)
    whole.set_epoch(4)
    assert head + [b.tolist() for b in again] == [b.tolist() for b in whole]
    again.load_state_dict(cut.state_dict())
    again.set_epoch(5)
    assert (again.epoch, again.position) == (5, 0)
    with pytest.raises(ConfigError, match="at least 0"):
        again.set_epoch(-1)


def test_a_state_at_the_very_end_of_an_epoch_yields_nothing_more_of_it():
    loader = ShardedLoader(DataLoader(Numbers(7), 3), world=single())
    for _ in loader:
        state = loader.state_dict()
    other = ShardedLoader(DataLoader(Numbers(7), 3), world=single())
    other.load_state_dict(state)
    assert list(other) == []
    assert (other.epoch, len(list(other))) == (1, 3)
    assert loader.state_dict()["epoch"] == 1


def test_state_survives_torch_save_without_pickled_code(tmp_path):
    loader = ShardedLoader(
        DataLoader(Numbers(9), 2, sampler=SubsetRandomSampler(range(9), generator=torch.Generator())),
        world=single(),
    )
    next(iter(loader))
    torch.save(loader.state_dict(), tmp_path / "loader")
    loaded = torch.load(tmp_path / "loader", weights_only=True)
    ShardedLoader(loader.dataloader, world=single()).load_state_dict(loaded)


# Samplers, nodes, shards -----------------------------------------------------------------------------


def test_a_users_samplers_draw_the_same_on_every_rank_without_a_generator():
    loaders = ranks(3, lambda: DataLoader(Numbers(20), 2, sampler=SubsetRandomSampler(range(20))))
    for number, loader in enumerate(loaders):
        torch.manual_seed(number)
        assert loader.epoch == 0
    assert sorted(flat(take(loaders))) == list(range(20))


def test_a_batch_samplers_batches_go_whole_to_ranks_and_the_rest_is_divided():
    batches = [[0, 1, 2], [3], [4, 5], [6, 7], [8, 9, 10, 11]]
    loaders = ranks(2, lambda: DataLoader(Numbers(12), batch_sampler=batches))
    assert [[b.tolist() for b in loader] for loader in loaders] == [
        [[0, 1, 2], [4, 5], [8, 10]],
        [[3], [6, 7], [9, 11]],
    ]
    split = ranks(2, lambda: DataLoader(Numbers(12), batch_sampler=batches), split_batches=True)
    assert [b.tolist() for b in split[1]] == [[1], [3], [5], [7], [9, 11]]
    assert len(split[0]) == 5


def test_a_plain_batch_sampler_is_taken_apart():
    sampler = BatchSampler(RandomSampler(range(20)), 4, False)
    loaders = ranks(2, lambda: DataLoader(Numbers(20), batch_sampler=sampler))
    assert loaders[0].total_batch_size == 8
    assert sorted(flat(take(loaders))) == list(range(20))


def test_a_distributed_sampler_is_replaced_aloud():
    dataset = Numbers(9)
    with pytest.warns(UserWarning, match="DistributedSampler is replaced"):
        loaders = ranks(
            2, lambda: DataLoader(dataset, 2, sampler=DistributedSampler(dataset, num_replicas=2, rank=0))
        )
    assert sorted(flat(take(loaders))) == list(range(9))


def test_node_sharding_keeps_nodes_to_their_parts_and_finishes_an_epoch_on_fewer_nodes_aloud():
    def loaders(size, local):
        make = lambda: DataLoader(Numbers(40), 2, shuffle=True)  # noqa: E731
        return [ShardedLoader(make(), world=world(r, size, local), seed=1, shard="node") for r in range(size)]

    four = loaders(4, 2)
    seen = flat(take(four, 2))
    part = {int(v) // 20 for b in itertools.islice(loaders(4, 2)[3], 5) for v in b}
    assert part == {1}
    two = loaders(2, 2)
    for loader in two:
        with pytest.warns(UserWarning, match="saved on 2 node"):
            loader.load_state_dict(four[0].state_dict())
    assert sorted(seen + flat(take(two))) == list(range(40))


def test_set_epoch_reaches_samplers_and_datasets_that_ask_for_it():
    class Told(Numbers):
        epoch = None

        def set_epoch(self, epoch):
            self.epoch = epoch

    class Sampler(Told):
        def __iter__(self):
            return iter(range(self.total))

    dataset, sampler = Told(4), Sampler(4)
    loader = ShardedLoader(DataLoader(dataset, 2, sampler=sampler), world=single())
    list(loader)
    list(loader)
    assert (dataset.epoch, sampler.epoch) == (1, 1)


@pytest.mark.parametrize("kind", ["order", "sampler", "batches", "stream"])
def test_skip_batches_begins_the_next_pass_further_on_and_only_that(kind):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(torch.arange(20))

    def make():
        if kind == "stream":
            return DataLoader(Stream(), 2)
        if kind == "batches":
            return DataLoader(Numbers(20), batch_sampler=[[0], [1, 2, 3], [4, 5], [6, 7, 8], [9]])
        generator = torch.Generator().manual_seed(4)
        sampler = SubsetRandomSampler(range(20), generator=generator) if kind == "sampler" else None
        return DataLoader(Numbers(20), 2, sampler=sampler)

    whole = ranks(2, make)
    expected = [[[batch.tolist() for batch in loader] for _ in range(2)] for loader in whole]
    loaders = ranks(2, make)
    for loader, (first, second) in zip(loaders, expected, strict=True):
        if kind == "stream":
            with pytest.warns(UserWarning, match="8 samples will be read and dropped"):
                loader.skip_batches(2)
        else:
            loader.skip_batches(1)
            loader.skip_batches(1)
        assert loader.position == {"batches": 9}.get(kind, 8)
        assert [batch.tolist() for batch in loader] == first[2:]
        assert [batch.tolist() for batch in loader] == second
    with pytest.raises(ConfigError, match="at least 0"):
        loaders[0].skip_batches(-1)


def test_in_order_false_is_not_followed_aloud():
    with pytest.warns(UserWarning, match="in_order=False is not followed"):
        ShardedLoader(DataLoader(Numbers(4), num_workers=1, in_order=False), world=single())


# What is told while it runs --------------------------------------------------------------------------


class Listener:
    def __init__(self):
        self.heard = []

    def emit(self, event):
        self.heard.append(event)

    def requests(self):
        return []


def test_progress_is_told_seldom_and_always_at_the_end():
    listener = Listener()
    loader = ShardedLoader(DataLoader(Numbers(1000), 1), world=single(), name="epoch")
    events.connect(listener)
    try:
        list(loader)
        whole = len(listener.heard)
        list(itertools.islice(loader, 7))
    finally:
        events.connect(None)
    assert 2 <= whole <= 50
    last = listener.heard[whole - 1]
    assert (last.name, last.step, last.total, last.epoch, last.unit) == ("epoch", 1000, 1000, 0, "batch")
    assert (listener.heard[-1].step, listener.heard[-1].epoch) == (7, 1)


class Growing(Dataset):
    def __init__(self, total):
        self.total = total

    def __len__(self):
        return self.total

    def __getitem__(self, index):
        if not 0 <= index < self.total:
            raise IndexError(index)
        return torch.tensor(index)


class Control:
    def __init__(self, stop_after):
        self.heard, self.left = [], stop_after

    def began(self, loader):
        self.heard.append("began")

    def ended(self, loader):
        self.heard.append("ended")

    def should_stop(self, loader):
        self.left -= 1
        return self.left < 0

    def why_stopped(self, loader):
        return f"enough of {loader.name!r}"

    def times(self, loader):
        return None


def test_a_state_loaded_when_the_pass_is_about_to_begin_is_where_it_begins():
    cut = ShardedLoader(DataLoader(Numbers(20), 2, shuffle=True), world=single(), seed=1)
    list(cut)
    head = [b.tolist() for b in itertools.islice(cut, 3)]
    state = cut.state_dict()

    class Resuming(Control):
        def began(self, loader):
            if not self.heard:
                loader.load_state_dict(state)
            super().began(loader)

    loader = ShardedLoader(
        DataLoader(Numbers(20), 2, shuffle=True), world=single(), seed=1, loop=Resuming(10**6)
    )
    whole = ShardedLoader(DataLoader(Numbers(20), 2, shuffle=True), world=single(), seed=1)
    expected = [[b.tolist() for b in whole] for _ in range(3)]
    assert head + [b.tolist() for b in loader] == expected[1]
    assert [b.tolist() for b in loader] == expected[2]


def test_a_loop_that_is_stopped_keeps_its_place():
    control = Control(3)
    loader = ShardedLoader(DataLoader(Numbers(20), 2), world=single(), loop=control)
    assert [b.tolist() for b in loader] == [[0, 1], [2, 3], [4, 5]]
    assert control.heard == ["began", "ended"]
    other = ShardedLoader(DataLoader(Numbers(20), 2), world=single())
    other.load_state_dict(loader.state_dict())
    assert next(iter(other)).tolist() == [6, 7]
    with pytest.raises(StopIteration, match="enough of 'train'"):
        next(iter(loader))


def test_a_pass_left_by_a_break_goes_on_from_its_checkpoint_and_ends_in_the_process():
    def make():
        return ShardedLoader(DataLoader(Numbers(20), 2, shuffle=True), world=single(), seed=1)

    run, seen = make(), []
    for number, batch in enumerate(run):
        seen += batch.tolist()
        if number == 2:
            break
    state = run.state_dict()
    assert (state["epoch"], state["samples"]) == (0, 6)
    resumed = make()
    resumed.load_state_dict(state)
    assert sorted(seen + [x for b in resumed for x in b.tolist()]) == list(range(20))
    assert [b.tolist() for b in run] == [b.tolist() for b in resumed]  # the next epoch


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"num_workers": 1, "persistent_workers": True}])
def test_a_data_set_that_grows_or_shrinks_is_read_whole_from_the_next_pass_on(options):
    dataset = Growing(4)
    loaders = ranks(2, lambda: DataLoader(dataset, batch_size=2, **options))
    for total in (4, 9, 2):
        if total != 9:
            dataset.total = total
        assert len(loaders[0]) == -(-total // 4)
        seen = [[], []]
        for held, loader in zip(seen, loaders, strict=True):
            for number, batch in enumerate(loader):
                held += batch[: loader.batch_samples].tolist()
                if total == 4 and loader is loaders[1] and number == 0:
                    dataset.total = 9  # within a pass it stays as it was
                    assert len(loader) == 1
        assert sorted(seen[0] + seen[1]) == list(range(total))
        assert loaders[0].remeasured == (0 if total == 4 else total)


def test_a_data_set_that_changes_before_a_resumed_pass_is_refused():
    dataset = Growing(8)
    loader = ShardedLoader(DataLoader(dataset, batch_size=2), world=single())
    loader.skip_batches(2)
    dataset.total = 6
    with pytest.raises(CheckpointError, match="length was 8, this one's is 6"):
        next(iter(loader))


def test_indices_and_counts_describe_the_batch_in_hand_only():
    loader = ShardedLoader(DataLoader(Numbers(5), 2), world=single())
    assert (loader.batch_samples, loader.at_end, loader.batch_indices) == (0, False, None)
    seen = [(list(loader.batch_indices), loader.batch_samples, loader.at_end) for _ in loader]
    assert seen == [([0, 1], 2, False), ([2, 3], 2, False), ([4], 1, True)]
    assert (loader.batch_samples, loader.at_end) == (0, False)
    assert loader.data_seconds > 0


# What is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loader", "options", "says"),
    [
        ([1, 2, 3], {}, "a list cannot be sharded"),
        (DataLoader(Numbers(4)), {"shard": "contigous"}, "Did you mean 'contiguous'"),
        (DataLoader(Numbers(4)), {"shard": "none"}, "iterable data set"),
        (DataLoader(Numbers(4), sampler=[1, 2]), {"shard": "node"}, "map-style data set with plain"),
        (DataLoader(Numbers(4), batch_size=1), {"split_batches": True}, "batch_size=1 over 2 ranks"),
        (DataLoader(Numbers(4), batch_size=None), {"split_batches": True}, "batch_size=None"),
        (DataLoader(Numbers(4), 3), {"split_batches": True, "even_batches": True}, "share equally"),
        (DataLoader(Numbers(4)), {"seed": "one"}, "seed must be an int"),
        (
            DataLoader(Numbers(4), sampler=DistributedSampler(Numbers(4), num_replicas=3, rank=0)),
            {},
            "divides over 3 ranks, but there are 2",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(loader, options, says):
    with pytest.raises(ConfigError, match=says):
        ShardedLoader(loader, world=world(0, 2), **options)


def test_a_loader_that_iterates_in_its_own_way_is_refused():
    class Own(DataLoader):
        def __iter__(self):
            return super().__iter__()

    with pytest.raises(ConfigError, match="Own iterates in its own way"):
        ShardedLoader(Own(Numbers(4)), world=single())


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({}, "not the state of a loader"),
        ({"format": 1}, "it lacks cursor"),
        (None, "not the state of a loader"),
    ],
)
def test_a_state_that_is_none_is_refused(state, says):
    with pytest.raises(CheckpointError, match=says):
        ShardedLoader(DataLoader(Numbers(4)), world=single()).load_state_dict(state)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: DataLoader(Numbers(21), 2), "length was 20, this one's is 21"),
        (lambda: DataLoader(Numbers(20), 2, shuffle=True), "shuffling was False"),
        (lambda: DataLoader(Numbers(20), 2, sampler=range(20)), "kind of sampling was 'order'"),
    ],
)
def test_a_state_of_another_dataset_or_order_is_refused_in_the_middle_of_an_epoch(make, says):
    loader = ShardedLoader(DataLoader(Numbers(20), 2), world=single())
    for _ in itertools.islice(loader, 3):
        state = loader.state_dict()
    with pytest.raises(CheckpointError, match=says):
        ShardedLoader(make(), world=single()).load_state_dict(state)
    for changed in ({"samples": -1}, {"epoch": "two"}):
        with pytest.raises(CheckpointError, match="impossible counts"):
            loader.load_state_dict(state | changed)


def test_two_passes_at_once_are_refused():
    loader = ShardedLoader(DataLoader(Numbers(20), 2), world=single())
    outer = iter(loader)
    next(outer)
    assert [b.tolist() for b in itertools.islice(loader, 1)] == [[0, 1]]
    with pytest.raises(ConfigError, match="iterated twice at once"):
        next(outer)


def test_an_error_in_the_dataset_reaches_the_loop_and_keeps_the_place():
    class Broken(Numbers):
        def __getitem__(self, index):
            if index == 5:
                raise ValueError("sample 5 is broken")
            return super().__getitem__(index)

    loader = ShardedLoader(DataLoader(Broken(8), 2), world=single())
    with pytest.raises(ValueError, match="sample 5 is broken"):
        list(loader)
    assert loader.position == 4


def test_no_warning_is_given_when_nothing_is_odd():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(ShardedLoader(DataLoader(Numbers(9), 2, pin_memory=True), world=single()))
