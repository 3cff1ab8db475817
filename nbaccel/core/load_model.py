"""Weights in Hugging Face's layout into a model that may be spread over the ranks: each rank reads its part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from nbaccel.core.checkpoint import FileSystem, LocalFileSystem
from nbaccel.core.checkpoint.modules import differences
from nbaccel.core.checkpoint.shards import Index, read_into
from nbaccel.core.checkpoint.tensorfile import Entry, read_header
from nbaccel.errors import CheckpointError

__all__ = ["load_model"]

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def load_model(
    targets: Mapping[str, torch.Tensor],
    tied: Mapping[str, str],
    folder: str | Path,
    *,
    strict: bool = True,
    filesystem: FileSystem | None = None,
) -> None:
    """Fills `targets`, whole tensors or DTensors, in place from safetensors files; of a DTensor only the part
    that this rank holds is read, so no rank ever has the whole model in memory.

    Args:
        tied: names that are another's tensor, with that other's name; a file may hold either.
        folder: what `save_model` or `save_pretrained` wrote, or one safetensors file.
        strict: names that only one side has are an error.

    Raises:
        CheckpointError: nothing there, unreadable, or of another model; nothing has been changed then.
    """
    filesystem = filesystem or LocalFileSystem()
    path = Path(folder)
    index = Index.of_whole(_headers(path, filesystem))
    present = set(index.names)
    wanted = {name: tensor for name, tensor in targets.items() if name not in tied}
    renamed = {other: name for name, other in tied.items() if other not in present and name in present}
    wanted = {renamed.get(name, name): tensor for name, tensor in wanted.items()}
    found = differences(wanted, present - tied.keys() if strict else present & wanted.keys())
    if found and strict:
        raise CheckpointError(f"{path} holds the weights of another model: {found}")
    wanted = {name: tensor for name, tensor in wanted.items() if name in present}
    for name, tensor in wanted.items():
        shape = index.tensor(name).size
        if shape != tensor.shape:
            raise CheckpointError(
                f"{name} is {tuple(shape)} in {path} and {tuple(tensor.shape)} in the model"
            )
    with torch.no_grad():
        read_into(wanted, index, path if path.is_dir() else path.parent, filesystem)


def _headers(path: Path, filesystem: FileSystem) -> dict[str, dict[str, Entry]]:
    try:
        if not filesystem.is_folder(path):
            names = [path.name]
            path = path.parent
        elif _INDEX in filesystem.names(path):
            with filesystem.open(path / _INDEX) as handle:
                names = sorted(set(json.loads(handle.read())["weight_map"].values()))
        else:
            names = [_WHOLE]
        headers = {}
        for name in names:
            with filesystem.open(path / name) as handle:
                headers[name] = read_header(handle)
        return headers
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"the weights in {path} cannot be read: {error}") from error
