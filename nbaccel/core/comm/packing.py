"""Several tensors in one buffer of bytes, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["as_bytes", "pack", "packed_size", "unpack", "unpack_rows"]

_ALIGN = 16  # of complex128, the widest element


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor as uint8 [bytes]; writes go through."""
    flat = tensor.reshape(-1)
    if flat.numel() < 2:
        flat = flat.as_strided(flat.shape, (1,))  # so few count as contiguous with any stride
    return flat.view(torch.uint8)


def _room_for(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN) * _ALIGN


def packed_size(tensors: Sequence[torch.Tensor]) -> int:
    return sum(_room_for(t.nbytes) for t in tensors)


def pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """All of them in one uint8 buffer, each beginning at a multiple of 16 bytes."""
    device = tensors[0].device if tensors else torch.device("cpu")
    packed = torch.zeros(packed_size(tensors), dtype=torch.uint8, device=device)
    start = 0
    for tensor in tensors:
        packed[start : start + tensor.nbytes] = as_bytes(tensor.contiguous())
        start += _room_for(tensor.nbytes)
    return packed


def unpack(
    packed: torch.Tensor, like: Sequence[torch.Tensor], shapes: Sequence[tuple[int, ...]]
) -> list[torch.Tensor]:
    """The inverse of `_pack`, as copies, for the dtypes of `like` and the given shapes."""
    out, start = [], 0
    for tensor, shape in zip(like, shapes, strict=True):
        made = torch.empty(shape, dtype=tensor.dtype, device=packed.device)
        if made.numel():
            as_bytes(made).copy_(packed[start : start + made.nbytes])
        out.append(made)
        start += _room_for(made.nbytes)
    return out


def unpack_rows(rows: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """`rows` [size, bytes] of equally packed tensors, as one [size, *shape] per tensor."""
    out, start = [], 0
    for tensor in like:
        made = torch.empty((rows.shape[0], *tensor.shape), dtype=tensor.dtype, device=rows.device)
        if made.numel():
            as_bytes(made).view(rows.shape[0], -1).copy_(rows[:, start : start + tensor.nbytes])
        out.append(made)
        start += _room_for(tensor.nbytes)
    return out
