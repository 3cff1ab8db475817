"""Checks, in the first steps of a run, that ranks which should be equal are.

Every finding names ranks, parameter and likely cause. The checks are collective and made at the same
optimizer steps on every rank; they cost one pass over the parameters each, and nothing afterwards.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from nbaccel.core.collectives import gather_object
from nbaccel.core.data import ShardedLoader
from nbaccel.core.loop import Loop
from nbaccel.errors import TrustError

__all__ = ["TrustChecks", "fingerprint"]

_AFTER = (1, 3)  # optimizer steps after which ranks are compared


@torch.no_grad()
def fingerprint(tensor: Tensor) -> int:
    """A checksum of a tensor's bits: equal for equal bits, different for almost all others.

    The sum of its 32-bit words (bytes, where it has none) and the sum of them times their place, mod 2^64.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.numel() == 0:
        return 0
    words = flat.view(torch.int32 if flat.element_size() % 4 == 0 else torch.uint8).to(torch.int64)
    places = torch.arange(1, words.numel() + 1, device=words.device) * 2654435761
    return int((words.sum() * 31 + (words * places).sum()).item())


@final
class TrustChecks:
    """Watches the first optimizer steps of a loop. `check` is called after each of them, on every rank."""

    def __init__(self, loop: Loop, unwrap: Callable[[nn.Module], nn.Module]) -> None:
        self._loop = loop
        self._unwrap = unwrap
        self._ticks = 0
        self._seen: dict[tuple[ShardedLoader, int], set[Any]] = {}
        self._unused: dict[str, nn.Parameter] = {}

    def sampled(self, loader: ShardedLoader) -> None:
        """Notes the samples of the batch in hand."""
        indices = loader.batch_indices
        if indices is None or loader.with_replacement or self.done:
            return
        listed = indices.tolist() if isinstance(indices, Tensor) else list(indices)
        if all(isinstance(index, int) for index in listed):
            self._seen.setdefault((loader, loader.epoch), set()).update(listed)

    @property
    def done(self) -> bool:
        """Whether nothing is checked any more."""
        return self._ticks >= _AFTER[-1]

    def check(self) -> bool:
        """Compares the ranks after certain steps; whether it wants to be called again.

        Raises:
            TrustError: ranks differ where they must be equal; the same on every rank.
        """
        if not self._ticks:
            self._unused = self._trainable()
        self._ticks += 1
        loader = self._loop.loader
        if loader is not None:
            self.sampled(loader)
        self._unused = {name: p for name, p in self._unused.items() if p.grad is None}
        if self._ticks in _AFTER:
            self.compare(f"after optimizer step {self._ticks}")
        if self.done and self._unused and self._loop.world.is_main:
            listed = ", ".join(list(self._unused)[:5])
            warnings.warn(
                f"{len(self._unused)} parameters got no gradient in {self._ticks} optimizer steps: {listed}. "
                "Likely cause: they are not used in forward, or their output does not reach the loss.",
                stacklevel=2,
            )
        return not self.done

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {
            name: parameter
            for model in self._loop.models
            for name, parameter in self._unwrap(model).named_parameters()
            if parameter.requires_grad
        }

    def compare(self, when: str) -> None:
        """Compares parameters, modes and samples now.

        Raises:
            TrustError: as `check`.
        """
        mine = {
            "sums": [_sums(self._unwrap(model)) for model in self._loop.models],
            "modes": [_modes(self._unwrap(model)) for model in self._loop.models],
            "samples": [sorted(seen) for seen in self._seen.values()],
        }
        if self._loop.world.size == 1:
            return
        told = gather_object(mine, world=self._loop.world)
        found = [*_differing_sums(told, when), *_differing_modes(told, when), *_shared_samples(told)]
        if found:
            raise TrustError("\n".join(found))


def _sums(model: nn.Module) -> dict[str, int]:
    return {name: fingerprint(p) for name, p in model.named_parameters()}


def _modes(model: nn.Module) -> dict[str, bool]:
    return {name or "the model": module.training for name, module in model.named_modules()}


def _parties(values: Sequence[Any]) -> str:
    """ "ranks 0, 1 differ from rank 2" for a value per rank."""
    groups: dict[Any, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    named = [f"rank{'s' if len(g) > 1 else ''} {', '.join(map(str, g))}" for g in groups.values()]
    return " differs from ".join(named)


def _differing_sums(told: Sequence[dict[str, Any]], when: str) -> list[str]:
    found = []
    for number in range(len(told[0]["sums"])):
        by_rank = [one["sums"][number] for one in told]
        names = list(dict.fromkeys(name for sums in by_rank for name in sums))
        bad = [name for name in names if len({sums.get(name) for sums in by_rank}) > 1]
        if not bad:
            continue
        who = _parties([sums.get(bad[0]) for sums in by_rank])
        missing = any(bad[0] not in sums for sums in by_rank)
        cause = (
            "a layer that only some ranks have: look for a branch on the rank"
            if missing
            else "a layer added or re-initialised after prepare without the same seed on all ranks, a "
            "parameter updated outside the prepared model, an optimizer with options of its own on a rank, "
            "or a branch on the rank"
        )
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        found.append(f"{when} parameter {bad[0]!r}{more} of model {number}: {who}. Likely cause: {cause}.")
    return found


def _differing_modes(told: Sequence[dict[str, Any]], when: str) -> list[str]:
    found = []
    for number in range(len(told[0]["modes"])):
        by_rank = [one["modes"][number] for one in told]
        for name in by_rank[0]:
            if len({modes.get(name) for modes in by_rank}) > 1:
                training = [rank for rank, modes in enumerate(by_rank) if modes.get(name)]
                found.append(
                    f"{when} {name} of model {number} is in train mode on rank(s) "
                    f"{', '.join(map(str, training))} only. Likely cause: model.eval() or model.train() "
                    "called under a branch on the rank."
                )
                break
    return found


def _shared_samples(told: Sequence[dict[str, Any]]) -> list[str]:
    found = []
    for number in range(min(len(one["samples"]) for one in told)):
        owners: dict[Any, int] = {}
        for rank, one in enumerate(told):
            for index in one["samples"][number]:
                first = owners.setdefault(index, rank)
                if first != rank:
                    found.append(
                        f"ranks {first} and {rank} both read sample {index} in one epoch. Likely cause: a "
                        "sampler that draws differently on each rank."
                    )
                    return found
    return found
