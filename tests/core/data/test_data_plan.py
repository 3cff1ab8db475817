"""The pure part of the loader: orders, and who reads what, over random world sizes and interruptions."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nbaccel.core.data.order import ByNode, Sequential, Shuffled, epoch_order
from nbaccel.core.data.plan import (
    Layout,
    all_shares,
    groups_of,
    num_batches,
    order_groups,
    own_shares,
)
from nbaccel.errors import ConfigError

BOOL, NO = st.booleans(), st.just(False)
KINDS = st.sampled_from(["interleaved", "contiguous"])


def _everything(order):
    return order.take(torch.arange(order.total)).tolist()


@given(total=st.integers(0, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 5))
def test_shuffled_is_a_permutation_when_small(total, seed, epoch):
    assert sorted(_everything(Shuffled(total, seed, epoch))) == list(range(total))


@settings(max_examples=15, deadline=None)
@given(total=st.integers(32769, 70000), seed=st.integers(0, 2**63 - 1))
def test_shuffled_is_a_permutation_when_computed_by_position(total, seed):
    found = Shuffled(total, seed, 1).take(torch.arange(total))
    assert torch.equal(found.sort().values, torch.arange(total))


def test_shuffled_looks_random_when_computed_by_position():
    total, bins = 100_003, 64
    for seed in range(4):
        found = Shuffled(total, seed, 0).take(torch.arange(total))
        for steps in ((found[1:] - found[:-1]) % total, (found - torch.arange(total)) % total):
            counts = torch.bincount(steps * bins // total, minlength=bins).double()
            expected = len(steps) / bins
            chi_squared = float(((counts - expected) ** 2 / expected).sum())
            # 63 degrees of freedom: mean 63, deviation 11.2; a weak round function gave 180.
            assert chi_squared < 63 + 5 * 11.2


def test_shuffled_gives_the_same_indices_when_asked_anywhere():
    order = Shuffled(10**12, 7, 3)
    far = torch.arange(10**12 - 500, 10**12)
    whole = order.take(far)
    assert torch.equal(order.take(far[123:200]), whole[123:200])
    assert int(whole.min()) >= 0
    assert int(whole.max()) < 10**12


def test_shuffled_differs_when_seed_or_epoch_differ():
    for total in (100, 50_000):
        orders = [Shuffled(total, s, e).take(torch.arange(100)).tolist() for s, e in ((0, 0), (0, 1), (1, 0))]
        assert orders[0] != orders[1] != orders[2] != orders[0]


@given(total=st.integers(0, 500), nodes=st.integers(1, 6), seed=st.none() | st.integers(0, 99))
def test_by_node_is_a_permutation_that_keeps_each_node_to_its_part(total, nodes, seed):
    found = _everything(ByNode(total, nodes, seed, 2))
    assert sorted(found) == list(range(total))
    for node in range(nodes):
        part = sorted(found[node::nodes])
        assert part == list(range(part[0], part[0] + len(part))) if part else True


@st.composite
def layouts(draw, drop_last=BOOL, even=NO):
    size = draw(st.integers(1, 9))
    nodes = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    even_batches = draw(even)
    equal = even_batches or draw(BOOL)
    return Layout(
        size=size,
        global_batch=draw(st.integers(1, 5)) * size if equal else draw(st.integers(1, 40)),
        drop_last=draw(drop_last),
        even_batches=even_batches,
        shard=draw(KINDS),
        nodes=nodes,
    )


@given(
    layout=layouts(even=st.booleans()),
    total=st.integers(0, 400),
    start=st.integers(0, 400),
    tensors=st.booleans(),
)
def test_a_rank_alone_computes_what_all_together_would(layout, total, start, tensors):
    start = min(start, total)
    order = epoch_order(total, shuffle=True, seed=5, epoch=1, nodes=layout.nodes)
    for rank in range(layout.size):
        alone = list(own_shares(order, layout, rank, start, tensors=tensors))
        together = list(all_shares(order_groups(order, layout, start), layout, (rank,)))
        assert [list(map(int, s.indices)) for s in alone] == [s.indices for s in together]
        assert [s[1:7] for s in alone] == [s[1:7] for s in together]


@given(layout=layouts(even=st.booleans()), total=st.integers(0, 400), start=st.integers(0, 400))
def test_global_batches_are_the_same_when_drawn_one_by_one(layout, total, start):
    start = min(start, total)
    order = Sequential(total)
    assert list(groups_of(iter(range(start, total)), layout, cursor=start)) == list(
        order_groups(order, layout, start)
    )


@given(layout=layouts(), total=st.integers(0, 400), start=st.integers(0, 400))
def test_shares_of_a_global_batch_are_even_and_counted_truly(layout, total, start):
    start = min(start, total)
    order = epoch_order(total, shuffle=True, seed=5, epoch=1, nodes=layout.nodes)
    per_rank = [list(own_shares(order, layout, rank, start)) for rank in range(layout.size)]
    steps = num_batches(layout, total, start)
    assert {len(shares) for shares in per_rank} == {steps}
    for number, shares in enumerate(zip(*per_rank, strict=True)):
        counts = [share.samples for share in shares]
        assert max(counts) - min(counts) <= 1
        assert {share.global_samples for share in shares} == {sum(counts)}
        assert {share.last for share in shares} == {number == steps - 1}
        for share in shares:
            assert len(share.indices) == share.samples + share.repeated
            assert share.repeated == (share.samples == 0)


@settings(max_examples=300, deadline=None)
@given(
    legs=st.lists(st.tuples(layouts(drop_last=NO, even=BOOL), st.integers(0, 40)), min_size=1, max_size=6),
    total=st.integers(1, 500),
    shuffle=BOOL,
    nodes=st.integers(1, 3),
)
def test_each_sample_is_seen_once_over_interruptions_and_world_sizes(legs, total, shuffle, nodes):
    seen: Counter[int] = Counter()
    position = 0
    order = epoch_order(total, shuffle=shuffle, seed=11, epoch=2, nodes=nodes)
    for number, (layout, steps) in enumerate(legs):
        until = None if number == len(legs) - 1 else steps
        ranks = [own_shares(order, layout, rank, position) for rank in range(layout.size)]
        for shares in zip(*(itertools.islice(rank, until) for rank in ranks), strict=True):
            for share in shares:
                seen.update(share.indices[: share.samples])
            position = shares[0].cursor
    assert seen == Counter(range(total))


@given(
    legs=st.lists(st.tuples(st.integers(1, 5), BOOL, st.integers(0, 8)), min_size=1, max_size=5),
    lengths=st.lists(st.integers(1, 6), max_size=30),
)
def test_each_batch_of_a_batch_sampler_is_seen_once_over_world_sizes(legs, lengths):
    numbers = itertools.count()
    batches = [[next(numbers) for _ in range(length)] for length in lengths]
    seen: list[int] = []
    cursor = 0
    for number, (size, split, steps) in enumerate(legs):
        layout = Layout(size=size, global_batch=1 if split else size)
        until = None if number == len(legs) - 1 else steps
        groups = groups_of(iter(batches[cursor:]), layout, cursor=cursor, batched=True)
        for group in itertools.islice(groups, until):
            shares = list(all_shares([group], layout, range(size)))
            for share in shares:
                seen += share.indices[: share.samples]
            if not split and size == len(group.units):
                assert [share.indices for share in shares] == group.units
            cursor = group.cursor
    assert sorted(seen) == list(range(sum(lengths)))


@given(layout=layouts(drop_last=st.just(True)), total=st.integers(0, 400))
def test_drop_last_leaves_out_less_than_a_global_batch(layout, total):
    used = sum(
        share.samples for rank in range(layout.size) for share in own_shares(Sequential(total), layout, rank)
    )
    assert used == total - total % layout.global_batch


@given(total=st.integers(1, 200), size=st.integers(1, 6), batch=st.integers(1, 5), shard=KINDS)
def test_even_batches_fills_every_share_and_counts_only_real_samples(total, size, batch, shard):
    layout = Layout(size=size, global_batch=batch * size, even_batches=True, shard=shard)
    shares = [s for rank in range(size) for s in own_shares(Sequential(total), layout, rank)]
    assert {len(share.indices) for share in shares} == {batch}
    assert sum(share.samples for share in shares) == total
    assert sorted(i for share in shares for i in share.indices[: share.samples]) == list(range(total))


def test_the_epochs_global_batches_are_the_same_for_every_world_size():
    order = epoch_order(101, shuffle=True, seed=1, epoch=2)

    def batches(size):
        layout = Layout(size=size, global_batch=16)
        return [sorted(group.units) for group in order_groups(order, layout)]

    assert batches(1) == batches(2) == batches(4) == batches(8)
    assert len(batches(1)[-1]) == 101 % 16


def test_node_sharding_gives_each_rank_samples_of_its_nodes_part():
    layout = Layout(size=4, global_batch=8, shard="node", nodes=2)
    order = epoch_order(40, shuffle=True, seed=3, epoch=0, nodes=2)
    for rank in range(4):
        mine = [i for share in own_shares(order, layout, rank) for i in share.indices]
        assert len(mine) == 10
        assert {i // 20 for i in mine} == {rank // 2}


@given(total=st.integers(1, 60), size=st.integers(1, 4))
def test_a_shard_function_decides_the_rank_of_each_sample(total, size):
    layout = Layout(size=size, global_batch=3 * size, shard=lambda indices, n: [i % n for i in indices])
    groups = list(order_groups(Sequential(total), layout))
    for rank in range(size):
        real = [i for s in all_shares(groups, layout, (rank,)) for i in s.indices[: s.samples]]
        assert real == [i for i in range(total) if i % size == rank]


@pytest.mark.parametrize(
    ("assign", "says"),
    [(lambda indices, n: [0], "returned 1 ranks"), (lambda indices, n: [n] * len(indices), "to rank 2")],
)
def test_a_shard_function_is_refused_when_it_gives_no_valid_ranks(assign, says):
    layout = Layout(size=2, global_batch=4, shard=assign)
    with pytest.raises(ConfigError, match=says):
        list(all_shares(order_groups(Sequential(8), layout), layout, (0,)))


def test_layout_is_refused_when_its_numbers_cannot_be():
    with pytest.raises(ConfigError, match="3 ranks cannot be spread evenly over 2 nodes"):
        Layout(size=3, global_batch=3, nodes=2)
    with pytest.raises(ConfigError, match="at least 1 sample"):
        Layout(size=3, global_batch=0)
