"""Rank 0 reads, the others receive: one message of fixed size per batch and rank.

    0       8      …      512                              capacity
    +-------+------+-------+---------+---------+-----------+
    | kind  | counts, shapes | tensor | tensor  | the rest  |     every tensor on a 64-byte boundary
    +-------+----------------+--------+---------+-----------+

What a batch looks like (containers, dtypes, numbers of dimensions) is sent once, pickled, and again only
when it changes or outgrows the capacity; leaves that are no tensors ride pickled at the message's end.
Messages are sent when the loop asks for a batch and never ahead, so a loop left early leaves nothing in
the pipes. Both sides count passes and steps: ranks that no longer ask for the same batch are told so.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, final

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from nbaccel.core.data.plan import Share
from nbaccel.core.data.wires import Pending, Wire
from nbaccel.core.nested import map_leaves
from nbaccel.core.world import World
from nbaccel.errors import ConfigError, TrustError, WorkerError

__all__ = ["Receiver", "Sender"]

_HEADER = 512
_WORDS = _HEADER // 8
_ALIGN = 64
_BATCH, _LAYOUT, _END, _FAILED = range(4)
_FIXED, _LAST = 9, 7  # words before the shapes; the one that says whether the pass ends


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where a leaf stood in the batch: a tensor's kind, or None for any other leaf."""

    dtype: torch.dtype | None
    ndim: int = 0


@dataclass(frozen=True, slots=True)
class _Template:
    """A batch with its leaves taken out."""

    structure: Any
    slots: tuple[_Slot, ...]

    @property
    def dims(self) -> int:
        return sum(slot.ndim for slot in self.slots)


def _take_apart(batch: Any) -> tuple[_Template, list[Tensor], list[Any]]:
    slots: list[_Slot] = []
    tensors: list[Tensor] = []
    others: list[Any] = []

    def take(leaf: Any) -> int:
        if isinstance(leaf, Tensor):
            if leaf.layout is not torch.strided or leaf.is_quantized:
                raise ConfigError(
                    f"dispatch sends dense tensors only; the batch holds one with layout {leaf.layout}. "
                    "Let every rank read its own samples (dispatch=False)."
                )
            slots.append(_Slot(leaf.dtype, leaf.ndim))
            tensors.append(leaf)
        else:
            slots.append(_Slot(None))
            others.append(leaf)
        return len(slots) - 1

    # A packed sequence travels pickled: taken apart it cannot, for what it is made of anew is looked at.
    structure = map_leaves(take, batch, is_leaf=lambda one: isinstance(one, PackedSequence))
    return _Template(structure, tuple(slots)), tensors, others


def _bytes_of(tensor: Tensor) -> bytearray:
    copied = bytearray(tensor.numel())
    if copied:
        torch.frombuffer(copied, dtype=torch.uint8).copy_(tensor)
    return copied


def _padded(count: int) -> int:
    return -(-count // _ALIGN) * _ALIGN


@final
class _Buffer:
    """Memory of one message, written by `struct` and by torch alike."""

    def __init__(self, capacity: int) -> None:
        self._bytes = bytearray(capacity + _ALIGN)
        whole = torch.frombuffer(self._bytes, dtype=torch.uint8)
        self._shift = -whole.data_ptr() % _ALIGN
        self.tensor = whole[self._shift : self._shift + capacity]
        self.pending: Pending | None = None

    def write_words(self, words: list[int]) -> None:
        struct.pack_into(f"={len(words)}q", self._bytes, self._shift, *words)

    def write_bytes(self, at: int, data: bytes) -> None:
        self._bytes[self._shift + at : self._shift + at + len(data)] = data

    def wait(self) -> None:
        """Until it may be written again."""
        if self.pending is not None:
            self.pending.wait()
            self.pending = None


@final
class _Line:
    """Rank 0's end towards one other rank; one message is written while the one before is under way."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._template: _Template | None = None
        self._capacity = _HEADER
        self._free, self._under_way = _Buffer(_HEADER), _Buffer(_HEADER)

    def send(self, batch: Any, share: Share, number: tuple[int, int]) -> None:
        """Send one batch; returns while it is still under way."""
        template, tensors, others = _take_apart(batch)
        rest = pickle.dumps(others, protocol=5) if others else b""
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
        needed = _HEADER + sum(map(_padded, sizes)) + len(rest)
        if template != self._template or needed > self._capacity:
            self._introduce(template, needed, number)
        buffer = self._free
        buffer.wait()
        at = _HEADER
        for tensor, size in zip(tensors, sizes, strict=True):
            if size:
                flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
                buffer.tensor[at : at + size].copy_(flat)
            at += _padded(size)
        if rest:
            buffer.write_bytes(at, rest)
        words = [_BATCH, *number, share.samples, share.repeated, _or_none(share.global_samples)]
        words += [share.cursor, share.last, len(rest)]
        for tensor in tensors:
            words += tensor.shape
        buffer.write_words(words)
        buffer.pending = self._wire.send(buffer.tensor)
        self._free, self._under_way = self._under_way, buffer

    def finish(self, number: tuple[int, int]) -> None:
        """Say that the pass holds no batch at all."""
        self._control(_END, b"", number)

    def fail(self, message: str, number: tuple[int, int]) -> None:
        """Say that no batch will come, and why."""
        self._control(_FAILED, message.encode(), number)

    def wait(self) -> None:
        """Until everything has arrived."""
        self._free.wait()
        self._under_way.wait()

    def _introduce(self, template: _Template, needed: int, number: tuple[int, int]) -> None:
        if template.dims > _WORDS - _FIXED:
            raise ConfigError(
                f"dispatch describes at most {_WORDS - _FIXED} tensor dimensions per batch; this one has "
                f"{template.dims}. Let every rank read its own samples (dispatch=False)."
            )
        # Room to grow: batches of varying length would otherwise introduce themselves again and again.
        capacity = max(_padded(needed), self._capacity if self._capacity > _HEADER else 0)
        if self._capacity > _HEADER and needed > self._capacity:
            capacity = _padded(needed + needed // 4)
        self._control(_LAYOUT, pickle.dumps((template, capacity), protocol=5), number)
        self._template = template
        if capacity != self._capacity:
            self._capacity = capacity
            self._free, self._under_way = _Buffer(capacity), _Buffer(capacity)

    def _control(self, kind: int, payload: bytes, number: tuple[int, int]) -> None:
        self.wait()
        self._free.write_words([kind, *number, len(payload)])
        self._wire.send(self._free.tensor).wait()
        if payload:
            blob = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
            self._wire.send(blob).wait()


def _or_none(value: int | None) -> int:
    return -1 if value is None else value


@final
class Sender:
    """Rank 0's side: gives each of the other ranks its batch."""

    def __init__(self, wires: Mapping[int, Wire]) -> None:
        self._lines = [_Line(wires[rank]) for rank in sorted(wires)]

    def send(self, batches: list[Any], shares: list[Share], number: tuple[int, int]) -> None:
        """Batches and shares of all ranks in rank order, rank 0's own included; `number` is (pass, step)."""
        for line, batch, share in zip(self._lines, batches[1:], shares[1:], strict=True):
            line.send(batch, share, number)

    def finish(self, number: tuple[int, int]) -> None:
        """The pass has no batch."""
        for line in self._lines:
            line.finish(number)

    def fail(self, error: BaseException, number: tuple[int, int]) -> None:
        """Reading failed: the others must not wait for ever."""
        for line in self._lines:
            try:
                line.fail(f"{type(error).__name__}: {error}", number)
            except RuntimeError:
                continue  # that rank is gone, and cannot be told; the reader's error is the one to raise

    def wait(self) -> None:
        """Until all ranks have what was sent."""
        for line in self._lines:
            line.wait()


@final
class Receiver:
    """The side of every rank but 0."""

    def __init__(self, world: World, wire: Wire) -> None:
        self._world = world
        self._wire = wire
        self._template: _Template | None = None
        self._capacity = _HEADER
        self._posted: tuple[Pending, Tensor] | None = None

    def receive(self, number: tuple[int, int]) -> tuple[Any, Share] | None:
        """The batch of this (pass, step), or None when the pass holds none.

        Raises:
            WorkerError: rank 0 failed while reading.
            TrustError: rank 0 is at another batch.
        """
        while True:
            work, buffer = self._posted or self._post()
            self._posted = None
            work.wait()
            words = buffer[:_HEADER].view(torch.int64).tolist()
            if words[0] == _FAILED:
                text = self._blob(words[3]).decode()
                raise WorkerError(f"rank 0 failed while reading the data for all ranks: {text}", ranks=(0,))
            if (words[1], words[2]) != number:
                self._raise_out_of_step((words[1], words[2]), number)
            if words[0] == _END:
                return None
            if words[0] == _LAYOUT:
                self._template, self._capacity = pickle.loads(self._blob(words[3]))
                continue
            if not words[_LAST]:
                self._posted = self._post()
            return self._batch(buffer, words)

    def _post(self) -> tuple[Pending, Tensor]:
        """Be ready for the next message: with a receiver waiting, gloo delivers in half the time.

        A loop left early leaves this behind; the first message of the next pass then finds it.
        """
        # Fresh memory for each batch: the tensors are views of it, and the loop may keep them.
        buffer = torch.empty(self._capacity, dtype=torch.uint8, pin_memory=self._world.device.type == "cuda")
        return self._wire.receive(buffer), buffer

    def _batch(self, buffer: Tensor, words: list[int]) -> tuple[Any, Share]:
        template = self._template
        if template is None:
            raise TrustError(f"rank {self._world.rank} received a batch before its layout from rank 0")
        samples, repeated, everywhere, cursor, last, rest = words[3:_FIXED]
        leaves: list[Any] = []
        at, word = _HEADER, _FIXED
        for slot in template.slots:
            if slot.dtype is None:
                leaves.append(None)
                continue
            shape = words[word : word + slot.ndim]
            word += slot.ndim
            size = slot.dtype.itemsize
            for extent in shape:
                size *= extent
            leaves.append(buffer[at : at + size].view(slot.dtype).view(shape))
            at += _padded(size)
        if rest:
            others = iter(pickle.loads(_bytes_of(buffer[at : at + rest])))
            for index, slot in enumerate(template.slots):
                if slot.dtype is None:
                    leaves[index] = next(others)
        batch = map_leaves(leaves.__getitem__, template.structure)
        known = None if everywhere < 0 else everywhere
        return batch, Share((), samples, repeated, known, cursor, bool(last))

    def _blob(self, size: int) -> bytearray:
        blob = torch.empty(size, dtype=torch.uint8)
        if size:
            self._wire.receive(blob).wait()
        return _bytes_of(blob)

    def _raise_out_of_step(self, theirs: tuple[int, int], ours: tuple[int, int]) -> NoReturn:
        raise TrustError(
            f"rank {self._world.rank} asks for batch {ours[1]} of pass {ours[0]}, but rank 0 sends batch "
            f"{theirs[1]} of pass {theirs[0]}: with dispatch every rank must take the same number of "
            "batches. A likely cause is a loop that one rank left earlier than the others."
        )
