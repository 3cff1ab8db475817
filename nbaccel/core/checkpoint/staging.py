"""The state of everything at one moment: gathered, flattened, and copied out of training's way."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from nbaccel.core.checkpoint.contents import PLAIN, Contents, Entries, HasEntries, HasState
from nbaccel.core.checkpoint.divided import gather_divided, holds_divided
from nbaccel.core.checkpoint.shards import Plan, fingerprint
from nbaccel.core.checkpoint.small import Packed, pack
from nbaccel.core.model.tied import same_memory
from nbaccel.errors import CheckpointError

__all__ = ["Buffer", "State", "gather_state"]


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What this rank holds of a checkpoint's contents."""

    tensors: Mapping[str, torch.Tensor]
    """Of models and optimizers, by "thing/name"."""
    of_rank_zero: Collection[str]
    aliases: Mapping[str, str]
    fingerprint: Any
    """Changes when the plan for `tensors` has to."""
    shared: Packed | None
    """On rank 0."""
    own: Packed

    @property
    def num_bytes(self) -> int:
        """Bytes of the small states."""
        return self.own.num_bytes + (self.shared.num_bytes if self.shared else 0)


def gather_state(contents: Contents[HasEntries, HasState], folder: Path, rank: int, *, copy: bool) -> State:
    """Runs the pre-hooks, then asks everything for its state.

    Args:
        copy: the small states must not share memory with the live ones.

    Raises:
        CheckpointError: something cannot be saved; whatever a hook or a `state_dict` raises.
    """
    for hook in contents.before:
        hook(folder)
    tensors: dict[str, torch.Tensor] = {}
    of_rank_zero: set[str] = set()
    plain: dict[str, Any] = {}
    for item, thing in contents.sharded.items():
        entries: Entries = thing.entries()
        _check(item, entries)
        tensors.update((f"{item}/{name}", tensor) for name, tensor in entries.tensors.items())
        of_rank_zero.update(f"{item}/{name}" for name in entries.of_rank_zero)
        plain[PLAIN + item] = entries.plain
    states = {**plain, **{name: thing.state_dict() for name, thing in contents.shared.items()}}
    divided = {name for name, state in states.items() if holds_divided(state)}
    states.update({name: gather_divided(states[name], keep=rank == 0) for name in sorted(divided)})
    shared = pack(states, "shared", copy=copy, divided=divided) if rank == 0 else None
    own = {name: thing.state_dict() for name, thing in contents.per_rank.items()}
    aliases = same_memory(tensors)
    return State(
        tensors=tensors,
        of_rank_zero=frozenset(of_rank_zero),
        aliases=aliases,
        fingerprint=(fingerprint(tensors), aliases, of_rank_zero),
        shared=shared,
        own=pack(own, f"rank-{rank:05d}", copy=copy),
    )


def _check(item: str, entries: Entries) -> None:
    for name, tensor in entries.tensors.items():
        if tensor.is_meta:
            raise CheckpointError(
                f"{item}: {name} is on the meta device and has no values to save; load or initialise it first"
            )
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(
                f"{item}: {name} has layout {tensor.layout}; only dense tensors can be saved. Let its module give "
                "a dense one from state_dict()."
            )


@final
class Buffer:
    """Main memory in the shape of the file this rank writes; kept from save to save, so always warm."""

    def __init__(self, plan: Plan, *, pinned: bool) -> None:
        """`pinned`: page-locked, so that a device can copy into it directly."""
        layout = plan.layout
        head = len(layout.header)
        # Widest elements come first in the file: every view is aligned to its elements.
        self._memory = torch.empty(layout.num_bytes - head, dtype=torch.uint8, pin_memory=pinned)
        self.views: dict[str, torch.Tensor] = {}
        for name, entry in layout.entries.items():
            raw = self._memory[entry.begin - head : entry.begin - head + entry.num_bytes]
            self.views[name] = raw.view(entry.dtype).view(entry.shape)

    @torch.no_grad()
    def fill(self, pieces: Mapping[str, torch.Tensor]) -> None:
        """Copies the pieces; they may change as soon as this returns."""
        waits = set()
        for name, piece in pieces.items():
            self.views[name].copy_(piece, non_blocking=piece.is_cuda)
            if piece.is_cuda:
                waits.add(piece.device)
        for device in waits:
            torch.cuda.current_stream(device).synchronize()
