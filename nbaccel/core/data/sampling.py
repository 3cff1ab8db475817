"""A user's own sampler or batch sampler: its draws repeated exactly, without reading a sample."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from nbaccel.core.data.seeding import RandomScope, derive_seed

__all__ = ["draw", "load_sampler_state", "sampler_state", "set_sampler_epoch"]

_CHUNK = 2048  # units drawn at once, so that exchanging the generators' states costs little per sample


def draw(sampler: Iterable[Any], *, seed: int, epoch: int, skip: int = 0) -> Iterator[Any]:
    """What `sampler` yields in this epoch, from its unit number `skip` on.

    A sampler that uses the global generators draws from a private set seeded by (seed, epoch), so every
    rank and every resumed run sees the same draws and the training loop's own random numbers are not
    touched. A sampler with a generator or state of its own is to be given that first (`load_sampler_state`).
    """
    scope = RandomScope(derive_seed(seed, epoch, 0x73616D70))
    with scope:
        source = iter(sampler)
        # Sizes grow so that neither a short epoch nor an endless sampler is drawn further than needed.
        for _ in range(skip):
            if next(source, source) is source:
                return
    size = 64
    while True:
        with scope:
            chunk = list(itertools.islice(source, size))
        if not chunk:
            return
        yield from chunk
        size = min(2 * size, _CHUNK)


def _parts(sampler: Any) -> Iterator[tuple[str, Any]]:
    """The sampler and the samplers inside it, each with a name that is the same in every process."""
    name, part = "", sampler
    for _ in range(4):
        yield name, part
        for inner in ("batch_sampler", "sampler"):
            found = getattr(part, inner, None)
            if found is not None and found is not part:
                name, part = f"{name}.{inner}", found
                break
        else:
            return


def sampler_state(sampler: Any) -> dict[str, Any]:
    """Copies of the generators and of the `state_dict()`s found in a sampler and the samplers inside it."""
    state: dict[str, Any] = {}
    for name, part in _parts(sampler):
        generator = getattr(part, "generator", None)
        if isinstance(generator, torch.Generator):
            state[f"{name}.generator"] = generator.get_state()
        if hasattr(part, "state_dict") and hasattr(part, "load_state_dict"):
            state[f"{name}.state"] = copy.deepcopy(part.state_dict())
    return state


def load_sampler_state(sampler: Any, state: dict[str, Any]) -> None:
    """Put back what `sampler_state` took; parts the sampler no longer has are left out."""
    for name, part in _parts(sampler):
        generator = getattr(part, "generator", None)
        if isinstance(generator, torch.Generator) and f"{name}.generator" in state:
            generator.set_state(state[f"{name}.generator"])
        if hasattr(part, "load_state_dict") and f"{name}.state" in state:
            part.load_state_dict(copy.deepcopy(state[f"{name}.state"]))


def set_sampler_epoch(sampler: Any, epoch: int) -> None:
    """Tell samplers that ask for it which epoch begins (the convention of torch's DistributedSampler)."""
    for _, part in _parts(sampler):
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)
