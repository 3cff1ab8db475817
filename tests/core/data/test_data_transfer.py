"""Batches on their way to the device."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, TensorDataset

from nbaccel.core.data import ShardedLoader
from nbaccel.core.data.plan import Share
from nbaccel.core.data.transfer import Transfer
from nbaccel.core.world import single

Pair = namedtuple("Pair", "x note")
SHARE = Share((), 1, 0, 1, 1, False)


def test_nothing_is_done_on_the_cpu():
    batches = iter([(torch.ones(2), SHARE)])
    assert Transfer(torch.device("cpu")).moved(batches) is batches


def test_every_tensor_of_a_batch_moves_and_the_rest_stays():
    class Movable:
        def to(self, device):
            return ("moved", str(device))

    batch = {"a": [torch.ones(2), 3], "p": Pair(torch.zeros(1), "n"), "m": Movable()}
    ((moved, share),) = Transfer(torch.device("meta")).moved(iter([(batch, SHARE)]))
    assert share is SHARE
    assert moved["a"][0].device.type == "meta"
    assert moved["p"].x.device.type == "meta"
    assert (moved["a"][1], moved["p"].note, moved["m"]) == (3, "n", ("moved", "meta"))


def test_packed_sequences_move_and_their_sizes_stay_where_torch_reads_them():
    packed = pack_sequence([torch.ones(2, 3), torch.ones(4, 3)], enforce_sorted=False)
    (((moved, note), _),) = Transfer(torch.device("meta")).moved(iter([((packed, 1), SHARE)]))
    assert (type(moved), note) == (type(packed), 1)
    for part in (moved.data, moved.sorted_indices, moved.unsorted_indices):
        assert part.device.type == "meta"
    assert moved.batch_sizes is packed.batch_sizes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pin_memory", [False, True])
def test_packed_sequences_arrive_whole_on_cuda(pin_memory):
    def collate(numbers):
        return pack_sequence([torch.full((1 + n, 2), float(n)) for n in numbers], enforce_sorted=False)

    data = DataLoader(range(6), 2, collate_fn=collate, pin_memory=pin_memory)
    for first, packed in enumerate(ShardedLoader(data, world=single("cuda"), device="cuda")):
        rows, lengths = pad_packed_sequence(packed, batch_first=True)
        assert rows.is_cuda
        assert rows[:, :, 0].sum(1).tolist() == [n * (n + 1) for n in (2 * first, 2 * first + 1)]
        assert lengths.tolist() == [2 * first + 1, 2 * first + 2]


def test_a_loader_moves_its_batches_to_the_device_asked_for():
    loader = ShardedLoader(DataLoader(TensorDataset(torch.ones(5, 2)), 2), world=single(), device="meta")
    assert [tuple(batch[0].shape) for batch in loader] == [(2, 2), (2, 2), (1, 2)]
    assert all(batch[0].device.type == "meta" for batch in loader)
    assert loader.transfer_seconds > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pin_memory", [False, True])
def test_batches_arrive_whole_on_cuda_without_a_synchronisation(pin_memory):
    data = TensorDataset(torch.arange(400_000.0).view(100, 4000))
    loader = ShardedLoader(DataLoader(data, 8, pin_memory=pin_memory), world=single("cuda"), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums = []
        for (batch,) in loader:
            assert loader.batch_samples == len(batch)
            sums.append(batch.double().sum())
            batch.zero_()  # what the loop does to its batch must not reach the next one
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = [rows.double().sum().item() for rows in data.tensors[0].split(8)]
    assert [float(value) for value in sums] == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_position_on_cuda_counts_the_batch_in_hand_and_not_the_one_ahead():
    loader = ShardedLoader(
        DataLoader(TensorDataset(torch.arange(20)), 4, shuffle=True), world=single("cuda"), seed=1
    )
    whole = [batch[0].tolist() for batch in loader]
    loader.set_epoch(0)
    seen = []
    for (batch,) in loader:
        seen.append(batch.tolist())
        if len(seen) == 2:
            assert loader.position == 8
            state = loader.state_dict()
            break
    loader.load_state_dict(state)
    assert seen + [batch[0].tolist() for batch in loader] == whole


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_error_of_the_data_on_cuda_comes_after_the_batches_before_it():
    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, index):
            if index == 13:
                raise OSError("disk")
            return torch.tensor(index)

    loader = ShardedLoader(DataLoader(Broken(), 4), world=single("cuda"), seed=1)
    seen: list[int] = []

    def take():
        for batch in loader:
            seen.extend(batch.tolist())

    with pytest.raises(OSError, match="disk"):
        take()
    assert (seen, loader.position) == (list(range(12)), 12)
