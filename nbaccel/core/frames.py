"""The small message with which every collective begins, and what it finds out.

        0        8        16         24       32      40         64                  512
        +--------+--------+----------+--------+-------+----------+--------------------+
        | magic  | shape  | bytes it | rides? | place | reserved | payload, if it     |
        |        | hash   | brings   | 0 or 1 | hash  |          | rides (448 bytes)  |
        +--------+--------+----------+--------+-------+----------+--------------------+

All ranks gather everybody's frame, so all see the same disagreement and raise the same error.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
import torch.distributed as dist

from nbaccel.core.world import World
from nbaccel.errors import CollectiveMismatch

__all__ = [
    "ROOM",
    "CheckMode",
    "Frames",
    "MismatchCheck",
    "all_gather_flat",
    "caller",
    "exchange",
    "exchange_blobs",
    "exchange_objects",
]

FRAME, HEADER = 512, 64
ROOM = FRAME - HEADER
_MAGIC = 0x6E62616363656C
_HEADER = struct.Struct("<qqqqq24x")
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep

# torch renamed it; the older name warns in newer versions and is the only one in older ones.
all_gather_flat: Callable[[torch.Tensor, torch.Tensor], Any] = (
    dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
)

CheckMode = Literal["sampled", "always", "never"]


@final
class MismatchCheck:
    """Decides when a collective too large for a frame is preceded by one.

    "sampled": at the first calls of each line of the user's code and every 32nd after; "always"; or
    "never". Small CPU payloads are checked in every mode, since they travel in the frame itself. When
    ranks are seen to make the same collective from different lines, their counts of calls no longer say
    the same thing on every rank, and the check becomes permanent.
    """

    FIRST, EVERY = 4, 32

    def __init__(self, mode: CheckMode = "sampled") -> None:
        self.mode: CheckMode = mode
        self._calls: dict[str, int] = {}

    def due(self, place: str) -> bool:
        """Whether this call at `place` begins with a frame; counts the call."""
        if self.mode != "sampled":
            return self.mode == "always"
        count = self._calls.get(place, 0)
        self._calls[place] = count + 1
        return count < self.FIRST or count % self.EVERY == 0

    def places_differ(self) -> None:
        """Ranks stood at different lines in one collective."""
        if self.mode == "sampled":
            self.mode = "always"


@dataclass(frozen=True, slots=True, kw_only=True)
class Frames:
    """What every rank brought, in rank order."""

    sizes: list[int]
    """Bytes of each rank's payload."""
    payloads: torch.Tensor | None
    """uint8 [world size, ROOM] on the CPU when everybody's payload rode along, else None."""


def caller() -> str:
    """The line of the user's code that called into us, as "file.py:12"."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_PACKAGE) and not name.startswith(_TORCH) and "contextlib" not in name:
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


@functools.lru_cache(maxsize=4096)
def digest(text: str) -> int:
    """A 63-bit number that is the same for equal text in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def exchange(
    operation: str,
    signature: str,
    *,
    world: World,
    payload: torch.Tensor | None,
    num_bytes: int,
    place: str,
    check: MismatchCheck | None = None,
    sizes_may_differ: bool = False,
    describe: Callable[[], str] | None = None,
) -> Frames:
    """Gathers every rank's frame and verifies that all are in the same operation.

    Args:
        signature: what must be equal on all ranks, beside the operation's name.
        payload: uint8 [num_bytes] on the CPU, at most ROOM, to ride along; None when it travels apart.
        describe: says what this rank brought, for the error; `signature` where not given.

    Raises:
        CollectiveMismatch: with every rank's operation, place and shapes.
    """
    place_hash, shape_hash = digest(place), digest(f"{operation}|{signature}")
    header = _HEADER.pack(_MAGIC, shape_hash, num_bytes, payload is not None, place_hash)
    mine = torch.frombuffer(bytearray(header.ljust(FRAME, b"\0")), dtype=torch.uint8)
    if payload is not None:
        mine[HEADER : HEADER + num_bytes] = payload
    mine = mine.to(world.control_device)
    everyone = torch.empty(world.size * FRAME, dtype=torch.uint8, device=mine.device)
    all_gather_flat(everyone, mine)
    table = everyone.cpu().view(world.size, FRAME)
    headers = [_HEADER.unpack_from(row) for row in table[:, :HEADER].numpy()]
    if any(header[0] != _MAGIC for header in headers):
        raise CollectiveMismatch(
            f"rank {world.rank} is in {operation} at {place}, while another rank is in a collective of a "
            "different kind. Every rank must call the same collectives in the same order."
        )
    sizes = [header[2] for header in headers]
    if any(header[1] != shape_hash for header in headers) or (not sizes_may_differ and len(set(sizes)) > 1):
        _raise_mismatch(operation, place, (describe or (lambda: signature))(), world)
    if check is not None and any(header[4] != place_hash for header in headers):
        check.places_differ()
    rides = all(header[3] for header in headers)
    return Frames(sizes=sizes, payloads=table[:, HEADER:] if rides else None)


def _raise_mismatch(operation: str, place: str, brought: str, world: World) -> None:
    """All ranks are here, having seen the same headers: exchange the words and raise the same error."""
    told: list[Any] = [None] * world.size
    dist.all_gather_object(told, (operation, place, brought))
    operations = {one[0] for one in told}
    if len(operations) > 1:
        what = "the ranks are in different collectives"
        todo = "Every rank must call the same collectives in the same order; look for a branch on the rank."
    else:
        what = f"the ranks brought different things to {operation}"
        todo = "Give equal structures, shapes and dtypes on every rank"
        todo += "; pad_across_processes makes lengths equal, gather_for_metrics takes unequal ones."
    lines = [
        f"  rank {rank}: {op} of {text or 'nothing'} at {where}"
        for rank, (op, where, text) in enumerate(told)
    ]
    raise CollectiveMismatch("\n".join([f"{what}:", *lines, todo]))


def exchange_blobs(
    operation: str,
    blob: torch.Tensor,
    signature: str,
    *,
    world: World,
    describe: Callable[[], str] | None = None,
) -> list[torch.Tensor]:
    """Every rank's bytes (uint8, on the CPU, of any length), in rank order."""
    num_bytes = blob.numel()
    frames = exchange(
        operation,
        signature,
        world=world,
        payload=blob if num_bytes <= ROOM else None,
        num_bytes=num_bytes,
        place=caller(),
        sizes_may_differ=True,
        describe=describe,
    )
    if frames.payloads is not None:
        return [row[:size] for row, size in zip(frames.payloads, frames.sizes, strict=True)]
    longest = max(frames.sizes)
    padded = torch.empty(longest, dtype=torch.uint8)
    padded[:num_bytes] = blob
    padded = padded.to(world.control_device)
    everyone = torch.empty(world.size * longest, dtype=torch.uint8, device=padded.device)
    all_gather_flat(everyone, padded)
    table = everyone.cpu().view(world.size, longest)
    return [row[:size] for row, size in zip(table, frames.sizes, strict=True)]


def exchange_objects(operation: str, value: Any, *, world: World, signature: str = "") -> list[Any]:
    """One picklable object from each rank, in rank order. The ranks of one run trust each other's pickles."""
    data = bytearray(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL))
    blobs = exchange_blobs(operation, torch.frombuffer(data, dtype=torch.uint8), signature, world=world)
    return [pickle.loads(blob.numpy().tobytes()) for blob in blobs]
