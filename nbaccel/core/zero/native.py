"""Checkpoints that DeepSpeed wrote itself (`engine.save_checkpoint`): read on no ranks at all, by names of the model.

    <folder>/latest                                          the name of the newest one below
    <folder>/global_step5/mp_rank_00_model_states.pt          weights as computed with, buffers, shapes by name
    <folder>/global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt    of each rank: its part of what is in float32

Stages 1 and 2 lay the parameters of a group one after the other and cut the whole into one piece for each rank;
stage 3 cuts each parameter, and lays a rank's pieces of a sub-group one after the other. The files are pickles:
they are read without importing what they name, so nothing in them runs and DeepSpeed need not be installed.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from nbaccel.errors import CheckpointError

__all__ = ["Native", "find_native", "read_native"]

_REBUILDING = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_parameter_with_state")
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Native:
    """What such a checkpoint holds, whole, on the CPU."""

    folder: Path
    stage: int
    """Of ZeRO; 1 stands for 1 and 2, which are written alike."""
    world_size: int
    step: int
    model: Mapping[str, Tensor]
    """Parameters in float32, frozen ones and buffers as they are. Tied names have the same tensor."""
    moments: Mapping[str, Mapping[str, Tensor]]
    """The optimizer's state of each parameter."""
    groups: Sequence[Mapping[str, Any]]
    """The optimizer's groups: their options, and under "params" the names of their parameters."""
    scheduler: Mapping[str, Any] | None


def find_native(folder: Path) -> Path | None:
    """The folder with the ranks' files, if `folder` is such a checkpoint or names its newest one in `latest`."""
    try:
        if (folder / "latest").is_file():
            folder = folder / (folder / "latest").read_text(encoding="utf-8").strip()
        return folder if _files(folder, "optim") or _files(folder, "model") else None
    except (OSError, UnicodeDecodeError):
        return None


def read_native(folder: Path) -> Native:
    """Puts the ranks' pieces together. Takes the memory of all parameters and moments.

    Args:
        folder: as `find_native` gives it.

    Raises:
        CheckpointError: files are missing or damaged, or it was written in a way that is not known here.
    """
    try:
        return _read(folder)
    except (
        OSError,
        EOFError,
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        RuntimeError,
        AttributeError,
    ) as error:
        raise CheckpointError(f"{folder} cannot be read as a checkpoint of DeepSpeed: {error!r}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{folder} is damaged: {error}") from error


def _read(folder: Path) -> Native:
    optim, model = _files(folder, "optim"), _files(folder, "model")
    if not optim:
        raise CheckpointError(
            f"{folder} was written without ZeRO: its weights are plain, under 'module' in {model[0].name}; load them "
            "with torch.load(file, weights_only=True), or train on from them"
        )
    if any("mp_rank_00" not in file.name for file in [*optim, *model]):
        raise CheckpointError(
            f"{folder} was written by tensor-parallel or pipeline ranks, which is not read here"
        )
    ranks = [_load(file)["optimizer_state_dict"] for file in optim]
    counts = ranks[0]["partition_count"]
    world_size = max(counts) if isinstance(counts, (list, tuple)) else int(counts)
    if world_size != len(ranks) or not model:
        raise CheckpointError(
            f"{folder} is incomplete: {len(ranks)} of its {world_size} ranks' files are there"
        )
    heads = [_load(file) for file in model]
    pieces = _third_stage if "fp32_flat_groups" in ranks[0] else _flat_stages
    whole: dict[str, Tensor] = {}
    moments: dict[str, dict[str, Tensor]] = {}
    for name, key, value in pieces(ranks, heads[0]["param_shapes"]):
        if key is None:
            whole[name] = value
        else:
            moments.setdefault(name, {})[key] = value
    return Native(
        folder=folder,
        stage=3 if pieces is _third_stage else 1,
        world_size=world_size,
        step=int(heads[0]["global_steps"]),
        model=_model(whole, heads, folder),
        moments=moments,
        groups=_groups(ranks[0], heads[0]["param_shapes"]),
        scheduler=heads[0].get("lr_scheduler"),
    )


def _flat_stages(
    ranks: Sequence[Any], shapes: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, str | None, Tensor]]:
    """(parameter, key of the optimizer's state or None for itself, value) of stages 1 and 2."""
    paddings = ranks[0].get("param_alignment_paddings") or [()] * len(shapes)
    for number, (named, padding) in enumerate(zip(shapes, paddings, strict=True)):
        flats: dict[str | None, list[Tensor]] = {
            None: [rank["single_partition_of_fp32_groups"][number] for rank in ranks]
        }
        state, shared = _state([rank["base_optimizer_state"] for rank in ranks], number)
        flats |= state
        whole = {key: torch.cat([piece.flatten() for piece in parts]) for key, parts in flats.items()}
        offset = 0
        for place, (name, shape) in enumerate(named.items()):
            count = math.prod(shape)
            for key, flat in whole.items():
                yield name, key, flat.narrow(0, offset, count).view(tuple(shape)).clone()
            for key, value in shared.items():
                yield name, key, value.clone()
            offset += count + (int(padding[place]) if padding else 0)


def _third_stage(
    ranks: Sequence[Any], shapes: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, str | None, Tensor]]:
    """The same of stage 3."""
    for number, named in enumerate(shapes):
        flats: dict[str | None, list[Tensor]] = {None: [rank["fp32_flat_groups"][number] for rank in ranks]}
        state, shared = _state([rank["optimizer_state_dict"] for rank in ranks], number)
        flats |= state
        offset = 0
        for name, shape in named.items():
            count = math.prod(shape)
            part = -(-count // len(ranks))
            for key, parts in flats.items():
                joined = torch.cat([flat.flatten().narrow(0, offset, part) for flat in parts])
                yield name, key, joined[:count].view(tuple(shape)).clone()
            for key, value in shared.items():
                yield name, key, value.clone()
            offset += part


def _state(
    optimizers: Sequence[Any], number: int
) -> tuple[dict[str | None, list[Tensor]], dict[str, Tensor]]:
    """The state of a flat tensor: each rank's part of what is as long as it, and what is one number for all."""
    if not isinstance(optimizers[0], Mapping):
        raise CheckpointError("it was saved with elastic_checkpoint, which is not read here")
    states = [optimizer["state"].get(number, {}) for optimizer in optimizers]
    group: Mapping[str, Any] = next((g for g in optimizers[0]["param_groups"] if number in g["params"]), {})
    shared = {"step": group["step"]} if states[0] and "step" in group else {}
    long: dict[str | None, list[Tensor]] = {}
    for key, value in states[0].items():
        if isinstance(value, Tensor) and value.ndim:
            long[key] = [state[key] for state in states]
        elif isinstance(value, (Tensor, int, float)):
            shared[key] = value
    return long, {key: torch.as_tensor(value, dtype=torch.float32) for key, value in shared.items()}


def _groups(rank: Any, shapes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    saved = rank.get("optimizer_state_dict") or rank["base_optimizer_state"]
    found = []
    for group in saved["param_groups"]:
        options = {key: value for key, value in group.items() if key not in ("params", "step")}
        found.append({**options, "params": [name for number in group["params"] for name in shapes[number]]})
    return found


def _model(whole: Mapping[str, Tensor], heads: Sequence[Any], folder: Path) -> dict[str, Tensor]:
    """Parameters, then what no optimizer holds: buffers and frozen parameters; then names that are another's."""
    head = heads[0]
    found = dict(whole)
    frozen = head.get("frozen_param_shapes") or {}
    for name, shape in frozen.items():
        pieces = torch.cat([one["frozen_param_fragments"][name].flatten() for one in heads])
        found[name] = pieces[: math.prod(shape)].view(tuple(shape)).clone()
    tied = head.get("shared_params") or {}
    for name, value in head["module"].items():
        if name not in found and name not in tied and isinstance(value, Tensor):
            if not value.numel() and name not in head["buffer_names"]:
                raise CheckpointError(f"DeepSpeed left {name} out of {folder}: it learned in no optimizer")
            found[name] = value.clone()
    return found | {name: found[other] for name, other in tied.items()}


def _files(folder: Path, kind: str) -> list[Path]:
    """The ranks' files in their order."""
    named = folder.glob(f"*mp_rank_*_{kind}_states.pt")
    return sorted(named, key=lambda path: [int(number) for number in _NUMBER.findall(path.name)])


def _load(file: Path) -> Any:
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False, pickle_module=_Inert)


@final
class _Unknown:
    """Stands for an object of a class that is not imported."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Unknown:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """As a list would."""

    def extend(self, values: Any) -> None:
        """As a list would."""

    def add(self, value: Any) -> None:
        """As a set would."""


def _without_attributes(rebuild: Any, kind: Any, args: tuple[Any, ...], state: Any) -> Any:
    """A tensor that DeepSpeed had given attributes of its own."""
    return rebuild(*args)


@final
class _Inert:
    """What torch.load asks of a pickle module."""

    class Unpickler(pickle.Unpickler):
        """Makes tensors, containers and numbers; everything else becomes `_Unknown`. torch inherits from it."""

        def find_class(self, module: str, name: str) -> Any:
            if module == "torch._utils" and name in _REBUILDING:
                return super().find_class(module, name)
            if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
                return _without_attributes
            if (module, name) in (("collections", "OrderedDict"), ("torch", "Size")):
                return super().find_class(module, name)
            found = getattr(torch, name, None) if module == "torch" else None
            return found if isinstance(found, (torch.dtype, torch.layout)) else _Unknown

    @staticmethod
    def load(file: io.BufferedIOBase, **options: Any) -> Any:
        """For what torch reads beside the tensors."""
        return _Inert.Unpickler(file, **options).load()
