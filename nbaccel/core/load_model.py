"""Weights in Hugging Face's layout into a model that may be spread over the ranks: each rank reads its part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from nbaccel.core.checkpoint import FileSystem, LocalFileSystem
from nbaccel.core.checkpoint.modules import canonical_name, differences
from nbaccel.core.checkpoint.shards import Index, read_into
from nbaccel.core.checkpoint.tensorfile import Entry, read_header
from nbaccel.core.model.tied import find_tied_parameters
from nbaccel.errors import CheckpointError

__all__ = ["Weights", "find_weights", "load_model", "load_module", "tied_names"]

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
    shapes = {name: tensor.shape for name, tensor in targets.items()}
    found = find_weights(shapes, tied, folder, strict=strict, filesystem=filesystem)
    found.read({name: targets[name] for name in found.names})


def load_module(module: nn.Module, folder: str | Path, *, strict: bool) -> None:
    """`load_model` for a module whose state dict gives its own tensors."""
    own = {canonical_name(module, name): tensor for name, tensor in module.state_dict().items()}
    load_model(own, tied_names(module), folder, strict=strict)


def tied_names(module: nn.Module) -> dict[str, str]:
    """Names of parameters that are another's, with that other's name."""
    named = ([canonical_name(module, name) for name in group] for group in find_tied_parameters(module))
    return {name: group[0] for group in named for name in group[1:]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Safetensors files that fit a model."""

    folder: Path
    names: Mapping[str, str]
    """Of the model's tensors that are there, tied ones once: each with its name in the files."""
    index: Index
    filesystem: FileSystem

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor in the files, by the model's name."""
        return self.index.tensor(self.names[name]).properties.dtype

    def read(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Fills tensors, given by the model's names, in place."""
        with torch.no_grad():
            stored = {self.names[name]: tensor for name, tensor in targets.items()}
            read_into(stored, self.index, self.folder, self.filesystem)


def find_weights(
    shapes: Mapping[str, torch.Size],
    tied: Mapping[str, str],
    folder: str | Path,
    *,
    strict: bool,
    filesystem: FileSystem | None = None,
) -> Weights:
    """Opens the files and compares names and shapes with the model's. See `load_model`."""
    filesystem = filesystem or LocalFileSystem()
    path = Path(folder)
    index = Index.of_whole(_headers(path, filesystem))
    present = set(index.names)
    renamed = {other: name for name, other in tied.items() if other not in present and name in present}
    names = {name: renamed.get(name, name) for name in shapes if name not in tied}
    found = differences(names.values(), present - tied.keys() | set(renamed.values()))
    if found and strict:
        raise CheckpointError(f"{path} holds the weights of another model: {found}")
    names = {name: stored for name, stored in names.items() if stored in present}
    for name, stored in names.items():
        shape = index.tensor(stored).size
        if shape != shapes[name]:
            raise CheckpointError(
                f"{stored} is {tuple(shape)} in {path} and {tuple(shapes[name])} in the model"
            )
    root = path if path.is_dir() else path.parent
    return Weights(folder=root, names=names, index=index, filesystem=filesystem)


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
