"""Weights in Hugging Face's layout into a model that may be spread over the ranks: each rank reads its part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from nbaccel.core.checkpoint import FileSystem, LocalFileSystem
from nbaccel.core.checkpoint.divided import lay_out_as
from nbaccel.core.checkpoint.modules import canonical_name, differences
from nbaccel.core.checkpoint.shards import Index, read_into
from nbaccel.core.checkpoint.tensorfile import Entry, read_header
from nbaccel.core.model.renamed import Made, Renamed, as_transformers
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
    model: nn.Module | None = None,
    strict: bool = True,
    filesystem: FileSystem | None = None,
) -> str:
    """Fills `targets`, whole tensors or DTensors, in place from safetensors files; of a DTensor only the part
    that this rank holds is read, so no rank ever has the whole model in memory. Says how names were understood, if
    not as they stand.

    Args:
        tied: names that are another's tensor, with that other's name; a file may hold either.
        folder: what `save_model` or `save_pretrained` wrote, or one safetensors file.
        model: whose the tensors are. A Hugging Face model's files are read as its `from_pretrained` reads them, by the
            names its class has today; what is made of several tensors is whole on each rank while it is made.
        strict: names that only one side has are an error.

    Raises:
        CheckpointError: nothing there, unreadable, or of another model; nothing has been changed then.
    """
    shapes = {name: tensor.shape for name, tensor in targets.items()}
    found = find_weights(shapes, tied, folder, model=model, strict=strict, filesystem=filesystem)
    found.read({name: targets[name] for name in found.names})
    return found.said


def load_module(module: nn.Module, folder: str | Path, *, strict: bool) -> str:
    """`load_model` for a module whose state dict gives its own tensors."""
    own = {canonical_name(module, name): tensor for name, tensor in module.state_dict().items()}
    compiled = module._modules.get("_orig_mod")  # where torch.compile keeps what it was given
    model = module if compiled is None else compiled
    return load_model(own, tied_names(module), folder, model=model, strict=strict)


def tied_names(module: nn.Module) -> dict[str, str]:
    """Names of parameters that are another's, with that other's name."""
    named = ([canonical_name(module, name) for name in group] for group in find_tied_parameters(module))
    return {name: group[0] for group in named for name in group[1:]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Safetensors files that fit a model."""

    folder: Path
    stored: Mapping[str, str]
    """Of the model's tensors that are there, tied ones once: each with its name in the files."""
    made: Mapping[str, Made]
    """Those that are made of several there."""
    said: str
    """How names were understood, if not as they stand."""
    index: Index
    filesystem: FileSystem

    @property
    def names(self) -> list[str]:
        """The model's tensors that are there."""
        return [*self.stored, *self.made]

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor in the files, by the model's name."""
        made = self.made.get(name)
        return self.index.tensor(self.stored[name]).properties.dtype if made is None else made.dtype

    @torch.no_grad()
    def read(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Fills tensors, given by the model's names, in place."""
        as_stored = {self.stored[name]: tensor for name, tensor in targets.items() if name in self.stored}
        read_into(as_stored, self.index, self.folder, self.filesystem)
        for name, tensor in targets.items():
            if name in self.made:
                tensor.copy_(lay_out_as(tensor, self._make(self.made[name])))

    def _make(self, made: Made) -> torch.Tensor:
        known = {name: self.index.tensor(name) for name in made.sources}
        values = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in known.items()}
        read_into(values, self.index, self.folder, self.filesystem)
        return made.make(list(values.values()))


def find_weights(
    shapes: Mapping[str, torch.Size],
    tied: Mapping[str, str],
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    strict: bool,
    filesystem: FileSystem | None = None,
) -> Weights:
    """Opens the files and compares names and shapes with the model's. See `load_model`."""
    filesystem = filesystem or LocalFileSystem()
    path = Path(folder)
    headers = _headers(path, filesystem)
    entries = {name: entry for header in headers.values() for name, entry in header.items()}
    renamed = Renamed(names={name: name for name in entries})
    if model is not None:
        renamed = as_transformers(model, shapes.keys(), entries)
    present: dict[str, tuple[int, ...]] = {name: entries[key].shape for name, key in renamed.names.items()}
    present |= {name: made.shape for name, made in renamed.made.items()}
    other_name = {other: name for name, other in tied.items() if other not in present and name in present}
    names = {name: other_name.get(name, name) for name in shapes if name not in tied}
    found = differences(names.values(), present.keys() - tied.keys() | set(other_name.values()))
    if found and strict:
        raise CheckpointError(f"{path} holds the weights of another model: {found}")
    names = {name: there for name, there in names.items() if there in present}
    for name, there in names.items():
        if present[there] != tuple(shapes[name]):
            raise CheckpointError(
                f"{there} is {present[there]} in {path} and {tuple(shapes[name])} in the model"
            )
    said = str(renamed)
    return Weights(
        folder=path if path.is_dir() else path.parent,
        stored={name: renamed.names[there] for name, there in names.items() if there in renamed.names},
        made={name: renamed.made[there] for name, there in names.items() if there in renamed.made},
        said=said and f"{path} is {said}",
        index=Index.of_whole(headers),
        filesystem=filesystem,
    )


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
