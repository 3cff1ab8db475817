"""From a checkpoint of any number of ranks to one model's weights in Hugging Face's layout, without ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from nbaccel.core.checkpoint.filesystem import LocalFileSystem
from nbaccel.core.checkpoint.find import candidates, resolve
from nbaccel.core.checkpoint.manifest import MANIFEST, check_bytes, check_sizes, read_manifest
from nbaccel.core.checkpoint.shards import INDEX, Index, read_into
from nbaccel.core.save_model import save_model
from nbaccel.core.world import single
from nbaccel.core.zero.native import find_native, read_native
from nbaccel.errors import CheckpointError

__all__ = ["Merged", "merge"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What `merge` did."""

    checkpoint: Path
    step: int
    world_size: int
    """Ranks that had saved it."""
    model: str
    files: tuple[Path, ...]
    num_tensors: int
    num_bytes: int


def merge(
    checkpoint: Path, out: Path, *, model: str | None = None, max_shard_size: int | str = "10GB"
) -> Merged:
    """Write the weights of a checkpoint's model; every byte that is read is verified first.

    Args:
        checkpoint: its folder, or a project folder, of which the newest complete one is taken; or what DeepSpeed's
            own `save_checkpoint` wrote under ZeRO, whose float32 weights are put together.
        model: which one, where it holds several: "model_0".

    Raises:
        CheckpointError: it is incomplete or damaged, there is no such model, or `out` cannot be written.
    """
    native = find_native(checkpoint)
    if native is not None:
        return _merge_native(native, out, model, max_shard_size)
    filesystem = LocalFileSystem()
    folder = _one(checkpoint, filesystem)
    manifest = read_manifest(folder, filesystem)
    check_sizes(folder, manifest, filesystem)
    for record in manifest.files:
        check_bytes(folder, record, filesystem)
    with filesystem.open(folder / INDEX) as handle:
        index = Index.from_json(handle.read())
    name = _model(index, model, folder)
    prefix = f"{name}/"
    own = {full for full in index.names if full.startswith(prefix)}
    tensors: dict[str, torch.Tensor] = {}
    for full in own - index.aliases.keys():
        known = index.tensor(full)
        tensors[full] = torch.empty(known.size, dtype=known.properties.dtype)
    read_into(tensors, index, folder, filesystem)
    state = {full.removeprefix(prefix): tensors[index.aliases.get(full, full)] for full in sorted(own)}
    files = save_model(state, out, world=single(), max_shard_size=max_shard_size)
    return Merged(
        checkpoint=folder,
        step=manifest.step,
        world_size=manifest.world_size,
        model=name,
        files=tuple(files),
        num_tensors=len(tensors),
        num_bytes=sum(tensor.nbytes for tensor in tensors.values()),
    )


def _merge_native(folder: Path, out: Path, model: str | None, max_shard_size: int | str) -> Merged:
    if model not in (None, "model_0"):
        raise CheckpointError(f"checkpoint {folder} has no {model}; it has model_0")
    native = read_native(folder)
    files = save_model(native.model, out, world=single(), max_shard_size=max_shard_size)
    tensors = {tensor.data_ptr(): tensor for tensor in native.model.values()}
    return Merged(
        checkpoint=folder,
        step=native.step,
        world_size=native.world_size,
        model="model_0",
        files=tuple(files),
        num_tensors=len(tensors),
        num_bytes=sum(tensor.nbytes for tensor in tensors.values()),
    )


def _one(path: Path, filesystem: LocalFileSystem) -> Path:
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path} is not there")
    if (path / MANIFEST).exists():
        return resolve(path, filesystem)
    listed = candidates(path, filesystem)
    if listed and not listed[0].problem:
        return listed[0].path
    why = f": {listed[0].problem}" if listed else ""
    raise CheckpointError(f"there is no complete checkpoint in {path}{why}")


def _model(index: Index, asked: str | None, folder: Path) -> str:
    items = sorted({name.partition("/")[0] for name in index.names})
    models = [item for item in items if item == "model" or item.startswith("model_")]
    if asked is not None and asked not in models:
        raise CheckpointError(f"checkpoint {folder} has no {asked}; it has {', '.join(models) or 'no model'}")
    if asked is None and len(models) != 1:
        raise CheckpointError(
            f"checkpoint {folder} has {', '.join(models) or 'no model'}: name one with --model"
        )
    return asked or models[0]
