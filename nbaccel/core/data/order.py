"""The order of an epoch: which sample stands at each position, the same for every world size.

An order is a function from positions to sample indices that can be asked anywhere, so that going on in
the middle of an epoch costs the same as beginning one.
"""

from __future__ import annotations

import math
from typing import Protocol, final

import torch
from torch import Tensor

from nbaccel.core.data.seeding import derive_seed

__all__ = ["ORDER_VERSION", "ByNode", "Order", "Sequential", "Shuffled", "epoch_order"]

ORDER_VERSION = 1
"""Changes whenever the same (seed, epoch, total) would give another order; kept in every saved state."""

_SMALL = 1 << 15
_ROUNDS = 6
_LOW = (1 << 31) - 1
_FACTORS = (0x45D9F3B3, 0x2C1B3C6D)


class Order(Protocol):
    """`total` positions, and the sample index at each of them."""

    @property
    def total(self) -> int: ...

    def take(self, positions: Tensor) -> Tensor:
        """Sample indices [n] int64 at `positions` [n] int64, each in [0, total)."""
        ...


@final
class Sequential:
    """Sample i at position i."""

    def __init__(self, total: int) -> None:
        self.total = total

    def take(self, positions: Tensor) -> Tensor:
        return positions


@final
class Shuffled:
    """A permutation that depends on (seed, epoch, total) only.

    Up to 32768 samples it is `torch.randperm`. Beyond, each position is computed by itself: a Feistel
    network over Z_a x Z_b with a*b >= total (Black and Rogaway, "Ciphers with arbitrary finite domains",
    2002), walking the cycle where the result lies outside; so neither time nor memory grows with `total`.
    """

    def __init__(self, total: int, seed: int, epoch: int) -> None:
        self.total = total
        mixed = derive_seed(seed, epoch)
        self._table: Tensor | None = None
        if total <= _SMALL:
            generator = torch.Generator()
            generator.manual_seed(mixed)
            self._table = torch.randperm(total, generator=generator)
        self._left = math.isqrt(max(total - 1, 0)) + 1
        self._right = -(-total // self._left) or 1
        self._keys = [derive_seed(mixed, number) & _LOW for number in range(_ROUNDS)]

    def take(self, positions: Tensor) -> Tensor:
        if self._table is not None:
            return self._table[positions]
        found = self._encrypt(positions)
        outside = found >= self.total
        while bool(outside.any()):
            # a*b exceeds total by less than sqrt(total): rarely more than one turn over a few elements.
            found[outside] = self._encrypt(found[outside])
            outside = found >= self.total
        return found

    def _encrypt(self, values: Tensor) -> Tensor:
        left = torch.div(values, self._right, rounding_mode="floor")
        right = values - left * self._right
        for number, key in enumerate(self._keys):
            if number % 2:
                right.add_(_scramble(left, key, self._right)).remainder_(self._right)
            else:
                left.add_(_scramble(right, key, self._left)).remainder_(self._left)
        return left.mul_(self._right).add_(right)


def _scramble(values: Tensor, key: int, below: int) -> Tensor:
    """Well-mixed numbers in [0, below); products stay below 2**62, so int64 never overflows."""
    mixed = values ^ key
    for factor in _FACTORS:
        mixed = (mixed ^ (mixed >> 16)).mul_(factor).bitwise_and_(_LOW)
    return mixed.bitwise_xor_(mixed >> 15).mul_(below).bitwise_right_shift_(31)


@final
class ByNode:
    """The data set in as many contiguous parts as there are nodes; each node reads (and shuffles) its own.

    Position i belongs to node i % nodes, so every global batch takes equally many samples from each part.
    """

    def __init__(self, total: int, nodes: int, seed: int | None, epoch: int) -> None:
        self.total = total
        base, extra = divmod(total, nodes)
        self._starts = [node * base + min(node, extra) for node in range(nodes)]
        lengths = [base + (node < extra) for node in range(nodes)]
        self._parts: list[Order] = [
            Sequential(length)
            if seed is None
            else Shuffled(length, derive_seed(seed, 0x6E6F6465, node), epoch)
            for node, length in enumerate(lengths)
        ]

    def take(self, positions: Tensor) -> Tensor:
        nodes = len(self._parts)
        owner = positions % nodes
        within = torch.div(positions, nodes, rounding_mode="floor")
        found = torch.empty_like(positions)
        for node in sorted(set(owner.tolist())):
            chosen = owner == node
            found[chosen] = self._parts[node].take(within[chosen]) + self._starts[node]
        return found


def epoch_order(total: int, *, shuffle: bool, seed: int, epoch: int, nodes: int = 1) -> Order:
    """The order of one epoch over `total` samples; `nodes` above 1 keeps each node to its own part."""
    if nodes > 1:
        return ByNode(total, nodes, seed if shuffle else None, epoch)
    return Shuffled(total, seed, epoch) if shuffle else Sequential(total)
