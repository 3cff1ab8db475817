"""The tensors of a torch.distributed checkpoint, read one by one without a process group.

Its `.metadata` is a pickle: only the classes that torch itself writes there are let in.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, final

import torch

from nbaccel.core.offload.weights import ReadByCall, Stored
from nbaccel.errors import CheckpointError

__all__ = ["open_distributed"]

_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.storage",
)
_OTHERS = {("collections", "OrderedDict"), ("pathlib", "PosixPath"), ("torch.serialization", "_get_layout")}
_Piece = tuple[Sequence[int], Sequence[int], str, int, int]  # offsets, sizes, file, first byte, bytes


def open_distributed(folder: Path) -> dict[str, Stored]:
    """Its tensors by name.

    Raises:
        CheckpointError: the metadata cannot be read, or would run code.
    """
    try:
        with (folder / ".metadata").open("rb") as handle:
            metadata = _Metadata(handle).load()
        where: dict[str, dict[tuple[int, ...], Any]] = {}
        for index, info in metadata.storage_data.items():
            where.setdefault(index.fqn, {})[tuple(index.offset or ())] = info
        found: dict[str, Stored] = {}
        for key, kept in metadata.state_dict_metadata.items():
            if not hasattr(kept, "chunks"):
                continue  # bytes: an object that is no tensor
            pieces: list[_Piece] = []
            for chunk in kept.chunks:
                info = where[key][tuple(chunk.offsets)]
                if getattr(info, "transform_descriptors", None):
                    raise CheckpointError(
                        f"{key} in {folder} is compressed: load it with torch and save it plainly"
                    )
                pieces.append((chunk.offsets, chunk.sizes, info.relative_path, info.offset, info.length))
            shape, dtype = tuple(kept.size), kept.properties.dtype
            found[key] = ReadByCall(dtype, shape, partial(_read, folder, key, shape, dtype, pieces))
    except (
        OSError,
        EOFError,
        KeyError,
        AttributeError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:
        raise CheckpointError(f"{folder} is no distributed checkpoint that can be read: {error!r}") from error
    return found


@final
class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _OTHERS:
            return super().find_class(module, name)
        if module in _MODULES:
            written = super().find_class(module, name)
            # "os.system" is an attribute of a module that imports os
            if isinstance(written, type) and written.__module__ == module:
                return written
        found = getattr(torch, name, None) if module == "torch" else None
        if found is torch.Size or isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
            return found
        raise pickle.UnpicklingError(f"it would import {module}.{name}")


def _read(
    folder: Path, key: str, shape: tuple[int, ...], dtype: torch.dtype, pieces: Sequence[_Piece]
) -> torch.Tensor:
    whole: torch.Tensor | None = None
    for offsets, sizes, name, begin, length in pieces:
        try:
            with (folder / name).open("rb") as handle:
                handle.seek(begin)
                piece = torch.load(io.BytesIO(handle.read(length)), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{key} cannot be read from {folder / name}: {str(error)[:500]}") from error
        if tuple(sizes) == shape:
            return piece.contiguous()  # type: ignore[no-any-return]
        whole = torch.empty(shape, dtype=dtype) if whole is None else whole
        target = whole
        for axis, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            target = target.narrow(axis, offset, size)
        target.copy_(piece)
    if whole is None:
        raise CheckpointError(f"{key} has no pieces in {folder}")
    return whole
