"""Where a tensor's values are: in a file, mapped or read; or in memory.

A file's tensor can be *viewed*, which maps it: nothing is read before it is touched, the memory belongs to
the page cache, and writing to it changes a private copy and never the file.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Protocol, final

import torch

from nbaccel.core.checkpoint.tensorfile import Entry, data_bytes, read_header
from nbaccel.core.model.composed import is_composed
from nbaccel.errors import CheckpointError

__all__ = [
    "FileTensor",
    "Loaded",
    "ReadByCall",
    "Stored",
    "TensorFile",
    "are_resident",
    "make_resident",
    "sample_pages",
]

_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.11
_POPULATE_READ, _WILL_NEED = 22, 3  # of madvise: <asm-generic/mman-common.h>
_PAGE = mmap.PAGESIZE


class Stored(Protocol):
    """A tensor that is somewhere."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self) -> torch.Tensor:
        """In memory of its own, on the CPU."""

    def view(self) -> torch.Tensor | None:
        """Without a copy, on the CPU; None where that cannot be."""

    def position(self) -> tuple[str, int]:
        """Where it lies, so that many can be read in order."""

    @property
    def on_disk(self) -> bool:
        """Whether it takes none of the memory."""

    @property
    def mappable(self) -> bool:
        """Whether it can be viewed."""

    @property
    def plain(self) -> bool:
        """Whether it is its numbers one after the other: not sparse, not quantized, not made of other tensors."""


@final
class TensorFile:
    """An open safetensors file; its size and every entry are checked at once.

    Raises:
        CheckpointError: it is truncated, damaged, or no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as handle:
                self.entries = read_header(handle)
                size = os.fstat(handle.fileno()).st_size
                _check(self.entries, size)
                # Opened again here: the mapping and reads from several threads share one descriptor.
                self.descriptor = os.dup(handle.fileno())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            said = f"unknown type {error}" if isinstance(error, KeyError) else error
            raise CheckpointError(f"{path} cannot be read as safetensors: {said}") from error
        self._size = size
        self._mapped: mmap.mmap | None = None

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def read(self, entry: Entry) -> torch.Tensor:
        """In memory of its own. Several threads may read at once."""
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        view = data_bytes(tensor)
        done = 0
        while done < entry.num_bytes:
            count = os.preadv(self.descriptor, [view[done:]], entry.begin + done)
            if not count:
                raise CheckpointError(f"{self.path} was truncated while it was read")
            done += count
        return tensor

    def view(self, entry: Entry) -> torch.Tensor | None:
        """Mapped; None where the bytes are not aligned to the elements."""
        if entry.num_bytes == 0 or entry.begin % entry.dtype.itemsize:
            return None
        if self._mapped is None:
            # Private and writable, so that a write changes a copy; not reserved, because the kernel would
            # otherwise refuse a file larger than the memory.
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            flags = mmap.MAP_PRIVATE | _NO_RESERVE
            self._mapped = mmap.mmap(self.descriptor, self._size, flags=flags, prot=protection)
        count = entry.num_bytes // entry.dtype.itemsize
        flat = torch.frombuffer(self._mapped, dtype=entry.dtype, count=count, offset=entry.begin)
        return flat.view(entry.shape)


@final
class FileTensor:
    """One tensor of a safetensors file."""

    __slots__ = ("_entry", "_file")

    def __init__(self, file: TensorFile, entry: Entry) -> None:
        self._file, self._entry = file, entry

    @property
    def dtype(self) -> torch.dtype:
        return self._entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self._entry.shape

    @property
    def descriptor(self) -> int:
        """Of its open file."""
        return self._file.descriptor

    @property
    def begin(self) -> int:
        """Its first byte in the file."""
        return self._entry.begin

    @property
    def num_bytes(self) -> int:
        return self._entry.num_bytes

    def read(self) -> torch.Tensor:
        return self._file.read(self._entry)

    def view(self) -> torch.Tensor | None:
        return self._file.view(self._entry)

    def position(self) -> tuple[str, int]:
        return str(self._file.path), self._entry.begin

    @property
    def on_disk(self) -> bool:
        return True

    @property
    def mappable(self) -> bool:
        return self._entry.begin % self._entry.dtype.itemsize == 0

    @property
    def plain(self) -> bool:
        return True


@final
class Loaded:
    """A tensor that torch holds: in memory, or in the mapping of a torch file."""

    __slots__ = ("_tensor", "on_disk")

    def __init__(self, tensor: torch.Tensor, *, on_disk: bool) -> None:
        self._tensor, self.on_disk = tensor.detach(), on_disk

    @property
    def dtype(self) -> torch.dtype:
        return self._tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._tensor.shape)

    def read(self) -> torch.Tensor:
        return self._tensor.detach().to("cpu", copy=True).contiguous()

    def view(self) -> torch.Tensor | None:
        here = self._tensor.device.type == "cpu" and (not self.plain or self._tensor.is_contiguous())
        return self._tensor if here else None

    def position(self) -> tuple[str, int]:
        return "", self._tensor.data_ptr() if self.plain else 0

    @property
    def mappable(self) -> bool:
        return self.view() is not None

    @property
    def plain(self) -> bool:
        tensor = self._tensor
        return tensor.layout is torch.strided and not tensor.is_quantized and not is_composed(tensor)


@final
class ReadByCall:
    """A tensor that a function reads, as those of distributed checkpoints."""

    __slots__ = ("_read", "dtype", "shape")

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], read: Callable[[], torch.Tensor]) -> None:
        self.dtype, self.shape, self._read = dtype, shape, read

    def read(self) -> torch.Tensor:
        return self._read()

    def view(self) -> torch.Tensor | None:
        return None

    def position(self) -> tuple[str, int]:
        return "", 0

    @property
    def on_disk(self) -> bool:
        return True

    @property
    def mappable(self) -> bool:
        return False

    @property
    def plain(self) -> bool:
        return True


def _check(entries: dict[str, Entry], size: int) -> None:
    for name, entry in entries.items():
        wanted = torch.Size(entry.shape).numel() * entry.dtype.itemsize
        if entry.num_bytes != wanted:
            raise ValueError(f"{name} has {entry.num_bytes} bytes and its shape {entry.shape} takes {wanted}")
    for (name, entry), (other, later) in pairwise(
        sorted(entries.items(), key=lambda e: (e[1].begin, e[1].end))
    ):
        if later.begin < entry.end:
            raise ValueError(f"{other} begins inside {name}")
    last = max(entries, key=lambda name: entries[name].end, default=None)
    if last is not None and entries[last].end > size:
        beyond = [n for n, e in entries.items() if e.end > size]
        missing = entries[last].end - size
        raise ValueError(
            f"truncated: {missing} bytes are missing, of {len(beyond)} tensor(s) such as {beyond[0]}; copy it again"
        )


_answers = ctypes.c_ubyte * 1
_libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
if _libc is not None:
    _libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    _libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, _answers]


def make_resident(tensor: torch.Tensor) -> None:
    """Brings a mapped tensor's pages in before they are touched; may be called from any thread."""
    start, length = _pages(tensor)
    # It is advice: whatever it answers, touching the pages brings them too. The first needs Linux 5.14.
    if _libc is not None and length and _libc.madvise(start, length, _POPULATE_READ):
        _libc.madvise(start, length, _WILL_NEED)


def sample_pages(tensor: torch.Tensor) -> list[int]:
    """Addresses of a tensor's first, middle and last page."""
    start, length = _pages(tensor)
    last = (length - 1) // _PAGE
    return [start + page * _PAGE for page in sorted({0, last // 2, last})] if length else []


def are_resident(pages: Sequence[int]) -> bool:
    """Whether these mapped pages are in memory."""
    answer = _answers()
    return _libc is None or all(_libc.mincore(page, 1, answer) or answer[0] & 1 for page in pages)


def _pages(tensor: torch.Tensor) -> tuple[int, int]:
    """The first page's address, and bytes from there to the tensor's end."""
    count = tensor.numel() * tensor.element_size()
    start = tensor.data_ptr() & -_PAGE
    return start, tensor.data_ptr() + count - start if count else 0
