"""When what is told of ranks that wait is the same again; on real ranks in `test_stacks_on_ranks`."""

from __future__ import annotations

from nbaccel.session.watch import _timeless

LOADER = "rank {}: it waits for its DataLoader: worker pid 55{} is in __getitem__ train.py:8 for {} s"


def test_findings_are_the_same_when_only_time_and_order_differ() -> None:
    before = _timeless("\n".join(LOADER.format(rank, rank, 4) for rank in (0, 1)))
    assert _timeless("\n".join(LOADER.format(rank, rank, 9) for rank in (1, 0))) == before
    assert _timeless(LOADER.format(1, 1, 14)) <= before
    assert not _timeless(LOADER.format(1, 2, 4)) <= before


def test_findings_are_others_when_the_collective_is_another() -> None:
    text = "rank 1 has not called all_reduce #{}; it runs in f (computes, cpu {} %); rank 0 waits 5 s"
    assert _timeless(text.format(8, 97)) == _timeless(text.format(8, 100))
    assert _timeless(text.format(8, 97)) != _timeless(text.format(9, 97))
