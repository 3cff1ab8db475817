"""From sample indices to a batch, in this process or in a loader's worker."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, final

import torch
from torch.utils.data import Dataset, Subset, TensorDataset
from torch.utils.data import default_collate as torch_default_collate

from nbaccel.core.data.seeding import RandomScope, derive_seed, seed_global
from nbaccel.core.data.source import Source

__all__ = ["SeededDataset", "fetcher", "takes_tensors"]

Fetch = Callable[[Any], Any]


def takes_tensors(source: Source) -> bool:
    """Whether a batch is a selection of rows of tensors, so that no sample is read by itself."""
    if source.batch_size is None and source.kind != "batch_sampler":
        return False
    dataset = source.dataset
    while type(dataset) is Subset:
        dataset = dataset.dataset
    # A subclass may have its own __getitem__, and a collate_fn may want to see samples.
    if type(dataset) is not TensorDataset or source.collate is not torch_default_collate:
        return False
    return all(
        type(t) is torch.Tensor
        and t.layout is torch.strided
        and t.device.type == "cpu"
        and not t.requires_grad
        for t in dataset.tensors
    )


def fetcher(source: Source, *, seeded: bool, seed: int, epoch: int) -> Fetch:
    """The function from indices (a list; a tensor where `takes_tensors`) to a batch, for this process.

    With `seeded` every sample is read under the seed (seed, epoch, index), and the training loop's own
    generators are left as they were.
    """
    if takes_tensors(source):
        return _rows(source)
    if seeded:
        scope = RandomScope(derive_seed(seed, epoch))
        dataset = SeededDataset(source.dataset, seed)
        inner = _samples(dataset, source)

        def fetch(indices: list[Any]) -> Any:
            with scope:
                return inner([(epoch, index) for index in indices])

        return fetch
    return _samples(source.dataset, source)


def _samples(dataset: Any, source: Source) -> Fetch:
    collate = source.collate
    if source.batch_size is None and source.kind != "batch_sampler":
        return lambda indices: collate(dataset[indices[0]])
    if getattr(dataset, "__getitems__", None):
        return lambda indices: collate(dataset.__getitems__(indices))
    return lambda indices: collate([dataset[index] for index in indices])


def _rows(source: Source) -> Fetch:
    maps: list[torch.Tensor] = []
    dataset = source.dataset
    while type(dataset) is Subset:
        maps.append(torch.as_tensor(dataset.indices, dtype=torch.int64))
        dataset = dataset.dataset
    tensors = dataset.tensors
    if maps:
        # Outermost first: its indices point into the one below, and so on down.
        chosen = functools.reduce(lambda outer, below: below[outer], maps)
        return lambda indices: [t[chosen[indices]] for t in tensors]
    if source.kind != "order":  # a user's sampler may count from the end
        return lambda indices: [t[indices] for t in tensors]
    return lambda indices: [t.index_select(0, indices) for t in tensors]


@final
class SeededDataset(Dataset[Any]):
    """A map-style data set asked with (epoch, index); each sample is read under a seed of its own.

    Whatever randomness reading a sample takes from torch, `random` or NumPy depends on (seed, epoch,
    index) only: not on the worker, the rank or where the run was resumed. Everything else is the
    wrapped data set's.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    def __getitem__(self, asked: tuple[int, Any]) -> Any:
        epoch, index = asked
        number = index if isinstance(index, int) else derive_seed(*repr(index).encode())
        seed_global(derive_seed(self._seed, epoch, number))
        return self._dataset[index]

    def __getattr__(self, name: str) -> Any:
        # Pickling asks before `_dataset` is there; a batched __getitems__ would pass the seeds by.
        if name.startswith("__") or name == "_dataset":
            raise AttributeError(name)
        return getattr(self._dataset, name)
