"""A model's weights alone, as Hugging Face lays them out: `from_pretrained` and safetensors read them.

model.safetensors                                  when all fits into one file
model-00001-of-00003.safetensors, …                else, with
model.safetensors.index.json                       which tensor is in which file
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from nbaccel.core.checkpoint.files import layout_of, write_file, write_tensors
from nbaccel.core.checkpoint.filesystem import FileSystem, LocalFileSystem
from nbaccel.core.model.composed import is_composed
from nbaccel.core.model.tied import same_memory
from nbaccel.core.world import World
from nbaccel.errors import CheckpointError, ConfigError

__all__ = ["byte_count", "save_model", "split"]

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"^model-\d{5}-of-\d{5}\.safetensors$")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def byte_count(text: int | str, *, of: str = "max_shard_size") -> int:
    """Bytes in "5GB" (powers of ten), "500MiB" (powers of two) or a number.

    Raises:
        ConfigError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(text), re.IGNORECASE)
    if match is None or (match[3] and not match[2]) or float(match[1]) <= 0:
        raise ConfigError(f"{of} is {text!r}; write it like '5GB' or '500MiB', or as a number of bytes")
    unit = match[2].upper()
    return int(float(match[1]) * (_BINARY[unit] if match[3] else _UNITS[unit]))


def split(tensors: Mapping[str, torch.Tensor], max_shard_size: int) -> list[dict[str, torch.Tensor]]:
    """The tensors in order, divided so that no file exceeds the size; a larger tensor gets its own."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        count = tensor.numel() * tensor.element_size()
        if shards[-1] and size + count > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += count
    return shards


def save_model(
    state: Mapping[str, torch.Tensor],
    folder: str | Path,
    *,
    world: World,
    max_shard_size: int | str = "10GB",
    filesystem: FileSystem | None = None,
) -> list[Path]:
    """Writes a full state dict on the main process; what tied names share is written once.

    Other ranks may pass an empty state and return at once. Every file is written beside its name and then
    renamed, the index last; weights of an earlier save that are no longer used are removed after that.

    Returns:
        The files that hold tensors.

    Raises:
        CheckpointError: the disk is full or cannot be written.
        ConfigError: `max_shard_size` is no size; or weights are quantised.
    """
    limit = byte_count(max_shard_size)
    if not world.is_main:
        return []
    quantised = [
        name for name, tensor in state.items() if isinstance(tensor, torch.Tensor) and is_composed(tensor)
    ]
    if quantised:
        raise ConfigError(
            f"{quantised[0]} is a {type(state[quantised[0]]).__name__}, and files in Hugging Face's layout hold plain "
            "tensors: save adapters with their own save_pretrained, dequantise the weights, or use save_state"
        )
    filesystem = filesystem or LocalFileSystem()
    folder = Path(folder)
    aliases = same_memory(state)
    kept = {name: tensor for name, tensor in state.items() if name not in aliases}
    shards = split(kept, limit)
    total = sum(t.numel() * t.element_size() for t in kept.values())
    try:
        filesystem.make_folder(folder)
        free = filesystem.free_bytes(folder)
        if free < total:
            raise OSError(f"the weights take {total} bytes and {free} are free")
        return _write(shards, folder, total, filesystem)
    except OSError as error:
        raise CheckpointError(f"rank 0 could not save the model to {folder}: {error}") from error


def _write(
    shards: list[dict[str, torch.Tensor]], folder: Path, total: int, filesystem: FileSystem
) -> list[Path]:
    names = [_WHOLE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    contents: dict[str, bytes] = {}
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        contents[_INDEX] = (json.dumps(index, indent=2) + "\n").encode()
    suffix = f".partial-{os.getpid()}"
    made: list[str] = []
    try:
        for name, shard in zip(names, shards, strict=True):
            made.append(name)
            write_tensors(folder, name + suffix, layout_of(shard), shard.__getitem__, filesystem)
        for name, data in contents.items():
            made.append(name)
            write_file(folder, name + suffix, [data], filesystem)
    except OSError:
        for name in made:
            filesystem.remove(folder / (name + suffix))
        raise
    for name in made:
        filesystem.rename(folder / (name + suffix), folder / name)
    filesystem.sync_folder(folder)
    for name in filesystem.names(folder):
        if name not in made and (name in (_WHOLE, _INDEX) or _SHARD.match(name)):
            filesystem.remove(folder / name)
    return [folder / name for name in names]
