"""Values of a batch that is filled up: the real samples' part of them, gathered once."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from ranks import run_ranks
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from nbaccel.core import Accelerator
from nbaccel.core.loop.real_samples import real_part


class Pair(NamedTuple):
    ids: list[str]
    loss: float


@dataclass
class Output:
    names: list[str]
    note: Any = None


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (["a", "b"], ["a"]),
        (("a", "b"), ("a",)),
        ([["a", "b"], ["c", "d"]], [["a", "b"]]),
        ((["a", "b"], ["c", "d"]), (["a"], ["c"])),
        ([["a", "b"], ("c", "d")], [["a"], ("c",)]),
        ([{"box": 1}, {"box": 2}], [{"box": 1}]),
        ((3.5, ["a", "b"]), (3.5, ["a"])),
        ({"ids": ["a", "b"], "name": "ab"}, {"ids": ["a"], "name": "ab"}),
        ({"deep": {"x": ("c", "d")}}, {"deep": {"x": ("c",)}}),
        (Pair(["a", "b"], 1.0), Pair(["a"], 1.0)),
        (Output(["a", "b"], "ab"), Output(["a"], "ab")),
        ("ab", "ab"),
        (None, None),
    ],
)  # fmt: skip
def test_lists_of_a_filled_batch_are_cut_wherever_they_are(value, kept):
    assert real_part(value, 1, 2, lists=True) == (kept, [])


def test_tensors_of_a_filled_batch_are_cut_by_rows():
    x = torch.arange(4).view(2, 2)
    (rows, names), others = real_part((x, ["a", "b"]), 1, 2, lists=True)
    assert (rows.tolist(), names, others) == ([[0, 1]], ["a"], [])
    (rows, same, loss), others = real_part([x, x, torch.ones(())], 1, 2, lists=False)
    assert (rows.tolist(), same.tolist(), loss.tolist(), others) == ([[0, 1]], [[0, 1]], 1.0, [])
    array, others = real_part({"n": numpy.arange(2)}, 1, 2, lists=True)
    assert (array["n"].tolist(), others) == ([0], [])
    assert real_part(["a", "b", "c"], 1, 2, lists=True) == (["a", "b", "c"], [3])
    assert real_part({"flat": torch.ones(6)}, 1, 2, lists=False)[1] == [6]


class Batches(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(12).view(3, 4))


def _gathered():
    acc = Accelerator(cpu=True)
    found = {}
    loader = acc.prepare(DataLoader(range(9), batch_size=4))
    found["tuple"], found["scalar"] = [], []
    for b in loader:
        found["tuple"] += acc.gather_for_metrics((b, [str(i) for i in b.tolist()]))[1::2]
        found["scalar"].append(acc.gather_for_metrics(b.double().mean()).tolist())
    made = (
        DataLoader(Batches(), batch_size=None),
        DataLoader(torch.arange(12), batch_size=None, sampler=BatchSampler(SequentialSampler(range(12)), 4, False)),
    )  # fmt: skip
    found["batches"] = [
        [i for b in acc.prepare(one) for i in acc.gather_for_metrics(b).tolist()] for one in made
    ]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        even = acc.prepare_data_loader(DataLoader(range(5), batch_size=2), even_batches=True)
        found["even"] = []
        for b in even:
            got = acc.gather_for_metrics([b, [str(i) for i in b.tolist()]])
            found["even"] += [(t.tolist(), names) for t, names in zip(got[::2], got[1::2], strict=True)]
            got = acc.gather_for_metrics(b.repeat(3))
    found["said"] = [str(one.message) for one in said]
    found["where"] = [one.filename for one in said]
    return found


def test_gather_for_metrics_counts_each_sample_once():
    first, second = run_ranks(_gathered)
    assert list(chain(*first["tuple"])) == ["0", "2", "4", "6", "1", "3", "5", "7", "8"]
    assert first["scalar"] == [[3.0, 4.0], [8.0]]
    assert [sorted(one) for one in first["batches"]] == [list(range(12))] * 2
    assert first["even"] == [([0, 2], ["0", "2"]), ([1, 3], ["1", "3"]), ([4], ["4"])]
    assert "loader 'loader 3', even_batches=True: the last batch of each epoch adds 3" in first["said"][0]
    assert first["where"] == [__file__] * 2
    assert "6 entries where the batch has 2 samples, of which 1 only fill it up" in first["said"][1]
    assert second["said"] == []
