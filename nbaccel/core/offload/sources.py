"""Opening a checkpoint, whatever it is, without reading its tensors.

A safetensors file, or a torch file (weights only); a folder with one of them, with several and their index,
with several without one, also in folders below; a checkpoint of torch.distributed.
"""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nbaccel.core.model.renamed import Made, Renamed
from nbaccel.core.offload.distributed import open_distributed
from nbaccel.core.offload.weights import FileTensor, Loaded, ReadByCall, Stored, TensorFile
from nbaccel.errors import CheckpointError

__all__ = ["by_names", "for_model", "open_checkpoint"]

_POINTER = b"version https://git-lfs"
"""What git-lfs leaves in a file's place begins with it, see its docs/spec.md."""
_ZIP = b"PK\x03\x04"
"""What a torch file since 1.6 begins with; in a safetensors file it would be the length of the header, 67 MB."""
_TORCH = (".bin", ".pt", ".pth")
_OF_TRAINING = ("optimizer", "scheduler", "training_args", "rng_state", "random_states", "scaler")
_INSIDE = ("state_dict", "model", "model_state_dict", "module")


def open_checkpoint(path: str | Path) -> dict[str, Stored]:
    """The tensors of a checkpoint by name.

    Raises:
        CheckpointError: there is none, a file of it is missing or damaged, or it would run code.
    """
    path = Path(path).expanduser()
    if path.is_file():
        if path.name.endswith(".index.json"):
            return _indexed(path)
        return _file(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint at {path}")
    if (path / ".metadata").is_file():
        return open_distributed(path)
    indices = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.index.json"))
    if indices:
        return _merged(_indexed(index) for index in indices)
    if (path / "manifest.json").is_file() and list(path.glob("shards-*.safetensors")):
        raise CheckpointError(
            f"{path} is a training checkpoint of nbaccel: `nbaccel merge {path} FOLDER` writes its weights"
        )
    files = _weights_in(path)
    if files:
        return _merged(_file(file) for file in files)
    below = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    found = [folder for folder in below if _has_weights(folder)]
    if not found:
        raise CheckpointError(f"{path} holds no *.safetensors, *.bin, *.pt or distributed checkpoint")
    return _merged(open_checkpoint(folder) for folder in found)


def by_names(renamed: Renamed, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors of a checkpoint by a model's names; those made of several are made when they are read."""
    found = {name: stored[key] for name, key in renamed.names.items()}
    made: dict[str, Stored] = {
        name: ReadByCall(one.dtype, one.shape, partial(_make, one, stored))
        for name, one in renamed.made.items()
    }
    return found | made


def _make(made: Made, stored: Mapping[str, Stored]) -> torch.Tensor:
    sources = [stored[key] for key in made.sources]
    views = [one.view() for one in sources]
    return made.make([one.read() if view is None else view for one, view in zip(sources, views, strict=True)])


def for_model(names: Collection[str], stored: Mapping[str, Stored]) -> Mapping[str, Stored]:
    """The checkpoint without what a training script puts before the model's own names, "model." and the like."""
    best, most = stored, len(stored.keys() & names)
    for inside in _INSIDE:
        start = f"{inside}."
        below = {key.removeprefix(start): value for key, value in stored.items() if key.startswith(start)}
        if len(below.keys() & names) > most:
            best, most = below, len(below.keys() & names)
    return best


def _weights_in(folder: Path) -> list[Path]:
    """The files of a folder that hold a model's tensors; safetensors where there are both kinds."""
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    torch_files = (file for suffix in _TORCH for file in folder.glob(f"*{suffix}"))
    return sorted(file for file in torch_files if not file.name.startswith(_OF_TRAINING))


def _has_weights(folder: Path) -> bool:
    if _weights_in(folder) or (folder / ".metadata").is_file():
        return True
    return any(_has_weights(below) for below in folder.iterdir() if below.is_dir() and below.name[0] != ".")


def _merged(parts: Iterable[dict[str, Stored]]) -> dict[str, Stored]:
    whole: dict[str, Stored] = {}
    for part in parts:
        twice = whole.keys() & part.keys()
        if twice:
            raise CheckpointError(
                f"{min(twice)} is in several files: name the one file or folder that is meant"
            )
        whole |= part
    return whole


def _indexed(index: Path) -> dict[str, Stored]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        files_named = [index.parent / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of a checkpoint: {error!r}") from error
    absent = [name for name, file in zip(names, files_named, strict=True) if not file.is_file()]
    if absent:
        raise CheckpointError(f"{index} names files that are not there: {', '.join(absent[:6])}")
    files = {name: _file(file) for name, file in zip(names, files_named, strict=True)}
    without = [key for key, name in weight_map.items() if key not in files[name]]
    if without:
        raise CheckpointError(
            f"{index.parent / weight_map[without[0]]} lacks {without[0]}, which the index puts there"
        )
    return {key: files[name][key] for key, name in weight_map.items()}


def _file(path: Path) -> dict[str, Stored]:
    """By what it is, not by its name alone: a torch file may be called .ckpt, or anything."""
    try:
        with path.open("rb") as handle:
            begin = handle.read(len(_POINTER))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if begin == _POINTER:
        raise CheckpointError(
            f"{path} is only git-lfs's pointer to the file, which was not downloaded: `git lfs pull` there fetches it"
        )
    if begin.startswith(_ZIP) or path.suffix in _TORCH:
        return _torch_file(path)
    file = TensorFile(path)
    return {name: FileTensor(file, entry) for name, entry in file.entries.items()}


def _torch_file(path: Path) -> dict[str, Stored]:
    """Mapped where it is one of today's; one of before torch 1.6 is read whole. Never runs code."""
    try:
        mapped = True
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            mapped = False
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, struct.error) as error:
        raise CheckpointError(f"{path} cannot be read as weights alone: {_reason(path, error)}") from error
    state = _state_in(content)
    if not state:
        raise CheckpointError(f"{path} holds no tensors by name")
    return {name: Loaded(tensor, on_disk=mapped) for name, tensor in state.items()}


def _reason(path: Path, error: Exception) -> str:
    """Why torch does not read a file, without its advice to run what the file holds."""
    said = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
    with path.open("rb") as handle:
        begin = handle.read(len(_ZIP))
    if not begin or (begin == _ZIP and not zipfile.is_zipfile(path)):
        return f"it is truncated, download or copy it again ({said[:300]})"
    if "global" not in said.lower():
        return f"it is damaged, or no torch file ({said[:300]})"
    return (
        f"it holds more than tensors ({said.partition(' Please ')[0]}). Where you trust it, open it with torch and "
        "save the model's state_dict() by itself"
    )


def _state_in(content: Any) -> dict[str, torch.Tensor]:
    """The tensors by name: at the top, or where training scripts put them."""
    if not isinstance(content, dict):
        return {}
    here = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    return here or next((found for key in _INSIDE if (found := _state_in(content.get(key)))), {})
