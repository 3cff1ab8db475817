"""Batches moved to the device by a thread ahead of the loop: which, in which order, and what becomes of the thread."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch.utils.data import DataLoader

from nbaccel.core.data import ShardedLoader
from nbaccel.core.data.plan import Share
from nbaccel.core.data.upload import DEPTH, move_tensors, uploaded_ahead
from nbaccel.core.world import single

SHARE = Share((), 1, 0, 1, 1, False)


def threads():
    return [one for one in threading.enumerate() if one.name.startswith("nbaccel-upload")]


def wait_for_no_thread():
    deadline = time.monotonic() + 20
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() == []


def numbered(count, read):
    for number in range(count):
        read.append(number)
        yield number, SHARE


def take(source, move, into):
    for coming in uploaded_ahead(source, move):
        into.append(coming.result()[0])


def take_numbers(loader, into):
    for batch in loader:
        into += batch["numbers"]


def in_thread(batch):
    return batch, threading.get_ident()


def test_batches_come_in_order_from_one_other_thread_and_few_ahead():
    read: list[int] = []
    seen = set()
    for at, coming in enumerate(uploaded_ahead(numbered(9, read), in_thread)):
        (number, thread), share = coming.result()
        assert (number, share) == (at, SHARE)
        assert len(read) == min(9, at + 1 + DEPTH)
        seen.add(thread)
    assert at == 8
    assert len(seen) == 1
    assert threading.get_ident() not in seen
    wait_for_no_thread()


def test_thread_ends_when_the_loop_is_left_early():
    started, free = threading.Event(), threading.Event()

    def move(number):
        if number == 1:
            started.set()
            assert free.wait(20)
        moved.append(number)
        return number

    moved: list[int] = []
    ahead = uploaded_ahead(numbered(9, []), move)
    assert next(ahead).result()[0] == 0
    assert started.wait(20)
    ahead.close()  # does not wait for what is under way, and drops what waits for it
    free.set()
    wait_for_no_thread()
    assert moved == [0, 1]


@pytest.mark.parametrize("where", ["read", "moved"])
def test_error_is_raised_at_the_batch_it_belongs_to(where):
    def source():
        for number in range(5):
            if where == "read" and number == 3:
                raise OSError("disk")
            yield number, SHARE

    def move(number):
        if where == "moved" and number == 3:
            raise OSError("disk")
        return number

    got = []
    with pytest.raises(OSError, match="disk"):
        take(source(), move, got)
    assert got == [0, 1, 2]
    wait_for_no_thread()


def test_interrupt_while_reading_ahead_is_not_put_off():
    def source():
        yield 0, SHARE
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(uploaded_ahead(source(), in_thread))
    wait_for_no_thread()


def test_only_plain_tensors_go_by_the_thread():
    class Own(torch.Tensor):
        pass

    sent = []

    def upload(tensors):
        sent.extend(tensors)
        return [tensor.to("meta") for tensor in tensors]

    leaf, own, sparse = torch.ones(2, requires_grad=True), Own(), torch.eye(2).to_sparse()
    plain, turned = torch.ones(3), torch.ones(2, 5).T
    batch = {"a": [plain, 3], "b": (leaf, own, sparse), "c": turned, "d": torch.ones(1, device="meta")}
    moved = move_tensors(batch, upload)
    assert [id(tensor) for tensor in sent] == [id(plain), id(turned)]
    assert (moved["a"][0].shape, moved["a"][1], moved["c"].shape) == ((3,), 3, (5, 2))
    assert all(mine is theirs for mine, theirs in zip(moved["b"], batch["b"], strict=True))
    assert {moved["a"][0].device.type, moved["c"].device.type} == {"meta"}


def make(upload=None, broken=None):
    def collate(numbers):
        if numbers[0] == broken:
            raise OSError("disk")
        return {"x": torch.tensor(numbers), "numbers": numbers}

    data = DataLoader(list(range(22)), 4, shuffle=broken is None, collate_fn=collate)
    return ShardedLoader(data, world=single(), device="meta", seed=1, upload=upload)


def to_meta(tensors):
    assert threading.current_thread() is not threading.main_thread()
    return [tensor.to("meta") for tensor in tensors]


def test_position_counts_what_the_loop_took_and_a_resumed_loop_takes_the_rest():
    whole = [batch["numbers"] for batch in make()]
    first = make(to_meta)
    seen = []
    for batch in first:
        assert batch["x"].device.type == "meta"
        seen.append(batch["numbers"])
        if len(seen) == 2:
            break
    assert (first.position, sum(map(len, seen))) == (8, 8)
    state = first.state_dict()
    wait_for_no_thread()
    resumed = make(to_meta)
    resumed.load_state_dict(state)
    assert seen + [batch["numbers"] for batch in resumed] == whole
    assert first.transfer_seconds > 0


def test_loader_counts_the_batches_before_a_broken_one():
    loader, seen = make(to_meta, broken=12), []
    with pytest.raises(OSError, match="disk"):
        take_numbers(loader, seen)
    assert seen == list(range(12))
    assert loader.position == 12
    wait_for_no_thread()
