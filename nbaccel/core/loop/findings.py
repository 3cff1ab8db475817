"""What the trust checks compare, and what they say: from one `Facts` per rank to a list of findings."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nbaccel.whole import is_dtensor

__all__ = [
    "Facts",
    "ModelFacts",
    "compare",
    "compare_models",
    "describe_model",
    "different_streams",
    "fingerprint",
    "same_inputs",
]

_BLOCK = 1 << 18  # words a checksum takes at once: its memory, and a cache's size
_FACTOR = 2654435761

Pass = tuple[str, int]
"""A loader's name and its how manyeth pass."""


@torch.no_grad()
def fingerprint(tensor: Tensor) -> int:
    """A checksum of a tensor's bits: equal for equal bits, different for almost all others.

    The sum of its 32-bit words (bytes, where it has none) and the sum of them times their place, mod 2^64.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.numel() == 0:
        return 0
    words = flat.view(torch.int32 if flat.element_size() % 4 == 0 else torch.uint8)
    factors = torch.arange(1, min(_BLOCK, words.numel()) + 1, device=words.device) * _FACTOR + 31
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for number, part in enumerate(torch.split(words, _BLOCK)):
        block = part.to(torch.int64)
        total += (block * factors[: block.numel()]).sum() + block.sum() * _wrapped(number * _BLOCK * _FACTOR)
    return int(total.item())


def _wrapped(number: int) -> int:
    """As int64 arithmetic has it."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Checksums and modes of one model on one rank."""

    parameters: Mapping[str, int]
    buffers: Mapping[str, int]
    """Persistent ones."""
    modes: Mapping[str, bool] = field(default_factory=dict)
    """Whether each module is in train mode."""
    changed: frozenset[str] = frozenset()
    """Buffers that were there right after prepare and are others now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What one rank knows after some optimizer steps."""

    models: Sequence[ModelFacts]
    places: Mapping[Pass, Sequence[tuple[int, int]]]
    """(epoch, samples consumed over all ranks) after each batch."""
    samples: Mapping[Pass, Sequence[int]]
    """Indices seen: of loaders that compute their order."""
    orders: Mapping[Pass, Sequence[tuple[int, ...]]]
    """Global batches: of loaders with a user's sampler."""
    streams: Mapping[Pass, Sequence[tuple[int, ...]]]
    """Checksums of global batches: of iterable data sets that every rank reads."""
    inputs: Sequence[int]
    """Checksums of the batches that went into models, those that could be told apart."""
    prepared_loader: bool
    """Whether the batches came from a prepared loader."""


def describe_model(module: nn.Module, before: ModelFacts | None = None) -> ModelFacts:
    """A model as it is now; `before` is how it was right after prepare. Shards are each rank's own."""
    skipped = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    parameters = {
        name: fingerprint(p)
        for name, p in module.named_parameters()
        if name not in skipped and not nn.parameter.is_lazy(p) and not is_dtensor(p)
    }
    buffers = {
        name: fingerprint(b)
        for name, b in _persistent_buffers(module)
        if name not in skipped and not nn.parameter.is_lazy(b)
    }
    earlier = {} if before is None else before.buffers
    changed = frozenset(n for n, v in buffers.items() if n in earlier and earlier[n] != v)
    modes = {name or "the model": one.training for name, one in module.named_modules()}
    return ModelFacts(parameters=parameters, buffers=buffers, modes=modes, changed=changed)


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, one in module.named_modules():
        for name, buffer in one.named_buffers(recurse=False):
            if name not in one._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def _parties(values: Sequence[Hashable]) -> str:
    """ "ranks 0, 1 differs from rank 2" for a value per rank."""
    groups: dict[Hashable, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    named = [f"rank{'s' if len(g) > 1 else ''} {', '.join(map(str, g))}" for g in groups.values()]
    return " differs from ".join(named)


def compare(told: Sequence[Facts], when: str) -> list[str]:
    """What is wrong between the ranks after optimizer steps."""
    found = compare_models([facts.models for facts in told], when)
    return [*found, *(_different_places(told) or _different_orders(told) or _shared_samples(told))]


def compare_models(told: Sequence[Sequence[ModelFacts]], when: str) -> list[str]:
    """What is wrong between the ranks' models, each rank's in the order it prepared them."""
    counts = [len(models) for models in told]
    found = []
    for number in range(min(counts)):
        name = "the model" if max(counts) == 1 else f"model {number}"
        by_rank = [models[number] for models in told]
        found += _differing_parameters([m.parameters for m in by_rank], name, when)
        found += _differing_buffers(by_rank, name, when)
        found += _differing_modes([m.modes for m in by_rank], name, when)
    return found


def _differing_parameters(by_rank: Sequence[Mapping[str, int]], model: str, when: str) -> list[str]:
    names = list(dict.fromkeys(name for sums in by_rank for name in sums))
    bad = [name for name in names if len({sums.get(name) for sums in by_rank}) > 1]
    if not bad:
        return []
    who = _parties([sums.get(bad[0]) for sums in by_rank])
    cause = (
        "a layer that only some ranks have: look for a branch on the rank"
        if any(bad[0] not in sums for sums in by_rank)
        else "a layer made or re-initialised without the same seed on all ranks, a parameter updated outside "
        "the prepared model, an optimizer with options of its own on a rank, loss.backward() in place of "
        "acc.backward(loss), a backward that reaches a part of the parameters only "
        "(DDPOptions(find_unused_parameters=True)), or a branch on the rank"
    )
    more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    return [f"{when} parameter {bad[0]!r}{more} of {model}: {who}. Likely cause: {cause}."]


def _differing_buffers(by_rank: Sequence[ModelFacts], model: str, when: str) -> list[str]:
    """Running statistics differ rightly: every rank's forward has changed them, by its own batches."""
    for name in dict.fromkeys(name for facts in by_rank for name in facts.buffers):
        sums = [facts.buffers.get(name) for facts in by_rank]
        if len(set(sums)) > 1 and not all(name in facts.changed for facts in by_rank):
            return [
                f"{when} buffer {name!r} of {model}: {_parties(sums)}. Likely cause: it is made from random or "
                "rank-dependent values, registered after prepare, or written under a branch on the rank."
            ]
    return []


def _differing_modes(by_rank: Sequence[Mapping[str, bool]], model: str, when: str) -> list[str]:
    for name in by_rank[0]:
        if len({modes.get(name) for modes in by_rank}) > 1:
            training = ", ".join(str(rank) for rank, modes in enumerate(by_rank) if modes.get(name))
            return [
                f"{when} {name if model == 'the model' else f'{name} of {model}'} is in train mode on rank(s) "
                f"{training} only. Likely cause: model.eval() or model.train() called under a branch on the "
                "rank."
            ]
    return []


def _different_places(told: Sequence[Facts]) -> list[str]:
    for key in told[0].places:
        for places in zip(*(facts.places.get(key, ()) for facts in told), strict=False):
            if len(set(places)) > 1:
                who = "; ".join(
                    f"rank {rank} is at sample {position} of epoch {epoch}"
                    for rank, (epoch, position) in enumerate(places)
                )
                return [
                    f"the ranks are at different places of {key[0]!r}: {who}. Likely cause: set_epoch, "
                    "skip_batches or load_state_dict called under a branch on the rank."
                ]
    return []


def _different_orders(told: Sequence[Facts]) -> list[str]:
    for key in told[0].orders:
        by_rank = [facts.orders.get(key, ()) for facts in told]
        for number, drawn in enumerate(zip(*by_rank, strict=False)):
            if len(set(drawn)) > 1:
                return [
                    f"the samplers of {key[0]!r} draw differently: {_parties(drawn)} in batch {number + 1}, so "
                    "that samples are read twice or never. Likely cause: a sampler that draws from a generator "
                    "seeded differently on each rank, or from the rank itself."
                ]
    return []


def _shared_samples(told: Sequence[Facts]) -> list[str]:
    for key in told[0].samples:
        owners: dict[int, int] = {}
        for rank, facts in enumerate(told):
            for index in facts.samples.get(key, ()):
                first = owners.setdefault(index, rank)
                if first != rank:
                    return [
                        f"ranks {first} and {rank} both read sample {index} of {key[0]!r} in one epoch. Likely "
                        "cause: a shard function that looks at the rank."
                    ]
    return []


def different_streams(told: Sequence[Facts]) -> str:
    """What to warn of when the ranks have read different samples of one stream; empty when they are the same."""
    for key in told[0].streams:
        for number, read in enumerate(zip(*(facts.streams.get(key, ()) for facts in told), strict=False)):
            if len(set(read)) > 1:
                return (
                    f"the ranks read different samples from the iterable data set of {key[0]!r}: {_parties(read)} in "
                    f"batch {number + 1}. Each rank keeps its share of what it reads, so that samples are used twice "
                    "or never if they come in another order. Likely cause: the data set has a random generator of "
                    "its own that is not seeded alike on all ranks (what it draws from torch, random or numpy.random "
                    "is), or it looks at the rank: then give shard='none'."
                )
    return ""


def same_inputs(told: Sequence[Facts]) -> str:
    """What to warn of when every rank's model got the same batches; empty when they differ."""
    if any(facts.prepared_loader for facts in told) or not told[0].inputs:
        return ""
    if any(list(facts.inputs) != list(told[0].inputs) for facts in told):
        return ""
    return (
        f"all {len(told)} ranks computed on the same batches in the first steps, so that the others' work adds "
        "nothing. Likely cause: a loader that was not prepared."
    )
