"""Weights read past the page cache, through DeepSpeed's asynchronous I/O, for models that the memory cannot keep.

What is mapped comes at the speed of memory while the page cache holds it. A model larger than the memory is read from
the disk in every pass, by page faults of a few pages each, and pushes everything else out of the cache.
"""

from __future__ import annotations

import os
from typing import Any, final

import torch

from nbaccel.core.async_io import async_io, is_compiled, obstacle
from nbaccel.core.checkpoint.tensorfile import data_bytes
from nbaccel.core.offload.weights import FileTensor, Stored, are_resident, sample_pages
from nbaccel.errors import CheckpointError

__all__ = ["DirectReader", "direct_reader"]

_BLOCK = 4096
"""Bytes: direct I/O wants offset, length and address in multiples of the disk's blocks, which divide this."""
_REQUEST = 1 << 20
_CHUNK = 16 << 20
"""Bytes that are read while those before them are copied."""
_WORTHWHILE = 1 << 20
"""Bytes of a tensor below which page faults are as quick."""


def direct_reader(device: torch.device, num_bytes: int, free: int) -> DirectReader | None:
    """A reader for weights of `num_bytes` in all that are streamed from a disk to `device`.

    None where it is of no use: on the CPU, whose layers compute with the mapped pages themselves; for what the page
    cache holds in the `free` memory, from where copying was two to four times quicker (2,000 MB/s and 600 on a loaded
    machine with a virtual disk; where nothing was cached, page faults and this were about even); and where DeepSpeed's
    module is not there already, because a dispatch that compiles for minutes helps nobody.
    """
    wanted = device.type == "cuda" and num_bytes > free
    return DirectReader(async_io()) if wanted and is_compiled() and obstacle() is None else None


@final
class DirectReader:
    """Reads for one thread at a time.

    Args:
        module: DeepSpeed's, from `async_io`.
    """

    def __init__(self, module: Any) -> None:
        self._handle = module.aio_handle(
            block_size=_REQUEST,
            queue_depth=_CHUNK // _REQUEST,
            single_submit=False,
            overlap_events=True,
            intra_op_parallelism=1,
        )
        self._chunks = [self._locked() for _ in range(2)]

    def _locked(self) -> torch.Tensor:
        """Memory that the disk can write to by itself."""
        if torch.cuda.is_available():
            return torch.empty(_CHUNK, dtype=torch.uint8, pin_memory=True)
        locked: torch.Tensor = self._handle.new_cpu_locked_tensor(_CHUNK, torch.empty(0, dtype=torch.uint8))
        return locked

    def fill(self, stored: Stored, target: torch.Tensor) -> bool:
        """Writes a tensor's values into `target`, which is contiguous and in the host's memory.

        Returns:
            False, with nothing written, where another way is as good: what is small, converted, in no file or in the
            page cache; and where the filesystem cannot.

        Raises:
            CheckpointError: the file has become shorter.
        """
        if (
            not isinstance(stored, FileTensor)
            or stored.num_bytes < _WORTHWHILE
            or stored.dtype != target.dtype
        ):
            return False
        begin, end = stored.begin, stored.begin + stored.num_bytes
        size = os.fstat(stored.descriptor).st_size
        if size < end:
            raise CheckpointError(f"{stored.position()[0]} was truncated while it was read")
        view = stored.view()
        if view is not None and are_resident(sample_pages(view)):
            return False
        path = f"/proc/self/fd/{stored.descriptor}"  # the open file, whatever has its name by now
        if not _opens_directly(path):
            return False
        flat = target.view(-1).view(torch.uint8)
        whole = min(end + -end % _BLOCK, size & -_BLOCK)  # a file's last block may be shorter
        self._read(path, begin & -_BLOCK, whole, begin, flat)
        rest = max(whole, begin)
        while rest < end:
            rest += os.preadv(stored.descriptor, [data_bytes(flat)[rest - begin :]], rest)
        return True

    def _read(self, path: str, start: int, stop: int, begin: int, target: torch.Tensor) -> None:
        """The file from `start` to `stop`, both whole blocks; its byte at `begin` is the first of `target`."""
        spans = [(low, min(low + _CHUNK, stop)) for low in range(start, stop, _CHUNK)]
        for turn in range(len(spans) + 1):
            if turn:
                self._handle.wait()
            if turn < len(spans):
                low, high = spans[turn]
                if self._handle.async_pread(self._chunks[turn % 2][: high - low], path, low):
                    raise CheckpointError(f"{path} cannot be read")
            if turn:  # while the next ones are on their way
                low, high = spans[turn - 1]
                first, last = max(low, begin), min(high, begin + target.numel())
                target[first - begin : last - begin] = self._chunks[(turn - 1) % 2][first - low : last - low]


def _opens_directly(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True
