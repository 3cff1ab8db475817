"""The small message with which every collective begins, and what it finds out.

        0        8        16         24        32         64                  512
        +--------+--------+----------+---------+----------+--------------------+
        | magic  | shape  | bytes it | how it  | reserved | payload, if it     |
        |        | hash   | brings   | goes    |          | rides (448 bytes)  |
        +--------+--------+----------+---------+----------+--------------------+

All ranks gather everybody's frame, so all see the same disagreement and raise the same error.

A large payload is either sent after the frames have been compared, or, where a line of code has proven
itself, at once behind its frame: the frame is then compared while the payload travels, so that a rank
that is somewhere else is still found out before anyone waits for a payload that does not come.
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
from typing import Any, Literal, NoReturn, final

import torch
import torch.distributed as dist

from nbaccel.core.world import World
from nbaccel.errors import CollectiveMismatch

__all__ = [
    "ROOM",
    "CheckMode",
    "Frames",
    "Meeting",
    "MismatchCheck",
    "Unsent",
    "all_gather_flat",
    "caller",
    "exchange_blobs",
    "exchange_objects",
]

FRAME, HEADER = 512, 64
ROOM = FRAME - HEADER
_MAGIC = 0x6E62616363656C
_HEADER = struct.Struct("<qqqq32x")
_AFTER, _RIDES, _BEHIND = range(
    3
)  # how a payload goes: after the frames agree, in the frame, right behind it
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep

# torch renamed it; the older name warns in newer versions and is the only one in older ones.
all_gather_flat: Callable[..., Any] = (
    dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
)

CheckMode = Literal["sampled", "always", "never"]


@final
class MismatchCheck:
    """Decides when a collective too large for a frame waits for the frames to agree before it sends.

    "sampled": at the first calls of each line of the user's code and every 32nd after, and else compares
    them while the payload travels; "always"; or "never", which sends no frame. Small CPU payloads are
    checked in every mode, since they travel in the frame itself.
    """

    FIRST, EVERY = 4, 32

    def __init__(self, mode: CheckMode = "sampled") -> None:
        self.mode: CheckMode = mode
        self._calls: dict[str, int] = {}
        self._meetings: list[Meeting] = []

    def later(self, meeting: Meeting) -> None:
        """Compares these frames at a later call, when they have come: the host is ahead of a device."""
        self._meetings.append(meeting)

    def due(self, place: str) -> bool:
        """Whether this call at `place` waits for the frames; counts the call."""
        while self._meetings and self._meetings[0].over:
            self._meetings.pop(0).agree()
        if self.mode != "sampled":
            return self.mode == "always"
        count = self._calls.get(place, 0)
        self._calls[place] = count + 1
        return count < self.FIRST or count % self.EVERY == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Frames:
    """What every rank brought, in rank order."""

    sizes: list[int]
    """Bytes of each rank's payload."""
    payloads: torch.Tensor | None
    """uint8 [world size, ROOM] on the CPU when everybody's payload rode along, else None."""


@dataclass(frozen=True, slots=True)
class Unsent:
    """What a rank sends in place of an object that it cannot send."""

    why: str


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


@final
class Meeting:
    """Everybody's frame, under way. Made by all ranks together; `agree` is called by all of them.

    Args:
        signature: what must be equal on all ranks, beside the operation's name.
        payload: uint8 [num_bytes] on the CPU, at most ROOM, to ride along; None when it travels apart.
        behind: the payload is sent before `agree` has returned.
        describe: says what this rank brought, for the error; `signature` where not given.
    """

    def __init__(
        self,
        operation: str,
        signature: str,
        *,
        world: World,
        payload: torch.Tensor | None,
        num_bytes: int,
        place: str,
        behind: bool = False,
        describe: Callable[[], str] | None = None,
    ) -> None:
        self._operation, self._place, self._world = operation, place, world
        self._describe = describe or (lambda: signature)
        self._shape_hash = digest(f"{operation}|{signature}")
        how = _RIDES if payload is not None else _BEHIND if behind else _AFTER
        header = _HEADER.pack(_MAGIC, self._shape_hash, num_bytes, how)
        mine = torch.frombuffer(bytearray(header.ljust(FRAME, b"\0")), dtype=torch.uint8)
        if payload is not None:
            mine[HEADER : HEADER + num_bytes] = payload
        mine = mine.to(world.control_device)
        self._everyone = torch.empty(world.size * FRAME, dtype=torch.uint8, device=mine.device)
        self._work = all_gather_flat(self._everyone, mine, async_op=behind)

    @property
    def over(self) -> bool:
        """Whether `agree` would not wait."""
        return self._work is None or bool(self._work.is_completed())

    def agree(self, *, sizes_may_differ: bool = False) -> Frames:
        """What all ranks brought, once it is known that they are in the same operation.

        Raises:
            CollectiveMismatch: with every rank's operation, place and shapes.
        """
        if self._work is not None:
            self._work.wait()
        table = self._everyone.cpu().view(self._world.size, FRAME)
        headers = [_HEADER.unpack_from(row) for row in table[:, :HEADER].numpy()]
        if any(header[0] != _MAGIC for header in headers):
            raise CollectiveMismatch(
                f"rank {self._world.rank} is in {self._operation} at {self._place}, while another rank is in a "
                "collective of a different kind. Every rank must call the same collectives in the same order."
            )
        sizes = [header[2] for header in headers]
        same = all(header[1] == self._shape_hash for header in headers)
        if not same or (not sizes_may_differ and len(set(sizes)) > 1):
            self._raise(any(header[3] == _BEHIND for header in headers))
        rides = all(header[3] == _RIDES for header in headers)
        return Frames(sizes=sizes, payloads=table[:, HEADER:] if rides else None)

    def _raise(self, under_way: bool) -> NoReturn:
        """All ranks are here, having seen the same headers: exchange the words and raise the same error."""
        told: list[Any] = [None] * self._world.size
        # A payload that nobody takes is in the way of everything else in this group.
        group = dist.new_group(backend="gloo") if under_way else None
        dist.all_gather_object(told, (self._operation, self._place, self._describe()), group=group)
        if len({one[0] for one in told}) > 1:
            what = "the ranks are in different collectives"
            todo = (
                "Every rank must call the same collectives in the same order; look for a branch on the rank."
            )
        else:
            what = f"the ranks brought different things to {self._operation}"
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
    frames = Meeting(
        operation,
        signature,
        world=world,
        payload=blob if num_bytes <= ROOM else None,
        num_bytes=num_bytes,
        place=caller(),
        describe=describe,
    ).agree(sizes_may_differ=True)
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
    """One picklable object from each rank, in rank order. The ranks of one run trust each other's pickles.

    Raises:
        TypeError: on every rank, where one of them cannot be pickled.
    """
    cause = None
    try:
        data = bytearray(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL))
    except Exception as error:  # noqa: BLE001 - raised below, when every rank has heard of it
        cause, problem = error, f"a {type(value).__name__} that cannot be pickled: {error}"
        data = bytearray(pickle.dumps(Unsent(problem)))
    blobs = exchange_blobs(operation, torch.frombuffer(data, dtype=torch.uint8), signature, world=world)
    values = [pickle.loads(blob.numpy().tobytes()) for blob in blobs]
    for rank, one in enumerate(values):
        if isinstance(one, Unsent):
            raise TypeError(f"{operation} on rank {rank} got {one.why}") from cause
    return values
