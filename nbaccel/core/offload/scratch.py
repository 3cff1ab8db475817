"""The offload folder: weights that are in no file yet, written as one safetensors file and read from there."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path

import torch

from nbaccel.core.checkpoint.files import write_tensors
from nbaccel.core.checkpoint.filesystem import FileSystem, LocalFileSystem
from nbaccel.core.checkpoint.tensorfile import Spec, lay_out
from nbaccel.core.offload.parts import human
from nbaccel.core.offload.weights import FileTensor, Stored, TensorFile
from nbaccel.errors import CheckpointError

__all__ = ["write_scratch"]


def write_scratch(
    tensors: Mapping[str, tuple[Stored, torch.dtype]],
    folder: Path,
    model: str,
    filesystem: FileSystem | None = None,
) -> dict[str, Stored]:
    """Writes tensors, each in its dtype, one by one, and gives them as they are stored now.

    The name is made from the model's class and its tensors' names and shapes: a model dispatched again
    replaces its own file, and no other's. A file that is replaced stays readable to who has it open.

    Raises:
        CheckpointError: the folder cannot be written, or the disk is full. Nothing is left behind.
    """
    filesystem = filesystem or LocalFileSystem()
    specs = {name: Spec(dtype, stored.shape) for name, (stored, dtype) in tensors.items()}
    layout = lay_out(specs, {"format": "pt"})
    described = repr(sorted((name, spec.shape, str(spec.dtype)) for name, spec in specs.items()))
    name = f"{model}-{hashlib.sha256(described.encode()).hexdigest()[:12]}.safetensors"
    partial = f"{name}.partial-{os.getpid()}-{threading.get_ident()}"

    def value(key: str) -> torch.Tensor:
        stored, dtype = tensors[key]
        view = stored.view()
        return (stored.read() if view is None else view).to(dtype)

    try:
        filesystem.make_folder(folder)
        free = filesystem.free_bytes(folder)
        if free < layout.num_bytes:
            raise OSError(f"{human(layout.num_bytes)} are needed and {human(free)} are free")
        try:
            write_tensors(folder, partial, layout, value, filesystem)
            # Opened before it has its name, so that it is this file and not that of a model dispatched meanwhile.
            file = TensorFile(folder / partial)
            filesystem.rename(folder / partial, folder / name)
        except BaseException:
            filesystem.remove(folder / partial)
            raise
    except OSError as error:
        raise CheckpointError(f"the offload folder {folder} cannot be used: {error}") from error
    return {key: FileTensor(file, file.entries[key]) for key in tensors}
