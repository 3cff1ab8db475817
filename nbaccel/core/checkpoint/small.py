"""The small states (schedulers, loaders, random generators, the user's own) as one document and its tensors.

What is plain data becomes JSON and tensors. A state that holds anything else is pickled as a whole into a
file of its own, which a load opens with torch's restricted unpickler unless the caller allows all of pickle.
"""

from __future__ import annotations

import io
import json
import pickle
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nbaccel.core.checkpoint.encode import Unencodable, decode, encode
from nbaccel.errors import CheckpointError

__all__ = ["Packed", "divided_of", "pack", "unpack"]

_DTENSOR = b"ctorch.distributed.tensor\nDTensor\n"
"""How a pickle of torch's names the class of a tensor that is divided over ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """States ready to be written."""

    document: bytes
    tensors: Mapping[str, torch.Tensor]
    pickles: Mapping[str, bytes]
    """By file name."""

    @property
    def num_bytes(self) -> int:
        tensors = sum(t.numel() * t.element_size() for t in self.tensors.values())
        return len(self.document) + tensors + sum(map(len, self.pickles.values()))


def pack(states: Mapping[str, Any], prefix: str, *, copy: bool, divided: Collection[str] = ()) -> Packed:
    """Encodes states by name; with `copy` the result shares no memory with them.

    Args:
        states: what the things' `state_dict()` gave.
        prefix: begins the names of pickled files.
        copy: for a save that goes on while training changes the states.
        divided: names of those whose tensors are divided over the ranks outside of a checkpoint.

    Raises:
        CheckpointError: a state cannot even be pickled.
    """
    document: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    pickles: dict[str, bytes] = {}
    for name, state in states.items():
        aside: dict[str, torch.Tensor] = {}
        try:
            document[name] = {"value": encode(state, aside, name)}
            tensors.update(aside)
        except (Unencodable, RecursionError) as reason:
            file = f"{prefix}-{len(pickles)}.pt"
            pickles[file] = _pickled(name, state, reason)
            document[name] = {"pickle": file, "because": str(reason)}
        if name in divided:
            document[name]["divided"] = True
    return Packed(
        document=json.dumps(document).encode(),
        tensors={name: _in_main_memory(tensor, copy) for name, tensor in tensors.items()},
        pickles=pickles,
    )


def _in_main_memory(tensor: torch.Tensor, copy: bool) -> torch.Tensor:
    moved = tensor.detach().to("cpu", copy=copy)
    return moved.contiguous()


def _pickled(name: str, state: Any, reason: Exception) -> bytes:
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
        raise CheckpointError(
            f"the state of {name!r} cannot be saved: {error}. Let its state_dict() return numbers, strings, "
            "tensors, and lists and dicts of them."
        ) from error
    data = buffer.getvalue()
    if _DTENSOR in data:
        raise CheckpointError(
            f"the state of {name!r} holds tensors of which each rank has a part, and {reason}: only this rank's parts "
            "would be saved. Let its state_dict() return them in dicts and lists."
        )
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except pickle.UnpicklingError:
        warnings.warn(
            f"in the state of {name!r}, {reason}; it was pickled, and loading it will need "
            "load_state(allow_pickle=True), which runs code from the file.",
            stacklevel=2,
        )
    return data


def divided_of(document: bytes) -> frozenset[str]:
    """Names of the states that `pack` was told are divided over the ranks."""
    return frozenset(name for name, entry in json.loads(document).items() if "divided" in entry)


def unpack(
    document: bytes,
    tensors: Mapping[str, torch.Tensor],
    read: Callable[[str], bytes],
    *,
    allow_pickle: bool,
) -> dict[str, Any]:
    """The states `pack` was given; `read` gives the bytes of a pickled file.

    Raises:
        CheckpointError: a state needs unrestricted unpickling and that is not allowed.
    """
    states: dict[str, Any] = {}
    for name, entry in json.loads(document).items():
        if "pickle" not in entry:
            states[name] = decode(entry["value"], tensors)
            continue
        try:
            # map_location: a state from a GPU must load where there is none.
            data = io.BytesIO(read(entry["pickle"]))
            states[name] = torch.load(data, map_location="cpu", weights_only=not allow_pickle)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"the state of {name!r} can only be read by unpickling, because {entry['because']}; that runs code "
                "from the file. If you trust it, pass allow_pickle=True."
            ) from error
    return states
