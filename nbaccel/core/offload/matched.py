"""Which of a checkpoint's tensors is which of a model's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from nbaccel.core.offload.parts import listed
from nbaccel.core.offload.weights import Loaded, Stored
from nbaccel.errors import CheckpointError, ConfigError

__all__ = ["Matched", "in_memory", "match"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """A model's tensors, each with where its values are. Buffers that are not there keep the values they have."""

    parameters: Mapping[int, Stored]
    """By id of the parameter."""
    buffers: Mapping[int, Stored]
    """By id of the buffer."""
    own: bool = False
    """Whether these are the model's own: a parameter that is where it is to be stays the one it is."""


def in_memory(model: nn.Module) -> Matched:
    """A model's own values.

    Raises:
        ConfigError: it has parameters without memory.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    empty = [name for name, tensor in [*named, *model.named_buffers()] if tensor.is_meta]
    if empty:
        raise ConfigError(
            f"{listed(empty)} have no values (they are on the meta device): use load_checkpoint_and_dispatch"
        )
    stored = {id(p): Loaded(p, on_disk=False) for _, p in named}
    return Matched(parameters=stored, buffers={}, own=True)


def match(model: nn.Module, stored: Mapping[str, Stored], where: str, *, strict: bool) -> Matched:
    """A checkpoint's tensors by the model's names; a tied parameter or buffer may have any of its names there.

    Raises:
        CheckpointError: something is missing, of another shape, or with `strict` left over; without `strict`
            buffers that the model has values for may be missing, with a warning.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    kept = {name for name in buffers if not _persistent(model, name)}
    tensors: dict[str, torch.Tensor] = {
        name: tensor for name, tensor in {**parameters, **buffers}.items() if name not in kept
    }
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    found = {key: next((name for name in group if name in stored), None) for key, group in names.items()}
    counted = {id(b): b for name, b in buffers.items() if name.endswith("num_batches_tracked")}
    absent = [names[key][0] for key, name in found.items() if name is None and key not in counted]
    made = [name for name in absent if name in buffers and not (strict or buffers[name].is_meta)]
    missing = [name for name in absent if name not in made]
    missing += [name for name in sorted(kept) if buffers[name].is_meta and id(buffers[name]) not in names]
    unexpected = [name for name in stored if name not in tensors and name not in kept]
    wrong = [
        f"{name} is {stored[name].shape} there and {tuple(tensor.shape)} in the model"
        for name, tensor in tensors.items()
        if name in stored and stored[name].shape != tuple(tensor.shape)
    ]
    _report(type(model).__name__, where, missing, wrong, unexpected, strict=strict)
    if made:
        text = f"{where} has no {listed(made)}: they keep what the model was made with"
        warnings.warn(text, UserWarning, stacklevel=3)
    values = {key: stored[name] for key, name in found.items() if name is not None}
    # Counted by no checkpoint of before torch 0.4.1, and by nothing that reads it but training.
    empty = {
        key: Loaded(torch.zeros_like(b, device="cpu"), on_disk=False)
        for key, b in counted.items()
        if b.is_meta
    }
    return Matched(
        parameters={key: values[key] for key in map(id, parameters.values())},
        buffers={**empty, **{key: values[key] for key in map(id, buffers.values()) if key in values}},
    )


def _report(
    model: str, where: str, missing: list[str], wrong: list[str], unexpected: list[str], *, strict: bool
) -> None:
    problems = [f"missing there: {listed(missing)}"] if missing else []
    problems += [f"of another shape: {listed(wrong, 3)}"] if wrong else []
    if unexpected and (strict or problems):
        problems.append(f"not in the model: {listed(unexpected)}")
    if problems:
        raise CheckpointError(f"{where} is not of this {model}: {'; '.join(problems)}")
    if unexpected:
        warnings.warn(
            f"{where} has tensors the model does not have: {listed(unexpected)}", UserWarning, stacklevel=4
        )


def _persistent(model: nn.Module, name: str) -> bool:
    owner, _, attribute = name.rpartition(".")
    return attribute not in model.get_submodule(owner)._non_persistent_buffers_set
