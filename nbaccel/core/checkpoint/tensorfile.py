"""One file of tensors in the safetensors layout: 8 bytes of header length, a JSON header, the bytes.

Written here by hand, so that nothing needs to be installed and the layout of a file is known before its
tensors are: a staging buffer can then have the file's shape. Any safetensors reader opens these files.
Source of the format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

import torch

__all__ = ["Entry", "Layout", "Spec", "data_bytes", "lay_out", "read_exactly", "read_header", "read_tensor"]

_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
# The format's later types are read and not written, which readers of before them would refuse. Torch has the first
# since 2.7.
_DTYPES |= {
    name: getattr(torch, dtype)
    for name, dtype in (
        ("F8_E8M0", "float8_e8m0fnu"),
        ("F8_E4M3FNUZ", "float8_e4m3fnuz"),
        ("F8_E5M2FNUZ", "float8_e5m2fnuz"),
    )
    if hasattr(torch, dtype)
}
_MAX_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class Spec:
    """What a tensor will be: enough to place it in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: `begin` counts from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    num_bytes: int

    @property
    def end(self) -> int:
        return self.begin + self.num_bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """A whole file before it is written. `order` is the order of the tensors' bytes."""

    header: bytes
    order: tuple[str, ...]
    entries: Mapping[str, Entry]
    num_bytes: int


def lay_out(specs: Mapping[str, Spec], metadata: Mapping[str, str] | None = None) -> Layout:
    """Places tensors one after the other, widest element first so that each is aligned to its elements, and
    large before small, so that copying the large ones into a buffer of this shape is aligned and fast.

    A dtype the format does not know is stored as bytes; its real name stands in the header's metadata.
    """
    order = tuple(sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, -specs[name].num_bytes)))
    header: dict[str, object] = {}
    strange: dict[str, str] = {}
    offsets: dict[str, int] = {}
    position = 0
    for name in order:
        spec = specs[name]
        known = _NAMES.get(spec.dtype)
        if known is None:
            strange[name] = str(spec.dtype).removeprefix("torch.")
        offsets[name] = position
        header[name] = {
            "dtype": known or "U8",
            "shape": list(spec.shape) if known else [spec.num_bytes],
            "data_offsets": [position, position + spec.num_bytes],
        }
        position += spec.num_bytes
    shapes = {name: list(specs[name].shape) for name in strange}
    extra = {"nbaccel": json.dumps({"dtypes": strange, "shapes": shapes})} if strange else {}
    if metadata or extra:
        header = {"__metadata__": {**(metadata or {}), **extra}, **header}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # mapped, the large tensors are aligned as torch's own are
    head = len(text).to_bytes(8, "little") + text
    entries = {
        name: Entry(specs[name].dtype, specs[name].shape, len(head) + offsets[name], specs[name].num_bytes)
        for name in order
    }
    return Layout(head, order, entries, len(head) + position)


def read_header(handle: BinaryIO) -> dict[str, Entry]:
    """Where each tensor of an open file lies.

    Raises:
        ValueError: this is not a safetensors file.
    """
    handle.seek(0)
    length = int.from_bytes(read_exactly(handle, 8), "little")
    if not 2 <= length <= _MAX_HEADER:
        raise ValueError(f"its header would be {length} bytes long: not a safetensors file")
    header = json.loads(read_exactly(handle, length))
    strange = json.loads(header.pop("__metadata__", {}).get("nbaccel", "{}"))
    entries: dict[str, Entry] = {}
    for name, value in header.items():
        begin, end = value["data_offsets"]
        if not (type(begin) is type(end) is int and 0 <= begin <= end):
            raise ValueError(f"{name} would lie from byte {begin} to {end}")
        dtype, shape = _DTYPES[value["dtype"]], tuple(value["shape"])
        if name in strange.get("dtypes", {}):
            dtype, shape = getattr(torch, strange["dtypes"][name]), tuple(strange["shapes"][name])
        entries[name] = Entry(dtype, shape, 8 + length + begin, end - begin)
    return entries


def read_tensor(handle: BinaryIO, entry: Entry) -> torch.Tensor:
    """One tensor of an open file, in memory of its own."""
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    view = data_bytes(tensor)
    handle.seek(entry.begin)
    done = 0
    while done < entry.num_bytes:
        count = handle.readinto(view[done:])  # type: ignore[attr-defined]  # every binary file has it
        if not count:
            raise ValueError(f"it ends {entry.num_bytes - done} bytes too early")
        done += count
    return tensor


def read_exactly(handle: BinaryIO, count: int) -> bytes:
    """The next `count` bytes.

    Raises:
        ValueError: the file ends before.
    """
    pieces = []
    while count:
        piece = handle.read(count)
        if not piece:
            raise ValueError(f"it ends {count} bytes too early")
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def data_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, which must outlive the view."""
    here = tensor.device.type == "cpu" and tensor.layout is torch.strided and tensor.is_contiguous()
    count = tensor.numel() * tensor.element_size()
    # What is made of other tensors, as a quantized weight, has no address of its own.
    if not here or (count and not tensor.data_ptr()):
        raise ValueError("only a contiguous tensor in main memory can be seen as bytes")
    if count == 0:
        return memoryview(bytearray())
    # Not through NumPy: it knows neither bfloat16 nor float8, and need not be installed.
    return memoryview((ctypes.c_ubyte * count).from_address(tensor.data_ptr())).cast("B")
