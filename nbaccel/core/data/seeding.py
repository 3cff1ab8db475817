"""Seeds derived from numbers, and generators kept apart from the training loop's own."""

from __future__ import annotations

import random
import sys
from types import TracebackType
from typing import Any, final

import torch

__all__ = ["RandomScope", "derive_seed", "seed_global"]

_MASK = (1 << 64) - 1


def derive_seed(*parts: int) -> int:
    """A seed in [0, 2**63) that depends on every part and on their order (splitmix64, Steele et al. 2014)."""
    state = 0x243F6A8885A308D3
    for part in parts:
        state = (state ^ (part & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


def seed_global(seed: int) -> None:
    """Seed the CPU's global generators: torch, `random`, and NumPy where it is in use."""
    # torch.manual_seed would reach for every device as well.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed & 0xFFFFFFFF)


def _states() -> tuple[Any, Any, Any]:
    numpy = sys.modules.get("numpy")
    return torch.default_generator.get_state(), random.getstate(), numpy and numpy.random.get_state()


def _restore(states: tuple[Any, Any, Any]) -> None:
    torch.default_generator.set_state(states[0])
    random.setstate(states[1])
    numpy = sys.modules.get("numpy")
    if numpy is not None and states[2] is not None:
        numpy.random.set_state(states[2])


@final
class RandomScope:
    """Inside `with scope:` the global generators are a private set; outside nobody notices.

    The private set begins at `seed` and goes on where the last `with` block left it.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._inner: tuple[Any, Any, Any] | None = None
        self._outer: tuple[Any, Any, Any] | None = None

    def __enter__(self) -> None:
        self._outer = _states()
        if self._inner is None:
            seed_global(self._seed)
        else:
            _restore(self._inner)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inner = _states()
        if self._outer is not None:
            _restore(self._outer)
